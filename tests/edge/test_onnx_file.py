"""A graph that reaches outside of its bundle, or computes by other operators than ours, is never opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fedtune.edge.onnx_file import OPERATORS, ROUNDING, check_graph
from fedtune.errors import ConfigError, FedtuneError, StoreError

WEIGHTS, SIZE = "weights.safetensors", 4096


def tensor(location: str = WEIGHTS, offset: str = "64", length: str = "24", **more: str) -> TensorProto:
    """Return weights (2, 3) in float32 that lie in another file."""
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 3], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": offset, "length": length, **more}.items():
        weights.external_data.add(key=key, value=value)
    return weights


def graph(*weights: TensorProto, nodes: Any = None) -> Any:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])] if nodes is None else nodes
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, initializer=list(weights)))


def check(model: Any) -> None:
    check_graph(model.SerializeToString(), "graph.onnx", weights=WEIGHTS, size=SIZE)


def test_a_graph_of_known_operators_over_its_own_weights_passes() -> None:
    check(graph(tensor()))
    check(graph(tensor(offset=str(SIZE - 24))))
    check(graph(helper.make_tensor("w", TensorProto.FLOAT, [2, 3], [0.0] * 6)))


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize(
    "location",
    ["../weights.safetensors", "/etc/passwd", "other.bin", "", "./weights.safetensors", "a/../weights.safetensors",
     "weights.safetensors\x00.bin", "*/_ORT_MEM_ADDR_/*"],
)  # fmt: skip
def test_weights_outside_of_the_bundles_own_file_are_refused(location: str) -> None:
    with pytest.raises(StoreError, match="weights of w in another file"):
        check(graph(tensor(location)))
    # As a constant of a node, which another reader may look at and this one must too.
    node = helper.make_node("Identity", ["x"], ["y"], value=tensor(location))
    with pytest.raises(StoreError, match="weights of w in another file"):
        check(graph(nodes=[node]))


@pytest.mark.parametrize(
    "place",
    [
        {"offset": "4096"}, {"offset": str(SIZE - 23)}, {"length": "28"}, {"length": "23"}, {"offset": "-8"},
        {"length": "24 "}, {"offset": "1e3"}, {"length": ""}, {"offset": "9" * 30}, {"offset": "٣"}, {"checksum": "0"},
    ],
)  # fmt: skip
def test_places_beyond_the_file_are_refused(place: dict[str, str]) -> None:
    with pytest.raises(StoreError, match="expected a graph that fedtune wrote"):
        check(graph(tensor(**place)))


def test_a_place_that_is_stated_twice_or_not_at_all_is_refused() -> None:
    twice = tensor()
    twice.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(StoreError, match="an unclear place of w"):
        check(graph(twice))
    nowhere = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 3], data_location=TensorProto.EXTERNAL)
    with pytest.raises(StoreError, match="in another file, ''"):
        check(graph(nowhere))


@pytest.mark.parametrize("operator", sorted(ROUNDING))
def test_operators_that_round_activations_are_refused_by_name(operator: str) -> None:
    with pytest.raises(ConfigError, match=f"got {operator}, which rounds activations; .*rounds weights alone"):
        check(graph(tensor(), nodes=[helper.make_node(operator, ["x"], ["y"], domain="com.microsoft")]))


@pytest.mark.parametrize(("operator", "domain"), [("Loop", ""), ("MyOp", "evil.example"), ("Gemm", "com.microsoft")])
def test_other_operators_are_refused_by_name(operator: str, domain: str) -> None:
    with pytest.raises(ConfigError, match=f"expected operators of this program .* got .*{operator}"):
        check(graph(nodes=[helper.make_node(operator, ["x"], ["y"], domain=domain)]))
    assert not ROUNDING & OPERATORS


def add_function(model: Any) -> None:
    nodes = [helper.make_node("Neg", ["a"], ["b"])]
    model.functions.append(helper.make_function("own", "Add", ["a"], ["b"], nodes, [helper.make_opsetid("", 23)]))


def add_branch(model: Any) -> None:
    inner = helper.make_graph([], "inner", [], [])
    model.graph.node[0].attribute.append(helper.make_attribute("body", inner))


def add_sparse(model: Any) -> None:
    model.graph.sparse_initializer.add()


def add_training(model: Any) -> None:
    model.training_info.add()


@pytest.mark.parametrize("add", [add_function, add_branch, add_sparse, add_training])
def test_parts_that_our_graphs_lack_are_refused(add: Callable[[Any], None]) -> None:
    model = graph(tensor())
    add(model)
    with pytest.raises(StoreError, match="expected a graph that fedtune wrote"):
        check(model)


def test_a_graph_that_ends_early_is_refused() -> None:
    data = graph(tensor()).SerializeToString()
    begin = data.index(b"weights.safetensors")
    for end in range(begin - 30, begin + 30):
        with pytest.raises(StoreError, match="expected a graph that fedtune wrote"):
            check_graph(data[:end], "graph.onnx", weights=WEIGHTS, size=SIZE)


@given(st.binary(max_size=60), st.integers(0, 200))
def test_bytes_of_any_kind_end_in_our_own_error(noise: bytes, place: int) -> None:
    data = bytearray(graph(tensor()).SerializeToString())
    data[place : place + len(noise)] = noise
    try:
        check_graph(bytes(data), "graph.onnx", weights=WEIGHTS, size=SIZE)
    except FedtuneError:
        return
    # What passes reads no other file, in the eyes of the reference as well.
    try:
        model = onnx.ModelProto.FromString(bytes(data))
    except DecodeError:
        return
    for weights in model.graph.initializer:
        assert {entry.value for entry in weights.external_data if entry.key == "location"} <= {WEIGHTS}
