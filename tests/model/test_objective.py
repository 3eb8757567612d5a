from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.lora.adapter import Factors
from fedtune.messages import Proximal, TailRank, Training
from fedtune.model.lora import layers, read_local, with_adapters
from fedtune.model.objective import TERMS, Hooks, Start, factor_pairs, kept_rank, proximal, tail_norm, tail_rank
from fedtune.model.surgery import shrink_further, with_structure
from fedtune.model.train import train
from fedtune.tensors import Array

TRAINING = Training(batch=2, learning_rate=0.05, steps=8, optimizer="sgd", clip_norm=None)


def test_the_proximal_term_and_its_gradient_by_hand() -> None:
    """mu / 2 * ((1 - 3)^2 + (2 - 2)^2 + (0 - 4)^2) = 0.25 * 20; its gradient is mu (w - w_start)."""
    first, second = torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([[0.0]]))
    start: Start = {first: torch.tensor([3.0, 2.0]), second: torch.tensor([[4.0]])}
    loss = proximal([], start, Proximal(0.5))
    loss.backward()
    assert loss.item() == 5.0
    assert first.grad is not None
    assert second.grad is not None
    assert (first.grad.tolist(), second.grad.tolist()) == ([-1.0, 0.0], [[-2.0]])


def test_every_term_of_a_message_has_a_loss() -> None:
    from typing import get_args

    from fedtune.messages import Preference, Term

    # The preference of answers is the loss on the examples, which is no sum over parameters.
    assert {*TERMS, Preference} == set(get_args(Term))


@pytest.fixture
def attached(loaded: Any) -> Iterator[tuple[Any, Any, dict[str, Factors]]]:
    """A base with modules_to_save and an adapter of rank 2, and what that adapter is at the start."""
    base = loaded(targets=["q_proj"], saved=["lm_head"])
    rng = np.random.default_rng(0)
    local = {
        name: Factors(a=rng.normal(size=(2, n)).astype(np.float32), b=rng.normal(size=(m, 2)).astype(np.float32))
        for name, (m, n) in base.modules.items()
    }
    with with_adapters(base, local=local, saved=base.saved_tensors()) as model:
        yield base, model, local


def moved(base: Any, model: Any, local: dict[str, Factors]) -> float:
    """Return the largest change of a trained number, modules_to_save among them."""
    after = read_local(model)
    steps = [
        float(np.abs(getattr(after[name], side) - getattr(local[name], side)).max()) for name in local for side in "ab"
    ]
    return max(steps)


def test_a_large_mu_keeps_a_client_at_its_start_and_a_small_one_does_not(loaded: Any, examples: Any) -> None:
    """SGD at lr < 1 / mu: with mu = 19 at lr .05 each step leaves a twentieth of the way, so steps do not add up."""
    base = loaded(targets=["q_proj"], saved=["lm_head"])
    ways: dict[float, list[float]] = {}
    for mu in (0.0, 1e-6, 19.0):
        saved = base.saved_tensors()
        local = {
            name: Factors(a=np.ones((2, n), np.float32), b=np.ones((m, 2), np.float32))
            for name, (m, n) in base.modules.items()
        }
        with with_adapters(base, local=local, saved=saved) as model:
            train(base, examples(6), TRAINING, key=1, client="ann", hooks=Hooks(model, (Proximal(mu),)) if mu else None)
            head = dict(model.named_parameters())["lm_head.weight"].detach().numpy()
            ways[mu] = [moved(base, model, local), float(np.abs(head - saved["lm_head.weight"]).max())]
    for at in (0, 1):  # the factors, and modules_to_save
        assert ways[1e-6][at] == pytest.approx(ways[0.0][at], rel=1e-3)
        assert 0 < ways[19.0][at] < 0.4 * ways[0.0][at]


