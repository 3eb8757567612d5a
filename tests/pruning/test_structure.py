from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ShapeError
from fedtune.lora.adapter import Factors, delta
from fedtune.pruning.structure import (
    Block,
    BlockLayout,
    BlockStructure,
    LayerSlice,
    ModelStructure,
    bitmap,
    check,
    cuts,
    from_bitmap,
    full_block,
    linear_shapes,
    rows,
    scatter_factors,
    shapes,
    slice_factors,
    slice_flat,
    sparsity,
    within,
)

LLAMA = BlockLayout("llama", tuple(Block(f"model.layers.{i}", 4, 2, 2, 6) for i in range(2)), width=8)
GPT2 = BlockLayout("gpt2", (Block("transformer.h.0", 4, 4, 2, 16),), width=8)
SMALL = ModelStructure((BlockStructure((0, 3), (0, 1), (1, 4)), BlockStructure((2, 3), (1,), (0, 1, 5))))


@st.composite
def keeps(draw: st.DrawFn, anatomy: BlockLayout = LLAMA) -> ModelStructure:
    """Any keep of the base: some groups, as many heads of each, some channels."""
    blocks = []
    for block in anatomy.blocks:
        kv = sorted(draw(st.sets(st.integers(0, block.kv_heads - 1), min_size=1)))
        per = draw(st.integers(1, block.group))
        slots = [draw(st.permutations(range(block.group))) for _ in kv]
        q = sorted(head * block.group + slot for head, order in zip(kv, slots, strict=True) for slot in order[:per])
        ff = sorted(draw(st.sets(st.integers(0, block.channels - 1), min_size=1)))
        blocks.append(BlockStructure(tuple(q), tuple(kv), tuple(ff)))
    return ModelStructure(tuple(blocks))


def test_heads_become_rows_by_hand() -> None:
    assert rows([2, 3], 2).tolist() == [4, 5, 6, 7]
    assert rows([0, 3], 2).tolist() == [0, 1, 6, 7]
    found = cuts(ModelStructure((BlockStructure((2, 3), (1,), (0,)), BlockStructure((0, 3), (0, 1), (5,)))), LLAMA)
    q, k = found["model.layers.0.self_attn.q_proj"], found["model.layers.0.self_attn.k_proj"]
    assert q.out is not None
    assert k.out is not None
    assert (q.out.tolist(), q.into, k.out.tolist()) == ([4, 5, 6, 7], None, [2, 3])
    o, down = found["model.layers.1.self_attn.o_proj"], found["model.layers.1.mlp.down_proj"]
    assert o.into is not None
    assert down.into is not None
    assert (o.out, o.into.tolist(), down.into.tolist()) == (None, [0, 1, 6, 7], [5])


def test_gpt2_takes_queries_keys_and_values_out_of_one_matrix() -> None:
    found = cuts(ModelStructure((BlockStructure((1, 3), (1, 3), (0,)),)), GPT2)["transformer.h.0.attn.c_attn"]
    assert found.out is not None
    assert found.out.tolist() == [2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23]


@given(keeps())
def test_a_bitmap_gives_the_keep_back(keep: ModelStructure) -> None:
    assert from_bitmap(bitmap(keep, LLAMA), LLAMA) == keep
    assert check(keep, LLAMA) is keep


@given(keeps(), keeps())
def test_a_digest_tells_structures_apart(one: ModelStructure, other: ModelStructure) -> None:
    assert (one.digest == other.digest) == (one == other)


