from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data.encode import Example
from fedtune.lora.adapter import Factors
from fedtune.messages import Assignment, ImportanceName, Plan, Training, TrainLora
from fedtune.model import module_importance as scores
from fedtune.model.base import Base
from fedtune.model.batches import collate
from fedtune.model.lora import start
from fedtune.model.loss import summed_loss
from fedtune.model.module_importance import (
    after_training,
    before_training,
    mean_gradients,
    normalise,
    squared_gradient,
    svd_sensitivity,
)
from fedtune.probing.order import batches
from fedtune.seeds import derive

Loader = Callable[..., Base]
Make = Callable[[int], list[Example]]


def order(base: Base, importance: ImportanceName = "gain", **training: Any) -> Assignment:
    plan = Plan("ann", 2, 2.0, Training(batch=2, steps=3, **training), importance=importance)
    return Assignment(method="flora", round=1, seed=11, plan=plan, task=TrainLora(a_key=5), base=base.digest)


def initial(base: Base, assignment: Assignment) -> dict[str, Factors]:
    return dict(start(assignment.lora, assignment.plan, base.modules))


def test_the_example_on_paper() -> None:
    """B = diag(2, 1), A = I, s = 1, G = [[.05, .1], [.3, -.4]]: g_A = [[.1, .2], [.3, -.4]], e = (.1, -.4)."""
    factors = Factors(a=np.eye(2), b=np.diag([2.0, 1.0]))
    assert svd_sensitivity(factors, np.array([[0.1, 0.2], [0.3, -0.4]]), scale=1.0) == pytest.approx(0.5)


def test_the_example_of_rank_one_on_paper() -> None:
    factors = Factors(a=np.array([[3.0, 0.0]]), b=np.array([[1.0], [2.0]]))
    assert svd_sensitivity(factors, np.array([[0.5, 1.0]]), scale=1.0) == pytest.approx(1.5)


@given(st.integers(1, 4), st.integers(0, 2**16))
@settings(deadline=None)
def test_svd_does_not_depend_on_how_a_change_is_factored(rank: int, seed: int) -> None:
    """B C and C^-1 A are the same change; where all effects have one sign they add up to <g_A, A>."""
    rng = np.random.default_rng(seed)
    a, b, g = rng.standard_normal((rank, 7)), rng.standard_normal((5, rank)), rng.standard_normal((5, 7))
    c = rng.standard_normal((rank, rank)) + 3 * np.eye(rank)
    other = Factors(a=np.linalg.solve(c, a), b=b @ c)
    one, two = (svd_sensitivity(f, 2 * f.b.T @ g, scale=2.0) for f in (Factors(a=a, b=b), other))
    assert one == pytest.approx(two, rel=1e-8)
    u, values, vt = np.linalg.svd(2 * b @ a, full_matrices=False)
    effects = [values[j] * u[:, j] @ g @ vt[j] for j in range(rank)]
    assert one == pytest.approx(float(np.abs(effects).sum()), rel=1e-8)
    assert sum(effects) == pytest.approx(float(((2 * b.T @ g) * a).sum()), rel=1e-8, abs=1e-9)


def test_the_sketch_of_a_gradient_is_unbiased() -> None:
    """s B^T G is never formed from G on a client; here it is, over 500 draws of A."""
    rng = np.random.default_rng(0)
    g = rng.standard_normal((12, 20))
    estimates = []
    for _ in range(500):
        a = rng.uniform(-1, 1, (4, 20)) / np.sqrt(20)
        estimates.append(squared_gradient(2.0 * g @ a.T, a, 2.0))
    assert np.mean(estimates) == pytest.approx((g**2).sum(), rel=0.02)


