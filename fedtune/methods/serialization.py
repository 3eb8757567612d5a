"""A method's state as bytes and back, in one canonical form: the digest of a run's result is taken over it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np

from fedtune.errors import NotFiniteError, StoreError
from fedtune.tensors import Array, count_not_finite

State = TypeVar("State")

VERSION = 1
NOT_PERSISTED: Mapping[str, bool] = {"persisted": False}
"""Metadata of a state's field that is not written: recipe and base give it again."""
OMIT_EMPTY: Mapping[str, bool] = {"omit_empty": True}
"""Metadata of a state's field that a release added: while it is empty it is not written, so that digests stay."""
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "U8": np.dtype("u1"),
}
"""Number formats of a state's tensors, by the name that safetensors gives them."""
NAMES: Mapping[np.dtype[Any], str] = {dtype: name for name, dtype in DTYPES.items()}


def encode(state: Any) -> Sequence[bytes | memoryview]:
    """Return a state in parts that together are a safetensors file; fields marked `NOT_PERSISTED` are left out.

    Each tensor is named `<field>/<name>`; fields that hold no tensors are JSON in the metadata. The fields of a state
    within a state are named `<field>.<inner field>`. The parts are views of the state's own arrays: nothing is copied.

    Raises:
        StoreError: if a tensor's numbers have no name in `DTYPES`.
        NotFiniteError: if a number is infinite or NaN. Whatever is stored has passed here, so no run can be left with
            such a state.
    """
    values: dict[str, Any] = {}
    tensors: dict[str, Array] = {}
    for path, value in persisted_fields(state):
        if holds_tensors(value):
            tensors |= {f"{path}/{name}": array for name, array in value.items()}
        values[path] = None if holds_tensors(value) else value
    header: dict[str, Any] = {"__metadata__": {"fedtune": canonical({"values": values, "version": VERSION})}}
    body, offset = [], 0
    # Wide numbers first, as safetensors orders them: every tensor is aligned in the file, whatever the others' sizes.
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        array = tensors[name]
        if array.dtype not in NAMES:
            raise StoreError(f"{name}: expected a tensor of {', '.join(DTYPES)}; got {array.dtype}; cast it")
        if bad := count_not_finite(array):
            raise NotFiniteError(f"{name}: expected finite numbers; got {bad} of {array.size} that are not")
        ends = [offset, offset + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": ends}
        body.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        offset = ends[1]
    front = canonical(header).encode()
    # Tensors begin at a multiple of 8, as safetensors writes them.
    front += b" " * (-len(front) % 8)
    return [len(front).to_bytes(8, "little") + front, *body]


def decode(data: bytes | memoryview, like: State) -> State:
    """Return the state that was encoded; `like` gives the names and types of its fields, and those not persisted.

    Its tensors are read-only views of `data`.

    Raises:
        StoreError: if the bytes are not such a state, or that of another method.
    """
    version, values, tensors = _parse(data)
    expected = {path for path, _ in persisted_fields(like)}
    # What is empty in one of the two only may still be written.
    differing = values.keys() ^ expected
    if version != VERSION or differing - optional_fields(like):
        raise StoreError(
            f"expected a state of version {VERSION} with {sorted(expected)}; got version {version} with "
            f"{sorted(values)}; resume with the fedtune and the method that wrote it"
        )
    for path in [path for path, value in values.items() if value is None]:
        own = {key.removeprefix(f"{path}/"): array for key, array in tensors.items() if key.startswith(f"{path}/")}
        # A field without tensors is none: an empty mapping travels as one.
        values[path] = own or None
    # What was empty when it was written is empty, whatever `like` has there.
    empty: Mapping[str, Any] = {path: {} for path in differing & expected}
    return with_values(like, {**values, **empty})


def why_not_finite(data: bytes | memoryview) -> str:
    """Return which tensor of an encoded state is not finite, as releases before 0.3.0 stored them; empty for none.

    Raises:
        StoreError: if the bytes are no state.
    """
    for name, array in _parse(data)[2].items():
        if bad := count_not_finite(array):
            return f"{name} with {bad} of {array.size} that are not"
    return ""


def persisted_fields(state: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and value of every field that is written, those of a state within the state after its own name."""
    for field in fields(state):
        value = getattr(state, field.name)
        if not field.metadata.get("persisted", True):
            continue
        if field.metadata.get("omit_empty") and not value:
            continue
        if is_dataclass(value):
            yield from persisted_fields(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def optional_fields(state: Any, prefix: str = "") -> set[str]:
    """Return the paths of the fields that are not written while they are empty."""
    paths = {f"{prefix}{field.name}" for field in fields(state) if field.metadata.get("omit_empty")}
    for field in fields(state):
        if is_dataclass(value := getattr(state, field.name)):
            paths |= optional_fields(value, f"{prefix}{field.name}.")
    return paths


def with_values(state: State, values: Mapping[str, Any]) -> State:
    """Return a state with other values in its persisted fields, given by their paths."""
    own = {path: value for path, value in values.items() if "." not in path}
    for field in {path.partition(".")[0] for path in values if "." in path}:
        inner = {path.removeprefix(f"{field}."): v for path, v in values.items() if path.startswith(f"{field}.")}
        own[field] = with_values(getattr(state, field), inner)
    return replace(state, **own)  # type: ignore[type-var]


def digest(parts: Sequence[bytes | memoryview]) -> str:
    """Return the SHA-256 (hex) of an encoded state."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def holds_tensors(value: Any) -> bool:
    """Return whether a value is a mapping to arrays; an empty mapping is not, and travels as JSON."""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(part, np.ndarray) for part in value.values())


def canonical(value: Any) -> str:
    # Not NaN: it is no JSON, and other readers refuse it.
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)


def _parse(data: bytes | memoryview) -> tuple[int, dict[str, Any], Mapping[str, Array]]:
    """Return version, values by path (None where tensors are) and tensors by name of an encoded state."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8 : 8 + length]).decode("ascii"))
        metadata = json.loads(header.pop("__metadata__")["fedtune"])
        version, values = metadata["version"], dict(metadata["values"])
        body = memoryview(data).toreadonly()[8 + length :]
        tensors = {name: _array(spec, body) for name, spec in header.items()}
        # Bytes of no tensor would let two files with different digests be one state.
        if sum(array.nbytes for array in tensors.values()) != len(body):
            raise ValueError(f"{len(body)} bytes of tensors")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"expected the state of a method; got {len(data)} bytes that are none ({error})") from error
    return version, values, tensors


def _array(spec: Mapping[str, Any], body: memoryview) -> Array:
    dtype, shape = DTYPES[spec["dtype"]], tuple(spec["shape"])
    start, end = spec["data_offsets"]
    if not 0 <= start <= end <= len(body) or math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError(f"a tensor of shape {shape} at {start}..{end} of {len(body)} bytes")
    return np.frombuffer(body[start:end], dtype).reshape(shape)
