from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.data.encode import Example
from fedtune.lora.adapter import Factors, draw_a
from fedtune.messages import Training
from fedtune.model.base import Base
from fedtune.model.lora import read_local, with_adapters
from fedtune.model.shares import ALONE, Shares, connect
from fedtune.model.train import Trained, train

TRAINING = Training(batch=4, accumulation=2, learning_rate=0.01, steps=3, clip_norm=0.05)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Shares, Shares]]:
    """The shares of two processes, here two threads, which add up over gloo's sockets as processes do."""
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(connect, tmp_path / "store", place, 2) for place in range(2))
        yield first.result(), second.result()


def test_rows_are_divided_without_rest() -> None:
    assert [list(Shares(place, 3).own(range(7))) for place in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert list(Shares(2, 3).own([9])) == []
    assert ALONE.own([1, 2]) == [1, 2]


def test_one_process_changes_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    assert ALONE.join([parameter], 0.1, 3, 7) == (0.1, 7)
    assert parameter.grad.tolist() == [1.0, 2.0]


def test_gradients_and_losses_are_weighted_by_what_counts(pair: tuple[Shares, Shares]) -> None:
    # Means of 1 over three tokens, and of 5 over one: (3 * 1 + 1 * 5) / 4 = 2, and not the mean of the means.
    parameters = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    for parameter, value in zip(parameters, (1.0, 5.0), strict=True):
        parameter.grad = torch.full((2, 2), value)
    with ThreadPoolExecutor(2) as pool:
        joined = pool.map(
            lambda shares, parameter, loss, count: shares.join([parameter], loss, count, 10 * count),
            pair,
            parameters,
            (1.0, 5.0),
            (3, 1),
        )
        assert list(joined) == [(2.0, 40), (2.0, 40)]
    assert all(parameter.grad is not None and (parameter.grad == 2.0).all() for parameter in parameters)


def test_a_process_without_rows_adds_nothing(pair: tuple[Shares, Shares]) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    parameters[0].grad = torch.tensor([1.0, 2.0])
    with ThreadPoolExecutor(2) as pool:
        joined = pool.map(lambda shares, p, count: shares.join([p], 3.0, count, count), pair, parameters, (2, 0))
        assert list(joined) == [(3.0, 2), (3.0, 2)]
    assert [p.grad.tolist() for p in parameters if p.grad is not None] == [[1.0, 2.0], [1.0, 2.0]]


def test_two_shares_take_the_steps_of_one(
    pair: tuple[Shares, Shares], loaded: Callable[..., Base], examples: Callable[[int], list[Example]]
) -> None:
    rows, bases = examples(9), [loaded() for _ in range(3)]  # the last batch of an epoch has one row

    def learn(base: Base, shares: Shares) -> Trained:
        return train(base, rows, TRAINING, key=5, client="ann", shares=shares)

    # Attached one after the other, for peft is not safe to use in two threads; the steps are taken at the same time.
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        for base in bases:
            local = {
                name: Factors(draw_a(3, name, 4, n), np.zeros((m, 4), np.float32))
                for name, (m, n) in base.modules.items()
            }
            stack.enter_context(with_adapters(base, local=local, scale=2.0))
        alone = learn(bases[0], ALONE)
        first, second = pool.map(learn, bases[1:], pair)
        expected, ours, theirs = (read_local(base.model) for base in bases)
    np.testing.assert_allclose(first.losses, alone.losses, atol=1e-5, rtol=0)
    assert (first.losses, first.measured.tokens) == (second.losses, second.measured.tokens)
    assert first.measured.tokens == alone.measured.tokens
    for name, factors in expected.items():
        np.testing.assert_array_equal(ours[name].b, theirs[name].b)
        np.testing.assert_allclose(ours[name].a, factors.a, atol=1e-5, rtol=0)
        np.testing.assert_allclose(ours[name].b, factors.b, atol=1e-5, rtol=0)
        assert np.abs(factors.b).max() > 1e-2
