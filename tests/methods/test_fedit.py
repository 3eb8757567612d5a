from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedtune.errors import ShapeError
from fedtune.lora.adapter import Factors, delta, draw_a, pack
from fedtune.methods.fedit import METHOD
from fedtune.methods.method import LinearMethod
from fedtune.seeds import derive
from fedtune.tensors import Array


def f32(values: Any) -> Array:
    return np.array(values, np.float32)


def test_scalars_by_hand_show_the_cross_terms(federate: Any) -> None:
    federation = federate({"m": (1, 1)}, max_rank=1)
    pairs = [(1, 2), (3, 4)]  # (B, A); the exact mean is 7, FedIT's 2 * 3
    updates = [federate.update(f"c{b}", {"m": Factors(a=f32([[a]]), b=f32([[b]]))}, examples=1) for b, a in pairs]
    state = METHOD.aggregate(federation.state(METHOD), updates)
    assert delta(METHOD.adapter(state)["m"]) == 6


def test_every_client_counts_by_its_examples(federate: Any) -> None:
    # A public implementation kept client 0 alone, times p_0.
    federation, fleet = federate({"m": (5, 4), "k": (3, 7)}, max_rank=2), federate.fleet([2] * 10, seed=1)
    state = federation.state(METHOD)
    updates = federation.updates(METHOD, state, fleet)
    total = sum(update.num_examples for update in updates)
    after = METHOD.aggregate(state, updates)
    for name, tensor in after.tensors.items():
        parts = [(update.num_examples / total, update.lora.tensors[name].astype(np.float64)) for update in updates]
        plain = state.tensors[name] + sum(share * moved for share, moved in parts)
        np.testing.assert_allclose(tensor, plain, rtol=1e-6, atol=1e-9)


def test_uniform_weights_ignore_the_examples(federate: Any) -> None:
    federation = federate({"m": (1, 1)}, max_rank=1)
    updates = [federate.update(f"c{v}", {"m": Factors(a=f32([[1]]), b=f32([[v]]))}, examples=v) for v in (1, 9)]
    state = METHOD.aggregate(federation.state(METHOD, weights="uniform"), updates)
    assert state.tensors["m.b"] == 5


def test_a_server_learning_rate_of_a_half_goes_half_the_way(federate: Any) -> None:
    federation = federate({"m": (1, 1)}, max_rank=1, saved={"head": np.zeros(2, np.float32)})
    state = federation.state(METHOD, server_learning_rate=0.5)
    update = federation.updates(METHOD, state, [("c", 1, 1.0, 6)])[0]
    after = METHOD.aggregate(state, [update])
    np.testing.assert_allclose(after.tensors["m.a"], state.tensors["m.a"] + update.lora.tensors["m.a"] / 2, rtol=1e-6)
    np.testing.assert_array_equal(after.saved["head"], [3, 3])


def test_the_first_start_is_one_shared_a_and_a_zero_b(federate: Any) -> None:
    federation = federate({"m": (3, 5)}, max_rank=4, seed=9)
    assignment = federation.assign(METHOD, federation.state(METHOD), ("c", 4, 2.0, 1))
    shared = {"m": Factors(a=draw_a(derive(9, "lora.shared_a"), "m", 4, 5), b=np.zeros((3, 4), np.float32))}
    for name, tensor in pack(shared).items():
        np.testing.assert_array_equal(assignment.lora.blobs["local"][name], tensor)
    assert set(assignment.lora.blobs) == {"local"}


def test_factors_travel_in_the_wire_format_and_rest_in_float32(federate: Any) -> None:
    federation = federate({"m": (3, 5)}, max_rank=4)
    state = federation.state(METHOD, wire_dtype="bf16")
    assignment = federation.assign(METHOD, state, ("c", 4, 2.0, 1))
    assert {tensor.dtype.name for tensor in assignment.lora.blobs["local"].values()} == {"bfloat16"}
    after = METHOD.aggregate(state, [federation.answer(assignment)])
    assert {tensor.dtype.name for tensor in after.tensors.values()} == {"float32"}


def test_it_is_linear_and_wants_equal_ranks(federate: Any, two_ranks: Any) -> None:
    assert isinstance(METHOD, LinearMethod)
    assert METHOD.ranks == "equal"
    with pytest.raises(ShapeError, match="same names and shape"):
        METHOD.aggregate(federate({"m": (2, 3)}, max_rank=2).state(METHOD), two_ranks)
