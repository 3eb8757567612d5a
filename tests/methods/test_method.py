from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.lora.adapter import delta
from fedtune.messages import (
    AdmittedUpdate,
    Blueprint,
    Plan,
    PlannedClient,
    Proximal,
    Training,
    TrainLora,
)
from fedtune.methods import METHODS
from fedtune.methods.method import LinearMethod, leading_ranks, resize, step
from fedtune.tensors import Array, digest, l2_norm


def f32(values: Any) -> Array:
    return np.array(values, np.float32)


EVERY = [name for name, method in sorted(METHODS.items()) if method.task is TrainLora]
"""All that train adapters."""
EXACT_FOR_EQUALS = sorted(set(EVERY) - {"hetlora"})


def arrays(state: Any) -> str:
    """The digest of all arrays of a state."""
    return digest({f"{field}/{k}": t for field in vars(state) for k, t in tensors(getattr(state, field)).items()})


def tensors(value: Any) -> dict[str, Any]:
    return {k: t for k, t in value.items() if isinstance(t, np.ndarray)} if isinstance(value, dict) else {}


def ranks_for(name: str, ranks: list[int]) -> list[int]:
    return [max(ranks)] * len(ranks) if METHODS[name].ranks == "equal" else ranks


def changed(update: AdmittedUpdate, **changes: Any) -> AdmittedUpdate:
    return replace(update, update=replace(update.update, **changes))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_table_names_each_method_and_its_settings(name: str) -> None:
    method = METHODS[name]
    assert method.name == name == method.settings().name
    assert is_dataclass(method.settings)
    assert isinstance(method, LinearMethod) == (name in {"fedit", "zeropad", "ffa"})
    assert "weights" in {field.name for field in fields(method.settings)}
    if method.task is TrainLora:
        assert {"server_learning_rate", "wire_dtype"} <= {field.name for field in fields(method.settings)}


def test_only_the_method_that_moves_all_weights_is_a_probe() -> None:
    assert set(METHODS) - set(EVERY) == {"fedkseed"}


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=8, deadline=None)
@given(ranks=st.lists(st.integers(1, 8), min_size=2, max_size=4), seed=st.integers(0, 2**31))
def test_the_order_of_answers_changes_no_bit(federate: Any, name: str, ranks: list[int], seed: int) -> None:
    method, fleet = METHODS[name], federate.fleet(ranks_for(name, ranks), seed=seed)
    federation = federate({"m": (9, 14), "k": (3, 4)}, max_rank=8 if method.ranks == "any" else max(ranks), seed=seed)
    state = federation.round(method, federation.state(method), fleet)
    updates = federation.updates(method, state, fleet)
    assert arrays(method.aggregate(state, updates)) == arrays(method.aggregate(state, updates[::-1]))


