from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.lora.adapter import delta
from fedtune.methods import fedit
from fedtune.methods.method import LinearMethod
from fedtune.methods.zeropad import METHOD


def test_two_ranks_by_hand(federate: Any, two_ranks: Any) -> None:
    state = METHOD.aggregate(federate({"m": (2, 3)}, max_rank=2).state(METHOD), two_ranks)
    expected = [[0.21875, 1.3125, -0.21875], [0.8125, 2.0625, 0.3125]]
    np.testing.assert_allclose(delta(METHOD.adapter(state)["m"]), expected, rtol=1e-6)


def test_one_client_keeps_its_scale(federate: Any, two_ranks: Any) -> None:
    # A public implementation multiplied the scale by max_rank / rank here.
    state = METHOD.aggregate(federate({"m": (2, 3)}, max_rank=8).state(METHOD), two_ranks[:1])
    np.testing.assert_allclose(delta(METHOD.adapter(state)["m"]), [[2, 0, -2], [4, 0, -4]], rtol=1e-6)


def test_a_client_is_sent_the_first_rows_and_columns(federate: Any) -> None:
    federation = federate({"m": (6, 5)}, max_rank=8)
    state = federation.round(METHOD, federation.state(METHOD), federate.fleet([8, 4], seed=0))
    local = federation.assign(METHOD, state, ("c", 3, 1.0, 1)).lora.blobs["local"]
    np.testing.assert_array_equal(local["m.a"], state.tensors["m.a"][:3])
    np.testing.assert_array_equal(local["m.b"], state.tensors["m.b"][:, :3])


def test_part_of_a_fleet_of_mixed_ranks_aggregates(federate: Any) -> None:
    # A public implementation fixed the stacked rank at rank * clients.
    federation = federate({"m": (70, 80)}, max_rank=64)
    state = federation.round(METHOD, federation.state(METHOD), federate.fleet([64, 8, 4], seed=0))
    assert state.tensors["m.a"].shape == (64, 80)


@settings(max_examples=20, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 40), rank=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_at_one_rank_it_is_fedit(federate: Any, m: int, n: int, rank: int, seed: int) -> None:
    federation, fleet = federate({"m": (m, n)}, max_rank=rank, seed=seed), federate.fleet([rank] * 3, seed=seed)
    padded, plain = (
        federation.round(method, federation.state(method), fleet).tensors for method in (METHOD, fedit.METHOD)
    )
    for name in plain:
        np.testing.assert_array_equal(padded[name], plain[name])


def test_it_is_linear_and_takes_any_rank() -> None:
    assert isinstance(METHOD, LinearMethod)
    assert METHOD.ranks == "any"
