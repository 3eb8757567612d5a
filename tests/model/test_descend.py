"""Slopes of a real model along all directions at once, against losses on both sides and against plain gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.directions.bank import displacement, perturb
from fedtune.directions.projection import project
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.space import directions
from fedtune.directions.trainable import TensorSelection, trainable_ordinals
from fedtune.model.base import Base, digest
from fedtune.model.batches import Batch, collate
from fedtune.model.descend import at_dense_slope, root_mean_square
from fedtune.model.loss import summed_loss
from fedtune.model.probe import measured_position
from fedtune.model.seed_rebuild import mean_loss
from fedtune.tensors import Array

KEYS = [0x0123456789ABCDEF, 0xFEDCBA9876543210]


def reached(base: Base, bank: str = "hadamard", *, everything: bool = False) -> Sequence[int]:
    selection = TensorSelection(bank, vectors=everything, embeddings=everything)
    return trainable_ordinals(base.manifest, selection, base.matrices)


def ledger_of(
    base: Base, bank: str = "hadamard", *, groups: Any = 1, banks: int = 1, everything: bool = False
) -> SeedLedger:
    """Return a ledger with whole numbers of at most 8 at e = 10, after so many banks."""
    chosen = directions(bank, 16, KEYS[:banks], groups, reached(base, bank, everything=everything))
    sums = np.random.default_rng(5).integers(-8, 9, chosen.size).astype(np.int32)
    return SeedLedger(chosen, 10, 3, base.manifest.digest, sums)


def slopes_from_gradients(base: Base, ledger: SeedLedger, ordinals: Sequence[int], batch: Batch) -> Array:
    """<dL/dw, z_k> by definition: the whole gradient at w(A), times each direction."""
    bank, entries = ledger.bank, base.manifest.entries
    named = {name: parameter.detach().clone() for name, parameter in base.model.named_parameters()}
    for ordinal in ordinals:
        entry = entries[ordinal]
        y = displacement(bank, ledger.accumulators, ordinal=ordinal, shape=entry.shape)
        named[entry.name] -= torch.from_numpy(y).reshape(entry.shape) * 2.0 ** -(ledger.exponent + bank.halvings)
        named[entry.name].requires_grad_(True)

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = base.model

        def forward(self, batch: Batch) -> torch.Tensor:
            return summed_loss(self.model, batch, task=base.task) / batch.count

    tied = {f"model.{name}": tensor for name, tensor in named.items()}
    torch.func.functional_call(Called(), tied, (replace(batch, fused=False),), tie_weights=True).backward()
    found = np.zeros(len(range(bank.size)[bank.newest]))
    for ordinal in ordinals:
        gradient = named[entries[ordinal].name].grad
        assert gradient is not None
        found += project(bank, gradient.double().numpy(), ordinal, entries[ordinal].shape)
    return found


def tied(base: Base) -> Base:
    base.model.lm_head.weight = base.model.model.embed_tokens.weight
    return base


@pytest.mark.parametrize(
    ("bank", "groups", "banks"), [("hadamard", 1, 1), ("gaussian", 1, 1), ("hadamard", 4, 2), ("hadamard", "tensor", 1)]
)
@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2"])
def test_slopes_are_the_whole_gradient_times_each_direction(
    kind: str, bank: str, groups: Any, banks: int, loaded: Any, examples: Any
) -> None:
    base = loaded(kind.rpartition(" ")[2], targets=["all-linear"])
    base = tied(base) if kind == "tied llama" else base
    ledger, ordinals = ledger_of(base, bank, groups=groups, banks=banks), reached(base, bank)
    batch = collate(examples(5), base)
    with at_dense_slope(base, ledger, ordinals) as position:
        loss, slopes = position.slopes(ledger.accumulators, [batch])
        assert loss == pytest.approx(position.loss(ledger.accumulators, batch), rel=1e-6)
    expected = slopes_from_gradients(base, ledger, ordinals, batch)
    np.testing.assert_allclose(slopes, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_slope_is_the_difference_of_losses_on_both_sides(loaded: Any, examples: Any) -> None:
    """What probing measures with two forward passes for each seed comes out of one backward pass."""
    base = loaded(targets=["all-linear"])
    ledger, batch, amount = ledger_of(base), collate(examples(4), base), 4
    with at_dense_slope(base, ledger, reached(base)) as position:
        _, slopes = position.slopes(ledger.accumulators, [batch])
        for seed in (0, 7, 15):
            below, above = (
                position.loss(perturb(ledger.bank, ledger.accumulators, seed, side).astype(np.int32), batch)
                for side in (-amount, amount)
            )
            # The weights are w0 - u A z: a larger number goes against the direction.
            assert (below - above) / (2 * amount * 2.0**-10) == pytest.approx(slopes[seed], rel=0.02, abs=0.02)


def test_several_batches_are_one_larger_one(loaded: Any, examples: Any) -> None:
    base = loaded(targets=["all-linear"])
    ledger, rows = ledger_of(base), examples(5)
    with at_dense_slope(base, ledger, reached(base)) as position:
        loss, slopes = position.slopes(ledger.accumulators, [collate(rows, base)])
        parts = [collate(rows[:4], base), collate(rows[4:], base)]
        again, others = position.slopes(ledger.accumulators, parts)
    assert again == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(others, slopes, rtol=1e-3, atol=1e-5 * np.abs(slopes).max())


def test_tensors_that_a_batch_does_not_use_have_slopes_of_zero(loaded: Any, examples: Any) -> None:
    """As the experts of a mixture to which no token is sent."""
    base = loaded("bert", targets=["query"], task="classification", labels=["a", "b", "c"])
    ordinals = [base.manifest.ordinals["bert.embeddings.token_type_embeddings.weight"]]
    base.model.bert.embeddings.forward = partial(unused_types, base.model.bert.embeddings)
    ledger = SeedLedger(directions("hadamard", 16, KEYS[:1]), 10, 0, bytes(32), np.zeros(16, np.int32))
    batch = collate(examples(3, classes=3), base)
    with at_dense_slope(base, ledger, ordinals) as position:
        loss, slopes = position.slopes(ledger.accumulators, [batch])
        assert loss == pytest.approx(position.loss(ledger.accumulators, batch), rel=1e-6)
    assert slopes.tolist() == [0.0] * 16


def unused_types(embeddings: Any, input_ids: torch.Tensor, **others: Any) -> Any:
    return embeddings.LayerNorm(embeddings.word_embeddings(input_ids))


def test_the_same_step_gives_the_same_bits(loaded: Any, examples: Any) -> None:
    base = loaded(targets=["all-linear"])
    ledger, batch = ledger_of(base), collate(examples(5), base)
    found = []
    for _ in range(2):
        with at_dense_slope(base, ledger, reached(base)) as position:
            found.append(position.slopes(ledger.accumulators, [batch]))
    assert found[0][0] == found[1][0]
    assert found[0][1].tobytes() == found[1][1].tobytes()


def test_the_base_stays_as_it_was_and_no_gradient_is_left(loaded: Any, examples: Any) -> None:
    base = loaded(targets=["all-linear"])
    own, ledger = digest(base.model), ledger_of(base)
    with at_dense_slope(base, ledger, reached(base)) as position:
        position.slopes(ledger.accumulators, [collate(examples(3), base)])
        assert all(parameter.grad is None for parameter in base.model.parameters())
    assert digest(base.model) == own
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in base.model.parameters())


def test_no_two_gradients_are_there_at_a_time(loaded: Any, examples: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient is dropped before the next one is complete: beside it there is never the whole of it."""
    base = loaded(targets=["all-linear"])
    ledger, there = ledger_of(base), list[int]()

    def counted(*arguments: Any) -> torch.Tensor:
        there.append(sum(parameter.grad is not None for parameter in base.model.parameters()))
        return torch.zeros(16, dtype=torch.float64)

    monkeypatch.setattr("fedtune.model.descend.project", counted)
    with at_dense_slope(base, ledger, reached(base)) as position:
        position.slopes(ledger.accumulators, [collate(examples(3), base)])
    assert there == [1] * len(base.manifest.entries)


