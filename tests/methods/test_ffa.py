from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.lora.adapter import delta
from fedtune.methods.ffa import METHOD
from fedtune.methods.method import LinearMethod


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    ranks=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    rslora=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_mean_is_exact_for_mixed_ranks(
    federate: Any, m: int, n: int, ranks: list[int], rslora: bool, seed: int
) -> None:
    federation = federate({"m": (m, n)}, max_rank=max(ranks), seed=seed)
    fleet = federate.fleet(ranks, seed=seed, rslora=rslora)
    state = federation.state(METHOD)
    for _ in range(2):
        expected = federation.mean(METHOD, state, fleet, "m")
        state = federation.round(METHOD, state, fleet)
        assert federate.close(delta(METHOD.adapter(state)["m"]), expected)


def test_only_b_travels(federate: Any) -> None:
    federation = federate({"m": (6, 5)}, max_rank=4)
    state = federation.round(METHOD, federation.state(METHOD), federate.fleet([4, 2], seed=0))
    assignment = federation.assign(METHOD, state, ("c", 2, 1.0, 1))
    assert {name: t.shape for name, t in assignment.lora.blobs["local"].items()} == {"m.b": (6, 2)}
    assert assignment.lora.train == "b"
    assert federation.answer(assignment).lora.tensors.keys() == {"m.b"}


def test_a_is_the_same_in_every_round_and_a_slice_for_smaller_ranks(federate: Any) -> None:
    federation = federate({"m": (6, 5)}, max_rank=4)
    state = federation.state(METHOD)
    whole = METHOD.adapter(state)["m"].a
    after = federation.round(METHOD, state, federate.fleet([4, 2], seed=0))
    np.testing.assert_array_equal(METHOD.adapter(after)["m"].a, whole)
    np.testing.assert_array_equal(
        federation.start(federation.assign(METHOD, after, ("c", 2, 1.0, 1)))["m"].a, whole[:2]
    )


def test_it_is_linear() -> None:
    assert isinstance(METHOD, LinearMethod)
