from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.lora import lowrank
from fedtune.lora.adapter import Factors, delta
from fedtune.methods import fedit
from fedtune.methods.fedex import METHOD
from fedtune.methods.method import LinearMethod, resize
from fedtune.tensors import Array


def f32(values: Any) -> Array:
    return np.array(values, np.float32)


def test_the_residual_by_hand(federate: Any, two_ranks: Any) -> None:
    federation = federate({"m": (1, 1)}, max_rank=1)
    updates = [
        federate.update(f"c{b}", {"m": Factors(a=f32([[a]]), b=f32([[b]]))}, examples=1) for b, a in [(1, 2), (3, 4)]
    ]
    state = METHOD.aggregate(federation.state(METHOD), updates)
    assert delta(lowrank.unpack(state.residual)["m"].factors) == pytest.approx(1)  # 7 - 2 * 3

    padded = [
        federate.update(u.client, {"m": Factors(a=t["m.a"], b=t["m.b"])}, examples=u.num_examples)
        for u in two_ranks
        for t in [resize(u.lora.tensors, 2)]
    ]
    state = METHOD.aggregate(federate({"m": (2, 3)}, max_rank=2).state(METHOD), padded)
    exact = np.array([[0.5, 0.75, -0.5], [1.75, 0.75, -0.25]])
    averaged = np.array([[0.21875, 1.3125, -0.21875], [0.8125, 2.0625, 0.3125]])
    np.testing.assert_allclose(delta(lowrank.unpack(state.residual)["m"].factors), exact - averaged, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    rank=st.integers(1, 8),
    clients=st.integers(1, 4),
    rate=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_the_model_is_the_exact_mean(
    federate: Any, m: int, n: int, rank: int, clients: int, rate: float, seed: int
) -> None:
    federation, fleet = federate({"m": (m, n)}, max_rank=rank, seed=seed), federate.fleet([rank] * clients, seed=seed)
    state = federation.state(METHOD, server_learning_rate=rate)
    for _ in range(3):
        before = delta(METHOD.adapter(state)["m"])
        residual = federation.frozen(federation.assign(METHOD, state, fleet[0]), "m")
        expected = (1 - rate) * before + rate * (residual + federation.mean(METHOD, state, fleet, "m"))
        state = federation.round(METHOD, state, fleet)
        assert federate.close(delta(METHOD.adapter(state)["m"]), expected, relative=2e-6)


def test_clients_train_the_mean_beside_the_frozen_residual(federate: Any) -> None:
    federation, fleet = federate({"m": (30, 40)}, max_rank=2), federate.fleet([2, 2, 2], seed=0)
    state = federation.round(METHOD, federation.state(METHOD), fleet)
    plain = federation.round(fedit.METHOD, federation.state(fedit.METHOD), fleet)
    assignment = federation.assign(METHOD, state, fleet[0])
    for name, tensor in plain.tensors.items():
        np.testing.assert_array_equal(assignment.lora.blobs["local"][name], tensor)
    model = federation.frozen(assignment, "m") + delta(federation.start(assignment)["m"])
    assert federate.close(model, delta(METHOD.adapter(state)["m"]))


def test_equal_clients_leave_no_residual(federate: Any) -> None:
    federation = federate({"m": (30, 40)}, max_rank=2)
    update = federation.updates(METHOD, federation.state(METHOD), [("a", 2, 1.0, 3)])[0]
    twins = [update, replace(update, update=replace(update.update, client="b", num_examples=5))]
    state = METHOD.aggregate(federation.state(METHOD), twins)
    assert np.linalg.norm(state.residual["m.s"]) < 1e-7


def test_it_is_not_linear_and_wants_equal_ranks() -> None:
    assert not isinstance(METHOD, LinearMethod)
    assert METHOD.ranks == "equal"
