from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from fedtune.errors import NotFiniteError, StoreError
from fedtune.messages import TrainLora
from fedtune.methods import METHODS, serialization
from fedtune.methods.serialization import NOT_PERSISTED, OMIT_EMPTY, decode, digest, encode
from fedtune.tensors import Array, Tensors


@dataclass(frozen=True)
class Toy:
    settings: str = field(metadata=NOT_PERSISTED)
    round: int
    tensors: Tensors
    saved: Tensors = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    note: str | None = None


TOY = Toy(
    settings="mine",
    round=3,
    tensors={"x.b": np.ones((2, 1), np.float32), "x.a": np.arange(3, dtype=np.float32).reshape(1, 3)},
    ranks={"ann": 2, "bob": 4},
)


def joined(state: Any) -> bytes:
    return b"".join(encode(state))


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal to the last bit, whatever their settings."""
    for each in fields(one):
        a, b = getattr(one, each.name), getattr(other, each.name)
        if isinstance(a, Mapping) and any(isinstance(part, np.ndarray) for part in a.values()):
            if a.keys() != b.keys() or any(not identical(a[name], b[name]) for name in a):
                return False
        elif a != b:
            return False
    return True


def identical(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", [name for name, method in sorted(METHODS.items()) if method.task is TrainLora])
def test_the_state_of_every_method_with_adapters_comes_back_to_the_last_bit(name: str, federate: Any) -> None:
    method = METHODS[name]
    ranks = [1, 2, 2] if method.ranks == "any" else [2, 2, 2]
    saved = {"head": np.zeros((2, 3), np.float32), "scale": np.zeros((), np.float32)}
    federation = federate({"x": (5, 4), "y": (3, 6)}, max_rank=2, saved=saved)
    first = state = federation.state(method)
    for _ in range(3):
        kept = decode(joined(state), first)
        assert same(kept, state)
        assert digest(encode(kept)) == digest(encode(state))
        again = federation.round(method, kept, federate.fleet(ranks, seed=0))
        state = federation.round(method, state, federate.fleet(ranks, seed=0))
        assert same(again, state)


def test_the_form_is_safetensors_with_the_other_fields_in_the_metadata() -> None:
    data = joined(TOY)
    tensors = load(data)
    assert sorted(tensors) == ["tensors/x.a", "tensors/x.b"]
    assert identical(tensors["tensors/x.a"], TOY.tensors["x.a"])
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    kept = json.loads(header["__metadata__"]["fedtune"])
    assert kept == {
        "version": 1,
        "values": {"round": 3, "tensors": None, "saved": {}, "ranks": {"ann": 2, "bob": 4}, "note": None},
    }


def test_one_state_has_one_form_whatever_the_order_and_the_layout_of_its_tensors() -> None:
    b = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    one = replace(TOY, tensors={"a": np.zeros(1, np.float32), "b": b})
    other = replace(TOY, tensors={"b": np.ascontiguousarray(b), "a": np.zeros(1, np.float32)}, settings="other")
    assert joined(one) == joined(other)
    assert joined(replace(one, round=4)) != joined(one)


def test_the_digest_is_that_of_the_joined_parts() -> None:
    assert digest(encode(TOY)) == hashlib.sha256(joined(TOY)).hexdigest()


def test_settings_are_those_of_the_state_that_it_is_read_like() -> None:
    assert decode(joined(TOY), replace(TOY, settings="other")).settings == "other"


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<i4", "<i8", "<u4", "<u8", "u1"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 3)])
def test_every_kind_and_shape_of_tensor_comes_back(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.full(shape, 7, np.dtype(dtype))
    kept = decode(joined(replace(TOY, tensors={"x": array})), TOY)
    assert identical(kept.tensors["x"], array)


def test_tensors_are_aligned_whatever_lies_beside_them() -> None:
    tensors: Tensors = {"a": np.ones(3, np.uint8), "b": np.ones(3, np.float32), "c": np.ones(1, np.float64)}
    kept = decode(joined(replace(TOY, tensors=tensors)), TOY)
    assert all(array.flags.aligned for array in kept.tensors.values())
    assert all(identical(kept.tensors[name], tensors[name]) for name in tensors)


def test_nothing_can_be_written_into_a_state_that_was_read() -> None:
    kept = decode(memoryview(bytearray(joined(TOY))), TOY)
    with pytest.raises(ValueError, match="read-only"):
        kept.tensors["x.a"][0, 0] = 1


def test_nothing_is_copied_to_encode() -> None:
    parts = encode(TOY)
    assert np.shares_memory(np.frombuffer(parts[1], np.uint8), TOY.tensors["x.a"])


@pytest.mark.parametrize("dtype", [np.float16, np.complex64, ">f4"])
def test_numbers_without_a_name_are_refused(dtype: Any) -> None:
    with pytest.raises(StoreError, match=r"tensors/x: expected a tensor of F32, .*; cast it"):
        encode(replace(TOY, tensors={"x": np.zeros(2, dtype)}))


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_state_that_is_not_finite_has_no_encoded_form_and_the_tensor_is_named(dtype: Any, bad: float) -> None:
    state = replace(TOY, tensors={"x.a": np.ones(3, dtype), "x.b": np.array([[1, bad], [bad, 2]], dtype)})
    with pytest.raises(NotFiniteError, match=r"tensors/x\.b: expected finite numbers; got 2 of 4 that are not"):
        encode(state)


def test_the_largest_numbers_are_finite() -> None:
    for dtype in (np.float32, np.float64):
        encode(replace(TOY, tensors={"x": np.full(1000, np.finfo(dtype).max, dtype)}))


def test_the_encoded_form_of_earlier_releases_says_which_tensor_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialization, "count_not_finite", lambda tensor: 0)
    data = joined(replace(TOY, tensors={"x.a": np.array([1, np.nan], np.float32)}))
    monkeypatch.undo()
    assert serialization.why_not_finite(data) == "tensors/x.a with 1 of 2 that are not"
    assert serialization.why_not_finite(joined(TOY)) == ""


def test_none_and_nothing_are_told_apart() -> None:
    kept = decode(joined(TOY), replace(TOY, note="x", saved={"y": np.zeros(1)}))
    assert kept.note is None
    assert kept.saved == {}


def test_every_shortened_state_is_refused() -> None:
    data = joined(TOY)
    for length in range(len(data)):
        with pytest.raises(StoreError, match="expected the state of a method"):
            decode(data[:length], TOY)
    with pytest.raises(StoreError, match="expected the state of a method"):
        decode(data + b"\0", TOY)


def test_no_damage_raises_anything_but_a_store_error() -> None:
    rng, data = random.Random(0), joined(TOY)
    for _ in range(2000):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        try:
            decode(bytes(changed), TOY)
        except StoreError:
            continue


def test_the_state_of_another_method_says_so() -> None:
    @dataclass(frozen=True)
    class Other:
        round: int
        total: Tensors

    with pytest.raises(
        StoreError, match=r"expected a state of version 1 with \['round', 'total'\]; got version 1 with .*'ranks'"
    ):
        decode(joined(TOY), Other(0, {}))


@dataclass(frozen=True)
class Grown:
    round: int
    new: Tensors = field(default_factory=dict, metadata=OMIT_EMPTY)


def test_a_field_that_a_release_added_is_not_written_while_it_is_empty() -> None:
    @dataclass(frozen=True)
    class Before:
        round: int

    assert digest(encode(Grown(3))) == digest(encode(Before(3)))
    filled = Grown(3, {"x": np.ones(2, np.float32)})
    for state in (Grown(3), filled):
        for like in (Grown(0), Grown(0, {"y": np.zeros(1, np.float32)})):
            again = decode(b"".join(encode(state)), like)
            assert (again.round, again.new.keys()) == (3, state.new.keys())
    with pytest.raises(StoreError, match="resume with the fedtune and the method that wrote it"):
        decode(b"".join(encode(filled)), Before(0))