def test_a_client_may_descend_on_the_base_of_one_that_has_measured_losses(loaded: Any, examples: Any) -> None:
    """What a model stores in a forward pass of inference mode must not end up in a backward pass."""
    base = loaded(targets=["all-linear"])
    ledger, batch = ledger_of(base), collate(examples(3), base)
    with measured_position(base, client="ann", batch=3)(ledger, reached(base)) as there:
        [loss] = there.losses(batch, [(0, 0)])
    with at_dense_slope(base, ledger, reached(base)) as position:
        assert position.slopes(ledger.accumulators, [batch])[0] == pytest.approx(loss, rel=1e-6)


def test_sixteen_bits_descend_too(loaded: Any, examples: Any) -> None:
    wide, narrow = loaded(targets=["all-linear"]), loaded(targets=["all-linear"], dtype="bfloat16")
    found = []
    for base in (wide, narrow):
        ledger = ledger_of(base)
        with at_dense_slope(base, ledger, reached(base)) as position:
            found.append(position.slopes(ledger.accumulators, [collate(examples(5), base)])[1])
    assert np.corrcoef(found)[0, 1] > 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_root_mean_square_is_of_all_numbers_together(dtype: torch.dtype) -> None:
    # (3^2 + 3^2 + 300^2) / 3 = 30006; 300^2 is beyond float16
    assert root_mean_square([torch.full((2,), 3.0, dtype=dtype), torch.full((1, 1), 300.0, dtype=dtype)]) == (
        pytest.approx(30006**0.5, rel=1e-6)
    )
    assert root_mean_square([]) == 0.0


def test_the_loss_is_that_of_the_base_at_zero(loaded: Any, examples: Any) -> None:
    base = loaded(targets=["all-linear"])
    ledger, batch = ledger_of(base), collate(examples(3), base)
    with torch.no_grad():
        expected = mean_loss(base, batch)
    with at_dense_slope(base, ledger, reached(base)) as position:
        assert position.loss(np.zeros(16, np.int32), batch) == pytest.approx(expected, rel=1e-6)