@pytest.mark.parametrize("name", EXACT_FOR_EQUALS)
@settings(max_examples=8, deadline=None)
@given(ranks=st.lists(st.integers(1, 8), min_size=1, max_size=3), seed=st.integers(0, 2**31))
def test_a_client_split_in_two_changes_nothing(federate: Any, name: str, ranks: list[int], seed: int) -> None:
    method, fleet = METHODS[name], federate.fleet(ranks_for(name, ranks), seed=seed)
    federation = federate({"m": (9, 14)}, max_rank=max(ranks), seed=seed)
    state = federation.state(method)
    asked = [federation.assign(method, state, member) for member in fleet]
    sizes = [examples for _, _, _, examples in fleet]
    answers = [federation.whole(a, federation.answer(a, examples=n)) for a, n in zip(asked, sizes, strict=True)]
    updates = [changed(update, num_examples=2 * update.num_examples) for update in answers]
    halves = [
        changed(u, client=f"{u.client}{half}", num_examples=u.num_examples // 2) for u in updates for half in "xy"
    ]
    whole, split = (delta(method.adapter(method.aggregate(state, us))["m"]) for us in (updates, halves))
    assert federate.close(split, whole, relative=2e-6)


@pytest.mark.parametrize("name", EVERY)
def test_one_client_alone_is_the_new_model(federate: Any, name: str) -> None:
    method, fleet = METHODS[name], [("only", 4, 1.5, 7)]
    federation = federate({"m": (9, 14)}, max_rank=4)
    state = federation.state(method)
    expected = federation.mean(method, state, fleet, "m")
    assert federate.close(delta(method.adapter(federation.round(method, state, fleet))["m"]), expected)


@pytest.mark.parametrize("name", EVERY)
def test_equal_clients_give_what_every_method_gives(federate: Any, name: str) -> None:
    method, federation = METHODS[name], federate({"m": (9, 14)}, max_rank=4)
    state = federation.state(method)
    asked = federation.assign(method, state, ("c", 4, 1.5, 7))
    update = federation.whole(asked, federation.answer(asked, examples=7))
    twins = [changed(update, client=client, num_examples=size) for client, size in [("a", 1), ("b", 5), ("c", 2)]]
    alone, together = (method.adapter(method.aggregate(state, updates))["m"] for updates in ([update], twins))
    assert federate.close(delta(together), delta(alone), relative=2e-6)


@pytest.mark.parametrize("name", EVERY)
def test_ranks_above_the_layers_size_and_odd_shapes_work(federate: Any, name: str) -> None:
    # Factors are told apart by name: here a and b often have the same shape, or rank equals a side.
    modules = {"square": (4, 4), "row": (1, 7), "column": (7, 1), "one": (1, 1), "model.layers.11.q": (4, 3)}
    method, federation = METHODS[name], federate(modules, max_rank=4)
    fleet = federate.fleet([4, 4, 4], seed=2)
    state = federation.state(method)
    for _ in range(2):
        state = federation.round(method, state, fleet)
    assert {module: factors.shape for module, factors in method.adapter(state).items()} == modules


@pytest.mark.parametrize("name", EVERY)
def test_nobody_learned_anything_is_a_change_of_zero(federate: Any, name: str) -> None:
    method, federation = METHODS[name], federate({"m": (9, 14)}, max_rank=4)
    fleet = federate.fleet([4, 4], seed=2)
    state = federation.round(method, federation.state(method), fleet, size=0.0)
    assert all(np.all(delta(factors) == 0) for factors in method.adapter(state).values())
    federation.round(method, state, fleet)  # and the next round can be told from there


@pytest.mark.parametrize("name", EVERY)
def test_modules_to_save_are_averaged_by_examples(federate: Any, name: str) -> None:
    method, federation = METHODS[name], federate({"m": (5, 4)}, max_rank=2, saved={"head": np.zeros(3, np.float32)})
    fleet = [("a", 2, 1.0, 1), ("b", 2, 1.0, 3)]
    state = federation.state(method, server_learning_rate=0.5)
    assignment = federation.assign(method, state, fleet[0])
    np.testing.assert_array_equal(assignment.lora.blobs["saved"]["head"], [0, 0, 0])
    np.testing.assert_array_equal(federation.round(method, state, fleet).saved["head"], [1.25, 1.25, 1.25])


@pytest.mark.parametrize("name", EVERY)
def test_rounds_are_counted_and_clients_get_their_own_key(federate: Any, name: str) -> None:
    method, federation = METHODS[name], federate({"m": (5, 4)}, max_rank=2)
    fleet = [("a", 2, 1.0, 1), ("b", 2, 1.0, 3)]
    state = federation.state(method)
    first = [federation.assign(method, state, member) for member in fleet]
    second = federation.assign(method, federation.round(method, state, fleet), fleet[0])
    assert [a.round for a in (*first, second)] == [1, 1, 2]
    assert len({a.seed for a in (*first, second)}) == 3
    assert {a.method for a in first} == {name}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("wire_dtype", ["bf16", "fp16"])
def test_factors_travel_in_the_wire_format_and_rest_in_float32(federate: Any, name: str, wire_dtype: str) -> None:
    method, federation = METHODS[name], federate({"m": (9, 14)}, max_rank=2)
    fleet, numpy_name = federate.fleet([2, 2], seed=0), {"bf16": "bfloat16", "fp16": "float16"}[wire_dtype]
    state = federation.round(method, federation.state(method, wire_dtype=wire_dtype), fleet)
    assignment = federation.assign(method, state, fleet[0])
    assert assignment.lora.wire_dtype == wire_dtype
    assert {t.dtype.name for blob in assignment.lora.blobs.values() for t in blob.values()} == {numpy_name}
    kept = [tensors(getattr(state, field.name)) for field in fields(state)]
    assert {tensor.dtype.name for part in kept for tensor in part.values()} == {"float32"}
    assert l2_norm({n: f.b for n, f in method.adapter(state).items()}) > 0


def test_clients_of_one_rank_are_sent_the_same_tensors() -> None:
    flat = {"m.a": np.arange(6, dtype=np.float32).reshape(3, 2), "m.b": np.ones((4, 3), np.float32)}
    leading = leading_ranks(flat, "fp32")
    assert leading(2) is leading(2)  # an encoder knows tensors that it has seen by their identity
    np.testing.assert_array_equal(leading(2)["m.a"], flat["m.a"][:2])
    assert {name: array.shape for name, array in leading(1).items()} == {"m.a": (1, 2), "m.b": (4, 1)}


def test_resize_pads_with_zeros_and_cuts() -> None:
    flat = {"m.a": np.ones((2, 3), np.float32), "m.b": np.ones((4, 2), np.float32)}
    wide, narrow = resize(flat, 3), resize(flat, 1)
    assert (wide["m.a"].shape, wide["m.b"].shape) == ((3, 3), (4, 3))
    assert (wide["m.a"].sum(), wide["m.b"].sum()) == (6, 8)
    assert (narrow["m.a"].shape, narrow["m.b"].shape) == ((1, 3), (4, 1))


def test_a_step_of_one_is_the_mean_to_the_last_bit() -> None:
    old, mean = {"x": f32([1e8])}, {"x": f32([0.1])}
    assert step(old, mean, 1.0)["x"] == mean["x"]
    assert step({"x": f32([2])}, {"x": f32([4])}, 0.5)["x"] == 3


@pytest.mark.parametrize("name", EVERY)
def test_the_proximal_term_of_a_recipe_is_the_last_of_the_objective(name: str) -> None:
    method, blueprint = METHODS[name], Blueprint({"m": (3, 4)}, saved={}, max_rank=2, seed=0)
    state = method.init(blueprint, method.settings())
    terms = {}
    for mu in (0.0, 0.1):
        training = Training(batch=1, learning_rate=1.0, steps=1, proximal=mu)
        terms[mu] = method.assign(state, 0, PlannedClient(Plan("ann", 2, 1.0, training))).lora.terms
    assert terms[0.1] == (*terms[0.0], Proximal(0.1))
