"""Weights lie where the table says, as any reader of safetensors sees them, and codes in 8 bits are the nearest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file

from fedtune.model.onnx_weights import ALIGNMENT, SCALE, names_of, round_to_8_bits, write_weights
from fedtune.tensors import Array, Tensors

TENSORS: Tensors = {
    "a": np.arange(7, dtype=np.float32),
    "b": np.linspace(-2, 3, 15, dtype=np.float32).reshape(3, 5),
    "c": np.array([[1.0, -4.0], [0.0, 0.0], [0.5, 8.0]], np.float32),
}


@pytest.mark.parametrize("rounded", [{}, {"c": 0}, {"b": 1, "c": 0}])
def test_the_file_is_one_of_safetensors_and_the_table_says_where(tmp_path: Path, rounded: dict[str, int]) -> None:
    path = tmp_path / "weights.safetensors"
    shapes = {name: array.shape for name, array in TENSORS.items()}
    table = write_weights(path, shapes, TENSORS.__getitem__, rounded=rounded)
    assert names_of(table) == TENSORS.keys()
    loaded, data = load_file(path), path.read_bytes()
    assert loaded.keys() == table.keys()
    for name, place in table.items():
        raw = data[place.begin : place.begin + place.size]
        kind = np.float32 if place.kind == "F32" else np.int8
        np.testing.assert_array_equal(np.frombuffer(raw, kind).reshape(place.shape), loaded[name])
        assert place.begin % loaded[name].itemsize == 0
    assert min(place.begin for place in table.values()) % ALIGNMENT == 0
    assert sum(place.size for place in table.values()) + min(p.begin for p in table.values()) == len(data)
    for name in TENSORS:
        if name not in rounded:
            np.testing.assert_array_equal(loaded[name], TENSORS[name])
        else:
            scale = loaded[name + SCALE]
            whole = loaded[name] * (scale[:, None] if rounded[name] == 0 else scale)
            assert np.abs(whole - TENSORS[name]).max() <= scale.max() / 2 + 1e-7


def test_a_row_by_hand() -> None:
    codes, scale = round_to_8_bits(TENSORS["c"], axis=0)
    np.testing.assert_array_equal(codes, [[32, -127], [0, 0], [8, 127]])
    np.testing.assert_array_equal(scale, np.array([4 / 127, np.finfo(np.float32).tiny, 8 / 127], np.float32))
    codes, scale = round_to_8_bits(TENSORS["c"].T.copy(), axis=1)
    np.testing.assert_array_equal(codes.T, [[32, -127], [0, 0], [8, 127]])


@given(arrays(np.float32, (3, 4), elements=st.floats(-1e3, 1e3, width=32)), st.sampled_from([0, 1]))
def test_codes_are_the_nearest(matrix: Array, axis: int) -> None:
    codes, scale = round_to_8_bits(matrix, axis=axis)
    whole = codes.astype(np.float64) * (scale[:, None] if axis == 0 else scale)
    bound = (scale[:, None] if axis == 0 else scale[None]) * 0.501
    assert (np.abs(whole - matrix) <= bound).all()
