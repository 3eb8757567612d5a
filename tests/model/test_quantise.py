from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.model.quantise import BLOCK, LEVELS, dequantise, midpoints, quantise, weight_bytes
from fedtune.model.settings import QUANTISED, QuantisedFormat

REFERENCE = Path(__file__).with_name("bitsandbytes_codes.json")
"""Codes and scales that bitsandbytes gives `reference_weight`; what made them stands in it."""


def gaussian(m: int, n: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.standard_normal((m, n)) * scale).astype(np.float32))


def reference_weight() -> torch.Tensor:
    """Return a matrix of (6, 192) with a block of zeros, tiny and large blocks, and weights on the bounds of bins."""
    weight = gaussian(6, 192, seed=11)
    weight[0, :64], weight[1, 64:128], weight[2, 128:] = 0.0, weight[1, 64:128] * 1e-30, weight[2, 128:] * 1e20
    weight[3, 0], weight[3, 1:16] = 1.0, midpoints()
    return weight


@pytest.mark.parametrize("kind", QUANTISED)
def test_codes_and_scales_are_those_of_bitsandbytes(kind: QuantisedFormat) -> None:
    reference = json.loads(REFERENCE.read_text())[kind]
    quantised = quantise(reference_weight(), kind)
    assert quantised.codes.numpy().tobytes().hex() == reference["codes"]
    assert quantised.scales.numpy().astype("<f4").tobytes().hex() == reference["scales"]
    # Equal as numbers: the sign of a zero is no value.
    values = np.frombuffer(bytes.fromhex(reference["values"]), "<f4").reshape(6, 192)
    assert np.array_equal(dequantise(quantised, torch.float32).numpy(), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (48, 576), (5, 192)])
def test_installed_bitsandbytes_gives_the_same_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(*shape, seed=shape[0]).to(dtype)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=False)
    ours = quantise(weight, "nf4")
    assert torch.equal(ours.codes.view(-1), codes.view(-1))
    assert torch.equal(ours.scales.view(-1), state.absmax.view(-1))
    state.dtype = torch.float32
    assert torch.equal(dequantise(ours, torch.float32), functional.dequantize_4bit(codes, state))
    codes, scales, _ = functional.int8_vectorwise_quant(weight.clone())
    ours = quantise(weight, "int8")
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.scales, scales)
    assert torch.equal(dequantise(ours, torch.float32), functional.int8_vectorwise_dequant(codes, scales))


def test_a_block_by_hand() -> None:
    """1, .5, -.25 and zeros with scale 1: .5 is nearer to .4407 than to .5626, -.25 to -.2844 than to -.1848."""
    weight = torch.zeros(1, BLOCK)
    weight[0, :3] = torch.tensor([1.0, 0.5, -0.25])
    quantised = quantise(weight, "nf4")
    assert quantised.scales.tolist() == [[1.0]]
    assert quantised.codes[0, :2].tolist() == [15 << 4 | 12, 4 << 4 | 7]
    values = dequantise(quantised, torch.float32)[0]
    assert values[:4].tolist() == [1.0, LEVELS[12], LEVELS[4], 0.0]
    assert not values[4:].any()


def test_a_row_by_hand() -> None:
    quantised = quantise(torch.tensor([[-2.0, 1.0, 0.1], [0.0, 0.0, 0.0]]), "int8")
    # 1 is 63.5 steps of 2 / 127: the even one of its neighbours.
    assert quantised.codes.tolist() == [[-127, 64, 6], [0, 0, 0]]
    assert quantised.scales.tolist() == [2.0, 0.0]
    assert dequantise(quantised, torch.float32).tolist()[1] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("width", [1, 63, 64, 65, 172, 192])
def test_a_last_block_of_fewer_inputs_is_that_of_a_padded_weight(width: int) -> None:
    weight = gaussian(7, width, seed=width)
    padded = torch.nn.functional.pad(weight, (0, -width % BLOCK))
    ours, theirs = quantise(weight, "nf4"), quantise(padded, "nf4")
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.scales, theirs.scales)
    assert torch.equal(dequantise(ours, torch.float32), dequantise(theirs, torch.float32)[:, :width])


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 150),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e20]),
)
@settings(max_examples=60, deadline=None)
def test_quantising_twice_changes_nothing(rows: int, columns: int, seed: int, scale: float) -> None:
    weight = gaussian(rows, columns, seed=seed, scale=scale)
    for kind in QUANTISED:
        first = quantise(weight, kind)
        again = quantise(dequantise(first, torch.float32), kind)
        assert torch.equal(first.codes, again.codes)
        # 127 times the rounded 1 / 127 is not 1: an int8 row's largest value may come out in the next float.
        torch.testing.assert_close(first.scales, again.scales, rtol=0 if kind == "nf4" else 2e-7, atol=0)


@pytest.mark.parametrize("kind", QUANTISED)
def test_rows_may_be_taken_out_before_or_after_and_columns_may_not(kind: QuantisedFormat) -> None:
    weight, rows = gaussian(12, 128), torch.tensor([0, 3, 4, 11])
    after, before = quantise(weight, kind), quantise(weight[rows], kind)
    assert torch.equal(after.codes[rows], before.codes)
    assert torch.equal(after.scales[rows], before.scales)
    columns = torch.arange(0, 128, 2)
    sliced = dequantise(quantise(weight[:, columns], kind), torch.float32)
    assert not torch.equal(dequantise(after, torch.float32)[:, columns], sliced)


def test_pieces_of_a_large_weight_are_quantised_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(33, 128)
    whole: Mapping[str, Any] = {kind: quantise(weight, kind) for kind in QUANTISED}
    monkeypatch.setattr("fedtune.model.quantise.PIECE", 4 * 128)
    for kind in QUANTISED:
        assert torch.equal(quantise(weight, kind).codes, whole[kind].codes)
        assert torch.equal(quantise(weight, kind).scales, whole[kind].scales)


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.0920), ("int8", 0.0079)])
def test_errors_of_a_gaussian_weight(kind: QuantisedFormat, error: float) -> None:
    """Relative errors of section 6 of the specification, which a wrong table or scale misses by far."""
    weight = gaussian(256, 1024, seed=3)
    off = dequantise(quantise(weight, kind), torch.float32) - weight
    assert float(off.norm() / weight.norm()) == pytest.approx(error, rel=0.03)


def test_memory_of_a_layer_is_what_its_tensors_take() -> None:
    for kind in QUANTISED:
        for shape in ((64, 64), (10, 172), (3, 5)):
            quantised = quantise(gaussian(*shape), kind)
            assert weight_bytes(shape, kind) == sum(
                tensor.numel() * tensor.element_size() for tensor in (quantised.codes, quantised.scales)
            )
    assert weight_bytes((4096, 4096), "nf4") / 4096**2 * 8 == 4.5