def test_scores_are_of_the_gradients_of_b_over_all_batches(loaded: Loader, examples: Make) -> None:
    """Against autograd through the model's weights: dL/dB = s G A^T, with G the mean gradient of W over the batches."""
    base = loaded(targets=["q_proj", "down_proj"])
    assignment, rows = order(base), examples(4)
    own = initial(base, assignment)
    probes = {name: np.ones((4, factors.shape[1]), np.float32) / 10 for name, factors in own.items()}
    mean, tokens = mean_gradients(base, rows, assignment, scores.beside(own, probes))
    name = "model.layers.0.mlp.down_proj"
    weight = base.model.get_submodule(name).weight
    weight.requires_grad_(True)
    # All four examples in batches of two, in some order: the mean over the batches is of any order.
    order_of = batches(4, size=2, key=derive(assignment.seed, "importance.rows"))
    total = torch.zeros_like(weight)
    for _ in range(2):
        batch = collate([rows[i] for i in next(order_of)], base)
        loss = summed_loss(base.model, batch, task=base.task) / batch.count
        total += torch.autograd.grad(loss, weight)[0] / 2
    weight.requires_grad_(False)
    wanted = 2.0 * total.numpy() @ probes[name].T
    assert mean[name].b[:, -4:] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert tokens == sum(len(row.input_ids) for row in rows)


@pytest.mark.parametrize("name", ["gain", "gradient", "svd", "adalora"])
def test_every_kind_scores_every_module_and_leaves_the_base_as_it_was(
    name: ImportanceName, loaded: Loader, examples: Make
) -> None:
    base = loaded()
    assignment, rows = order(base, name), examples(4)
    before, weights = initial(base, assignment), base.digest
    rng = np.random.default_rng(0)
    after = {
        module: Factors(a=f.a, b=rng.standard_normal(f.b.shape).astype(np.float32) / 10) for module, f in before.items()
    }
    early, _ = before_training(base, rows, assignment, before)
    late, tokens = after_training(base, rows, assignment, after)
    measured = early or late
    assert bool(early) == (name in ("gain", "gradient"))
    assert bool(late) != bool(early)
    assert measured.keys() == set(base.modules)
    assert all(np.isfinite(value) and value > 0 for value in measured.values())
    assert (tokens > 0) == bool(late)
    assert scores.before_training(base, rows, assignment, before) == (early, _)
    assert base.digest == weights
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_nothing_is_measured_where_nothing_is_asked(loaded: Loader, examples: Make) -> None:
    base = loaded()
    assignment = order(base, "")
    assert before_training(base, examples(2), assignment, initial(base, assignment)) == ({}, 0)
    assert after_training(base, examples(2), assignment, initial(base, assignment)) == ({}, 0)


def test_batches_whose_gradient_is_not_finite_say_nothing(
    loaded: Loader, examples: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, assignment, calls = loaded(), order(loaded()), list[int]()

    def overflowing(*args: Any, **named: Any) -> Any:
        calls.append(1)
        return summed_loss(*args, **named) * (float("inf") if len(calls) != 2 else 1.0)

    monkeypatch.setattr(scores, "summed_loss", overflowing)
    found, tokens = before_training(base, examples(4), assignment, initial(base, assignment))
    assert len(calls) == 2
    assert all(np.isfinite(value) for value in found.values())
    assert 0 < tokens < sum(len(row.input_ids) for row in examples(4))


def test_shares_hide_how_large_a_loss_is() -> None:
    assert normalise({"a": 3.0, "b": 1.0}, ["a", "b"]) == (0.75, 0.25)
    assert normalise({"a": 3e9, "b": 1e9}, ["a", "b"]) == (0.75, 0.25)
    # What could not be measured, or has no gradient at all, says nothing.
    for empty in ({}, {"a": 0.0, "b": 0.0}, {"a": float("inf"), "b": 1.0}, {"a": float("nan"), "b": 1.0}):
        assert normalise(empty, ["a", "b"]) == (0.5, 0.5)


def test_few_batches_are_enough(loaded: Loader, examples: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    base, calls = loaded(), list[int]()

    def counting(*args: Any, **named: Any) -> torch.Tensor:
        calls.append(1)
        return summed_loss(*args, **named)

    monkeypatch.setattr(scores, "summed_loss", counting)
    assignment = order(base)
    before_training(base, examples(40), assignment, initial(base, assignment))
    assert len(calls) == scores.BATCHES


def test_packed_and_recomputed_activations_give_the_same(loaded: Loader, examples: Make) -> None:
    base = loaded()
    plain, _ = before_training(base, examples(4), order(base), initial(base, order(base)))
    for assignment in (order(base, packing=True), order(base, gradient_checkpointing=True)):
        other, _ = before_training(base, examples(4), assignment, initial(base, assignment))
        assert other == pytest.approx(plain, rel=1e-4)