def test_the_digest_is_that_of_little_endian_words() -> None:
    import hashlib
    import struct

    expected = hashlib.sha256(struct.pack("<9I", 2, 0, 3, 2, 0, 1, 2, 1, 4)).digest()
    assert ModelStructure(SMALL.blocks[:1]).digest == expected


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (BlockStructure((), (0,), (1,)), "model.layers.0, q: expected at least one of 4"),
        (BlockStructure((0, 1), (), (1,)), "model.layers.0, kv: expected at least one of 2"),
        (BlockStructure((0, 1), (0,), ()), "model.layers.0, ff: expected at least one of 6"),
        (BlockStructure((1, 0), (0,), (1,)), "rising indices, each once"),
        (BlockStructure((0, 0), (0,), (1,)), "rising indices, each once"),
        (BlockStructure((0, 1), (0,), (1, 6)), "indices from 0 to 5"),
        (BlockStructure((0, 1), (0,), (2**32 - 1,)), "indices from 0 to 5"),
        (BlockStructure((-1, 1), (0,), (1,)), "indices from 0 to 3"),
        (BlockStructure((0, 1, 2), (0, 1), (1,)), "as many query heads"),
        (BlockStructure((0, 2), (0,), (1,)), "heads of the kept key/value heads"),
        (BlockStructure((0, 1), (0, 1), (1,)), "as many query heads"),
    ],
)
def test_a_keep_of_no_model_is_refused_by_block_and_list(kept: BlockStructure, said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        check(replace(SMALL, blocks=(kept, SMALL.blocks[1])), LLAMA)


def test_a_keep_of_another_base_is_refused() -> None:
    with pytest.raises(ShapeError, match="expected 2 blocks"):
        check(ModelStructure(SMALL.blocks[:1]), LLAMA)
    with pytest.raises(ShapeError, match="as many query heads"):  # as long, by chance
        from_bitmap(bitmap(SMALL, LLAMA), GPT2)
    with pytest.raises(ShapeError, match="expected 3 bytes, a bit per head and channel; got 4"):
        from_bitmap(bitmap(SMALL, LLAMA) + b"\0", LLAMA)


@given(st.binary(min_size=3, max_size=3))
def test_any_three_bytes_are_a_keep_of_the_base_or_refused(data: bytes) -> None:
    try:
        keep = from_bitmap(data, LLAMA)
    except ShapeError:
        return
    assert bitmap(check(keep, LLAMA), LLAMA) == data


def drawn(m: int, n: int, rank: int = 2, seed: int = 0) -> Factors:
    rng = np.random.default_rng(seed)
    return Factors(a=rng.standard_normal((rank, n)), b=rng.standard_normal((m, rank)))


@given(keeps())
def test_scatter_and_slice_are_inverse_and_slicing_is_linear(keep: ModelStructure) -> None:
    for (name, cut), (m, n) in zip(cuts(keep, LLAMA).items(), linear_shapes(LLAMA), strict=True):
        factors = drawn(m, n)
        small = slice_factors(factors, cut)
        assert small.shape == shapes({name: (m, n)}, {name: cut})[name]
        wide = scatter_factors(small, cut, (m, n))
        again = slice_factors(wide, cut)
        np.testing.assert_array_equal(again.a, small.a)
        np.testing.assert_array_equal(again.b, small.b)
        dense = delta(factors)
        dense = dense if cut.out is None else dense[cut.out]
        np.testing.assert_allclose(delta(small), dense if cut.into is None else dense[:, cut.into])
        assert np.count_nonzero(delta(wide)) == np.count_nonzero(delta(small))


def test_flat_tensors_are_cut_on_the_side_that_is_theirs() -> None:
    cut = {"x": LayerSlice(np.array([1]), np.array([0, 2])), "y": LayerSlice(None, None)}
    tensors = {"x.a": np.ones((2, 3)), "x.b": np.ones((4, 2)), "x.w": np.ones((4, 3)), "y.a": np.ones((1, 3))}
    found = {key: array.shape for key, array in slice_flat(tensors, cut).items()}
    assert found == {"x.a": (2, 2), "x.b": (1, 2), "x.w": (1, 2), "y.a": (1, 3)}


@given(keeps())
def test_a_cut_within_a_cut_is_the_cut(keep: ModelStructure) -> None:
    inner = within(cuts(full_block(LLAMA), LLAMA), cuts(keep, LLAMA))
    for name, cut in cuts(keep, LLAMA).items():
        for one, other in ((inner[name].out, cut.out), (inner[name].into, cut.into)):
            assert (one is None) == (other is None)
            assert one is None or one.tolist() == (other.tolist() if other is not None else None)
    with pytest.raises(ShapeError, match="expected a part of"):
        within(cuts(SMALL, LLAMA), cuts(full_block(LLAMA), LLAMA))


def test_sparsity_is_the_share_of_the_blocks_weights_that_is_gone() -> None:
    assert sparsity(full_block(LLAMA), LLAMA) == 0
    half = ModelStructure(tuple(BlockStructure((0, 1), (0,), (0, 1, 2)) for _ in range(2)))
    assert sparsity(half, LLAMA) == pytest.approx(0.5)
