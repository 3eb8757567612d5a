from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.lora import lowrank
from fedtune.lora.adapter import delta
from fedtune.methods.flexlora import METHOD
from fedtune.methods.method import LinearMethod


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    ranks=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    rslora=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_sum_is_exact(federate: Any, m: int, n: int, ranks: list[int], rslora: bool, seed: int) -> None:
    federation = federate({"m": (m, n)}, max_rank=max(ranks), seed=seed)
    fleet, state = federate.fleet(ranks, seed=seed, rslora=rslora), federation.state(METHOD)
    for _ in range(2):
        expected = federation.mean(METHOD, state, fleet, "m")
        state = federation.round(METHOD, state, fleet)
        assert federate.close(delta(lowrank.unpack(state.total)["m"].factors), expected)


@pytest.mark.parametrize(("m", "n"), [(6, 5), (5, 6), (4, 4), (1, 9), (9, 1)])
def test_at_full_rank_a_client_restarts_from_the_whole_sum(federate: Any, m: int, n: int) -> None:
    # Public implementations lost a square root of S here, or transposed.
    rank = min(m, n)
    federation, fleet = federate({"m": (m, n)}, max_rank=rank), federate.fleet([rank] * 3, seed=0)
    state = federation.state(METHOD)
    expected = federation.mean(METHOD, state, fleet, "m")
    state = federation.round(METHOD, state, fleet)
    assert federate.close(delta(federation.start(federation.assign(METHOD, state, fleet[0]))["m"]), expected)


def test_a_client_restarts_from_the_best_of_its_rank(federate: Any) -> None:
    federation, fleet = federate({"m": (12, 9)}, max_rank=4), federate.fleet([4, 2], seed=0)
    state = federation.round(METHOD, federation.state(METHOD), fleet)
    u, s, vt = np.linalg.svd(delta(lowrank.unpack(state.total)["m"].factors))
    start = delta(federation.start(federation.assign(METHOD, state, fleet[1]))["m"])
    np.testing.assert_allclose(start, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-6)


def test_what_no_rank_holds_is_reported(federate: Any) -> None:
    federation, fleet = federate({"m": (12, 9)}, max_rank=4), federate.fleet([4, 4], seed=0)
    state = federation.round(METHOD, federation.state(METHOD), fleet)
    s = state.total["m.s"].astype(np.float64)
    assert METHOD.adapter(state)["m"].rank == 4 < len(s)
    assert METHOD.energy_kept(state)["m"] == pytest.approx(np.sum(s[:4] ** 2) / np.sum(s**2))


def test_a_server_learning_rate_of_a_half_goes_half_the_way(federate: Any) -> None:
    federation, fleet = federate({"m": (12, 9)}, max_rank=4), federate.fleet([4, 2], seed=0)
    state = federation.round(METHOD, federation.state(METHOD, server_learning_rate=0.5), fleet)
    old, mean = delta(lowrank.unpack(state.total)["m"].factors), federation.mean(METHOD, state, fleet, "m")
    after = federation.round(METHOD, state, fleet)
    assert federate.close(delta(lowrank.unpack(after.total)["m"].factors), (old + mean) / 2)


def test_it_is_not_linear() -> None:
    assert not isinstance(METHOD, LinearMethod)