def test_the_first_step_from_the_start_feels_no_pull(loaded: Any, examples: Any) -> None:
    base, ends = loaded(targets=["q_proj"]), []
    for terms in ((), (Proximal(100.0),)):
        local = {
            name: Factors(a=np.ones((2, n), np.float32), b=np.ones((m, 2), np.float32))
            for name, (m, n) in base.modules.items()
        }
        with with_adapters(base, local=local) as model:
            train(base, examples(6), replace(TRAINING, steps=1), key=1, client="ann", hooks=Hooks(model, terms))
            ends.append(read_local(model))
    for name in ends[0]:
        np.testing.assert_array_equal(ends[0][name].a, ends[1][name].a)
        np.testing.assert_array_equal(ends[0][name].b, ends[1][name].b)


def test_all_terms_of_an_objective_count_in_any_order(loaded: Any, examples: Any) -> None:
    base, tail, pull = loaded(targets=["q_proj"]), TailRank(0.5, 0.5), Proximal(4.0)
    ends: list[Array] = []
    for terms in ((tail, pull), (pull, tail), (tail,), (pull,)):
        local = {
            name: Factors(a=np.ones((2, n), np.float32), b=np.ones((m, 2), np.float32))
            for name, (m, n) in base.modules.items()
        }
        with with_adapters(base, local=local) as model:
            train(base, examples(6), replace(TRAINING, steps=3), key=1, client="ann", hooks=Hooks(model, terms))
            ends.append(np.concatenate([factors.b.ravel() for factors in read_local(model).values()]))
    both, swapped, *alone = ends
    np.testing.assert_allclose(both, swapped, atol=1e-5)
    for end in alone:
        assert np.abs(both - end).max() > 1e-2


def test_only_fedprox_keeps_a_copy_of_the_start(attached: Any) -> None:
    _, model, _ = attached
    assert Hooks(model, (TailRank(0.5, 0.5),))._start == {}
    assert Hooks(model, (TailRank(0.5, 0.5), Proximal(1.0)))._start


def test_the_tail_is_what_cutting_the_rank_would_remove(attached: Any) -> None:
    _, model, local = attached
    expected = sum(np.linalg.norm(f.b[:, 1:]) * np.linalg.norm(f.a[1:]) for f in local.values())
    assert tail_norm(factor_pairs(model), 0.5).item() == pytest.approx(expected, rel=1e-5)
    assert tail_rank(factor_pairs(model), {}, TailRank(3.0, 0.5)).item() == pytest.approx(3 * expected, rel=1e-5)
    assert tail_norm(factor_pairs(model), 1.0).item() < 1e-6
    assert [kept_rank(8, decay) for decay in (1.0, 0.99, 0.5, 0.01)] == [8, 7, 4, 1]


def test_where_a_model_shrinks_between_steps_its_start_shrinks_with_it(loaded: Any) -> None:
    from fedtune.model.pruned_training import block_layout
    from fedtune.pruning.structure import BlockStructure, ModelStructure, cuts, slice_adapter

    base = loaded(targets=["all-linear"])
    anatomy = block_layout(base)
    block = anatomy.blocks[0]
    whole, half = (
        ModelStructure(
            tuple(
                BlockStructure(tuple(range(block.heads)), tuple(range(block.kv_heads)), tuple(range(size)))
                for _ in anatomy.blocks
            )
        )
        for size in (block.channels, block.channels // 2)
    )
    local = {
        name: Factors(a=np.ones((2, n), np.float32), b=np.ones((m, 2), np.float32))
        for name, (m, n) in base.modules.items()
    }
    with (
        with_structure(base.model, whole, anatomy),
        with_adapters(base, local=slice_adapter(local, cuts(whole, anatomy))) as model,
    ):
        parameters = [parameter for layer in layers(model).values() for parameter in layer.parameters()]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        start: Start = {parameter: parameter.detach() + 2.0 for parameter in trained}
        optimizer = torch.optim.SGD(trained, lr=0.1)
        left = shrink_further(model, optimizer, whole, half, anatomy, start)
        assert set(start) == set(left)
        assert all(value.shape == parameter.shape for parameter, value in start.items())
        assert proximal([], start, Proximal(1.0)).item() == 2.0 * sum(parameter.numel() for parameter in left)
