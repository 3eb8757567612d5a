"""Which ONNX files a device runs: graphs of known operators alone, whose weights lie in the bundle's own file.

The check reads the wire format of protobuf itself: the package `onnx` has no place on a device, and what a file asks
for must be known before a runtime opens it. Field numbers are those of onnx.proto (github.com/onnx/onnx).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from fedtune.edge.bundle import AGAIN
from fedtune.errors import ConfigError, Fault, StoreError

OPERATORS = frozenset(
    {
        *("Add", "Cast", "Concat", "Cos", "Gather", "GatherElements", "Gelu", "Gemm", "Greater", "Identity"),
        *("LayerNormalization", "LogSoftmax", "MatMul", "Mul", "Neg", "RMSNormalization", "Range", "Relu", "Reshape"),
        *("Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"),
    }
)
"""Of the standard: no operator of a library's own, no loop, no branch, and none that rounds what a layer reads."""
ROUNDING = frozenset(
    {
        *("DynamicQuantizeLinear", "QuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"),
        *("DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QGemm", "MatMulIntegerToFloat", "MatMulNBits"),
    }
)
"""Operators that round activations: a step's two losses would differ by the rounding, and not by the step."""
SIZES: Mapping[int, int] = {1: 4, 3: 1, 6: 4, 7: 8}
"""Bytes of a number by kind of tensor: float32, int8, int32, int64."""

Value = int | bytes
Message = Mapping[int, list[Value]]


def check_graph(data: bytes, name: str, *, weights: str, size: int) -> None:
    """Check that a file is a graph of known operators, and reads at most one other file, within its size.

    Args:
        data: the bytes of the file.
        name: of the file, for errors.
        weights: name of the file of weights, the only one that tensors may lie in.
        size: of that file in bytes.

    Raises:
        StoreError: if it is no such file, or reads another one.
        ConfigError: naming an operator that this program does not run.
    """
    try:
        model = fields(data)
        if model.get(25) or model.get(20):
            raise ValueError("functions or training steps of its own")
        graphs = messages(model, 7)
        if not graphs:
            raise ValueError("no graph")
        for graph in graphs:
            check_parts(graph, name, weights, size)
    # UnicodeDecodeError is a ValueError; an IndexError is a message that ends within a number.
    except (ValueError, IndexError, TypeError) as error:
        raise StoreError(f"{name}: expected a graph that fedtune wrote; got {str(error)[:120]}; {AGAIN}") from error


def check_parts(graph: Message, name: str, weights: str, size: int) -> None:
    for node in messages(graph, 1):
        operator, domain = text(node, 4), text(node, 7)
        if operator in ROUNDING:
            expected, got = f"a graph that computes in float32, in {name}", f"{operator}, which rounds activations"
            hint = "export the base again; dtype = int8 rounds weights alone"
            raise ConfigError(Fault("model.base", expected, got, hint))
        if operator not in OPERATORS or domain not in ("", "ai.onnx"):
            expected, got = f"operators of this program alone in {name}", f"{domain}:{operator}".lstrip(":")
            raise ConfigError(Fault("model.base", expected, got[:80], "update this program, or export the base again"))
        for attribute in messages(node, 5):
            if attribute.get(6) or attribute.get(11):
                raise ValueError(f"a graph within {operator}")
            for tensor in [*messages(attribute, 5), *messages(attribute, 10)]:
                check_tensor(tensor, weights, size)
    if graph.get(15):
        raise ValueError("sparse weights")
    for tensor in messages(graph, 5):
        check_tensor(tensor, weights, size)


def check_tensor(tensor: Message, weights: str, size: int) -> None:
    """Check that a tensor lies in its own file, or where the file of weights has as many bytes as it takes.

    Raises:
        ValueError: saying why not.
    """
    places = messages(tensor, 13)
    if not places and not any(tensor.get(14, [])):
        return
    name, place = text(tensor, 8)[:60], {text(entry, 1): text(entry, 2) for entry in places}
    if len(place) != len(places) or set(place) - {"location", "offset", "length"}:
        raise ValueError(f"an unclear place of {name}")
    if place.get("location") != weights:
        raise ValueError(f"weights of {name} in another file, {place.get('location', '')[:60]!r}")
    begin, length = decimal(place.get("offset", "0")), decimal(place.get("length", ""))
    kind = numbers(tensor, 2)[-1:]
    expected = prod(numbers(tensor, 1)) * SIZES.get(kind[0] if kind else 0, 0)
    if length != expected or begin + length > size:
        raise ValueError(f"weights of {name} beyond the file of {size} bytes, or of another size")


def decimal(digits: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise ValueError(f"no number of bytes, {digits[:20]!r}")
    return int(digits)


def fields(data: bytes) -> Message:
    """Return the fields of a protobuf message by number, all values of each in their order.

    Raises:
        ValueError: if the bytes are none.
    """
    by_number: dict[int, list[Value]] = {}
    for number, value in pairs(memoryview(data)):
        by_number.setdefault(number, []).append(value)
    return by_number


def pairs(data: memoryview) -> Iterator[tuple[int, Value]]:
    place = 0
    while place < len(data):
        tag, place = varint(data, place)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, place = varint(data, place)
            yield number, value
            continue
        length = 8
        if kind == 2:
            length, place = varint(data, place)
        elif kind == 5:
            length = 4
        elif kind != 1:
            raise ValueError("groups, which no such file has")
        if number == 0 or place + length > len(data):
            raise ValueError("the start of a message alone")
        yield number, bytes(data[place : place + length])
        place += length


def varint(data: memoryview, place: int) -> tuple[int, int]:
    """Return an integer and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        value, place = value | (byte & 127) << shift, place + 1
        if byte < 128:
            return value & (2**64 - 1), place
    raise ValueError("an integer of more than 64 bits")


def messages(message: Message, number: int) -> list[Message]:
    values = message.get(number, [])
    if not all(isinstance(value, bytes) for value in values):
        raise ValueError(f"a number as field {number}")
    return [fields(value) for value in values if isinstance(value, bytes)]


def numbers(message: Message, number: int) -> list[int]:
    """Return repeated integers, packed or not."""
    result: list[int] = []
    for value in message.get(number, []):
        if isinstance(value, int):
            result.append(value)
            continue
        place, view = 0, memoryview(value)
        while place < len(view):
            integer, place = varint(view, place)
            result.append(integer)
    return result


def text(message: Message, number: int) -> str:
    """Return a text; of several values the last, as protobuf does."""
    value = message.get(number, [b""])[-1]
    if not isinstance(value, bytes):
        raise ValueError(f"a number as field {number}")
    return value.decode()
