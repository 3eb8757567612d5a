from __future__ import annotations

import hashlib

import numpy as np
import pytest

from fedtune.directions.manifest import Entry, Manifest, describe
from fedtune.errors import ConfigError
from fedtune.tensors import DTYPES, Array
from tests.directions.vectors import small_w0

TINY = {"b.weight": small_w0((4, 6)), "a.bias": small_w0((5,))}


def test_the_tiny_manifest_has_the_expected_digest() -> None:
    manifest = describe(TINY)
    assert len(manifest.encode()) == 123
    assert manifest.digest.hex() == "1fe13af778e030d751a0368e0ebc743550afbd26c3eb22619fd4555b95888d33"


def test_ordinals_follow_the_bytes_of_the_names_whatever_the_order_given() -> None:
    names = ["layers.2.w", "layers.10.w", "Z", "é", "z", "a"]
    manifest = describe({name: np.zeros(2, np.float32) for name in names})
    assert manifest.ordinals == {"Z": 0, "a": 1, "layers.10.w": 2, "layers.2.w": 3, "z": 4, "é": 5}


def test_the_digest_knows_every_name_format_shape_and_bit() -> None:
    base = np.array([[1.0, -0.0]], np.float32)
    tensors: list[dict[str, Array]] = [
        {"w": base},
        {"v": base},
        {"w": base.T},
        {"w": base.astype(np.float16)},
        {"w": base.astype(DTYPES["bf16"])},
        {"w": np.abs(base)},
        {"w": base, "x": base},
    ]
    assert len({describe(each).digest for each in tensors}) == len(tensors)


def test_an_entry_holds_the_digest_of_the_tensors_bytes_in_row_major_order() -> None:
    turned = np.asfortranarray(small_w0((4, 6)))
    assert describe({"w": turned}).entries[0].digest == hashlib.sha256(small_w0((4, 6)).tobytes()).digest()
    assert describe({"w": turned}).entries[0].num_parameters == 24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_base_that_is_not_finite_is_refused_by_name(dtype: str, bad: float) -> None:
    tensors = {"good": np.ones(3, DTYPES[dtype]), "bad": np.array([1, bad], np.float32).astype(DTYPES[dtype])}
    with pytest.raises(ConfigError, match=r"^bad: expected finite weights; got NaN or infinity"):
        describe(tensors)


def test_the_largest_and_smallest_numbers_are_finite() -> None:
    info = np.finfo(np.float16)
    describe({"w": np.array([info.max, info.min, info.smallest_subnormal, -0.0], np.float16)})


def test_all_faults_of_a_base_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        describe({"a": np.zeros(2), "b": np.zeros(2, np.float32), "c": np.zeros(2, np.int8)})
    assert [fault.path for fault in caught.value.faults] == ["a", "c"]


@pytest.mark.parametrize("names", [("b", "a"), ("a", "a")])
def test_a_manifest_out_of_order_cannot_be_made(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="sorted by name"):
        Manifest(tuple(Entry(name, "fp32", (2,), bytes(32)) for name in names))
