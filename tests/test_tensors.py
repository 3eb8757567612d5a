from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import ShapeError
from fedtune.tensors import Array, cast, digest, l2_norm, num_bytes, weighted_mean


def f32(values: Any) -> Array:
    return np.array(values, np.float32)


def test_the_weighted_mean_by_hand() -> None:
    mean = weighted_mean([({"x": f32([1, 2])}, 1), ({"x": f32([5, 6])}, 3)])
    np.testing.assert_array_equal(mean["x"], f32([4, 5]))
    assert mean["x"].dtype == np.float32


def test_small_contributions_are_not_lost_beside_a_large_one() -> None:
    # In float32 each of the thousand ones would vanish beside 2**25.
    parts = [({"x": f32([2**25])}, 1.0), *([({"x": f32([1])}, 1.0)] * 1000)]
    np.testing.assert_array_equal(weighted_mean(parts)["x"] * 1001, f32([2**25 + 1000]))


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=6))
def test_the_mean_lies_between_its_parts(values: list[float]) -> None:
    mean = float(weighted_mean([({"x": f32([v])}, 1 + i) for i, v in enumerate(values)])["x"][0])
    assert min(values) - 1e-3 <= mean <= max(values) + 1e-3


@pytest.mark.parametrize("other", [{"y": np.zeros(2)}, {"x": np.zeros(1)}, {"x": np.zeros(2), "y": np.zeros(2)}])
def test_disagreeing_parts_are_refused(other: dict[str, Array]) -> None:
    with pytest.raises(ShapeError, match="x: expected the same names"):
        weighted_mean([({"x": np.zeros(2)}, 1), (other, 1)])


def test_casts_name_wire_formats_and_copy_only_where_needed() -> None:
    tensors = {"x": f32([1 + 2**-10])}
    assert cast(tensors, "fp32")["x"] is tensors["x"]
    assert cast(tensors, "bf16")["x"].dtype == ml_dtypes.bfloat16
    assert float(cast(tensors, "bf16")["x"][0]) == 1
    assert float(cast(tensors, "fp16")["x"][0]) == 1 + 2**-10


def test_norm_and_bytes_by_hand() -> None:
    tensors = {"x": f32([3]), "y": f32([[4, 0]])}
    assert l2_norm(tensors) == 5
    assert num_bytes(tensors) == 12
    assert num_bytes(cast(tensors, "bf16")) == 6
    assert l2_norm({"x": f32([1e30, 1e30])}) == pytest.approx(2**0.5 * 1e30)


def test_the_digest_sees_name_dtype_shape_and_bytes_but_not_the_order() -> None:
    x, y = f32([1, 2]), f32([3])
    assert digest({"x": x, "y": y}) == digest({"y": y, "x": x})
    others = [{"z": x}, {"x": x.astype(np.float64)}, {"x": x[None]}, {"x": f32([1, 3])}, {}]
    assert len({digest(tensors) for tensors in [{"x": x}, *others]}) == 6
