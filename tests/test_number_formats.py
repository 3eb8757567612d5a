"""Codes and scales: how far a number may move on its way, what is kept on average, and what hostile input becomes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedtune.number_formats import (
    CODES,
    GROUP,
    LARGEST_CODE,
    SCALES,
    from_wire,
    is_quantised,
    lengthwise,
    round_up,
    scales_shape,
    to_wire,
)
from fedtune.seeds import generator
from fedtune.tensors import Array

matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=70),
    elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-1, 1, width=32),
)


def steps(name: str, scales: Array, columns: int) -> Array:
    """Return the step of every number of a tensor."""
    wide = np.repeat(lengthwise(name, scales).astype(np.float64), GROUP, axis=1)
    return lengthwise(name, wide[:, :columns])


@pytest.mark.parametrize("dtype", list(CODES))
@pytest.mark.parametrize("key", [None, 7])
@given(array=matrices, side=st.sampled_from(["x.a", "x.b", "x.w"]))
def test_a_number_moves_by_half_a_step_to_the_nearest_and_by_one_at_random(
    dtype: str, key: int | None, array: Array, side: str
) -> None:
    sent = to_wire({side: array}, dtype, key=key)
    assert sent[side].shape == array.shape
    assert sent[side].dtype == CODES[dtype]
    assert sent[side + SCALES].shape == scales_shape(side, array.shape)
    assert np.abs(sent[side].astype(int)).max(initial=0) <= LARGEST_CODE[dtype]
    wide = from_wire(sent)
    assert wide.keys() == {side}
    off = np.abs(wide[side].astype(np.float64) - array)
    step = steps(side, sent[side + SCALES], lengthwise(side, array).shape[1])
    # Below the smallest bfloat16 a group has no scale.
    assert (off <= (0.5001 if key is None else 1.0001) * step + 2e-40).all()


@pytest.mark.parametrize("dtype", list(CODES))
def test_rounding_at_random_is_right_on_average_and_follows_its_key(dtype: str) -> None:
    array = generator(3).standard_normal((4, 100)).astype(np.float32)
    drawn = [from_wire(to_wire({"x.a": array}, dtype, key=key))["x.a"] for key in range(400)]
    step = steps("x.a", to_wire({"x.a": array}, dtype)["x.a" + SCALES], 100)
    # The mean of 400 draws of at most half a step's deviation each.
    assert (np.abs(np.mean(drawn, axis=0) - array) <= 5 * 0.5 / 20 * step).all()
    np.testing.assert_array_equal(drawn[5], from_wire(to_wire({"x.a": array}, dtype, key=5))["x.a"])
    assert (drawn[5] != drawn[6]).any()
    nearest = from_wire(to_wire({"x.a": array}, dtype))["x.a"]
    assert np.abs(nearest - array).mean() < np.abs(drawn[0] - array).mean()


def test_tensors_of_other_names_are_rounded_by_other_draws() -> None:
    array = np.full((1, 64), 0.3, np.float32)
    array[0, 0] = 1.0
    sent = to_wire({"x.a": array, "y.a": array}, "int4", key=1)
    assert (sent["x.a"].astype(int) != sent["y.a"].astype(int)).any()


def test_what_was_rounded_to_the_nearest_of_4_bits_stays_as_it_is() -> None:
    array = generator(4).standard_normal((3, 130)).astype(np.float32)
    once = from_wire(to_wire({"x.a": array}, "int4"))
    np.testing.assert_array_equal(from_wire(to_wire(once, "int4"))["x.a"], once["x.a"])


def test_codes_by_hand() -> None:
    sent = to_wire({"x.a": np.array([[7.0, -3.5, 0.4, -7.0]], np.float32)}, "int4")
    assert sent["x.a"].astype(int).tolist() == [[7, -4, 0, -7]]
    assert sent["x.a" + SCALES].astype(float).tolist() == [[1.0]]


def test_a_group_lies_within_one_rank_of_b() -> None:
    # The columns of a warm start fall by orders of magnitude: in common groups the last ones would all be zero.
    b = np.array([1.0, 1e-3], np.float32) * generator(5).uniform(0.5, 1, (100, 2)).astype(np.float32)
    sent = to_wire({"x.b": b}, "int8")
    assert sent["x.b" + SCALES].shape == (2, 2)
    np.testing.assert_allclose(from_wire(sent)["x.b"], b, rtol=0.01)


@pytest.mark.parametrize("dtype", list(CODES))
def test_the_changes_of_a_tiny_learning_rate_have_a_scale(dtype: str) -> None:
    moved = 1e-9 * generator(6).standard_normal((2, 64)).astype(np.float32)
    wide = from_wire(to_wire({"x.a": moved}, dtype, key=1))["x.a"]
    assert np.linalg.norm(wide - moved) < 0.3 * np.linalg.norm(moved)


@pytest.mark.parametrize("dtype", list(CODES))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_not_hidden(dtype: str, bad: float) -> None:
    array = np.ones((2, 70), np.float32)
    array[1, 3] = bad
    sent = to_wire({"x.a": array}, dtype, key=1)
    assert np.isfinite(sent["x.a" + SCALES].astype(float)).tolist() == [[True, True], [False, True]]
    wide = from_wire(sent)["x.a"]
    assert np.isfinite(wide[0]).all()
    assert not np.isfinite(wide[1, :64]).any()


def test_scales_can_be_chosen_for_all_clients_alike() -> None:
    sent = to_wire({"x.a": np.array([[0.5, -3.0]], np.float32)}, "int8", scale=lambda largest, _: 0 * largest + 0.25)
    assert sent["x.a"].tolist() == [[2, -12]]
    clipped = to_wire({"x.a": np.array([[100.0]], np.float32)}, "int4", scale=lambda largest, _: 0 * largest + 1)
    assert clipped["x.a"].astype(int).tolist() == [[7]]


def test_floats_are_cast_and_stay_as_they_are_on_the_way_back() -> None:
    tensors = {"x.a": np.ones((2, 2), np.float32)}
    sent = to_wire(tensors, "bf16", key=1)
    assert sent["x.a"].dtype == ml_dtypes.bfloat16
    assert from_wire(sent) is sent
    assert not is_quantised(sent)
    assert is_quantised(to_wire(tensors, "int8"))


@given(st.floats(0, 2.0**127, width=32))
def test_a_scale_is_rounded_up_by_at_most_a_128th(scale: float) -> None:
    array: Any = np.array([scale], np.float32)
    up = float(round_up(array)[0])
    assert scale <= up <= scale * (1 + 2**-7) + 1e-40
