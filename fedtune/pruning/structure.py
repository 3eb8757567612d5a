"""Which heads and channels of a base a pruned model keeps, and the rows and columns of its layers that follow."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np

from fedtune.errors import ShapeError
from fedtune.lora.adapter import Adapter, Factors
from fedtune.tensors import Array, Tensors

Side: TypeAlias = Literal["all", "q", "kv", "qkv", "ff"]
"""What one side of a layer consists of: the residual stream, which is never cut, heads, or channels."""

# Embeddings, norms and the residual stream are never cut: so the changes of all clients lie in one space.
LLAMA: Mapping[str, tuple[Side, Side]] = {
    "self_attn.q_proj": ("q", "all"),
    "self_attn.k_proj": ("kv", "all"),
    "self_attn.v_proj": ("kv", "all"),
    "self_attn.o_proj": ("all", "q"),
    "mlp.gate_proj": ("ff", "all"),
    "mlp.up_proj": ("ff", "all"),
    "mlp.down_proj": ("all", "ff"),
}
GPT2: Mapping[str, tuple[Side, Side]] = {
    "attn.c_attn": ("qkv", "all"),
    "attn.c_proj": ("all", "q"),
    "mlp.c_fc": ("ff", "all"),
    "mlp.c_proj": ("all", "ff"),
}
BERT: Mapping[str, tuple[Side, Side]] = {
    "attention.self.query": ("q", "all"),
    "attention.self.key": ("kv", "all"),
    "attention.self.value": ("kv", "all"),
    "attention.output.dense": ("all", "q"),
    "intermediate.dense": ("ff", "all"),
    "output.dense": ("all", "ff"),
}
FAMILIES: Mapping[str, Mapping[str, tuple[Side, Side]]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gpt2": GPT2,
    "bert": BERT,
    "roberta": BERT,
}
"""By transformers' model_type: what the (output, input) of each linear layer of a block consists of."""


@dataclass(frozen=True)
class Block:
    """One transformer block of the base, as far as it can shrink."""

    prefix: str
    """Full name, e.g. `model.layers.0`."""
    heads: int
    """Query heads, a multiple of kv_heads."""
    kv_heads: int
    head_dim: int
    channels: int
    """Of the feed-forward part."""

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class BlockLayout:
    """The blocks of a base that can be pruned, from which server and clients derive the rows and columns of a layer."""

    family: str
    """A key of `FAMILIES`."""
    blocks: tuple[Block, ...]
    width: int
    """Of the residual stream."""
    head: int = 0
    """Parameters of the output layer, whether they are tied to the embeddings or not."""
    outputs: int = 0
    """Entries of the output: vocabulary, or classes."""
    number_bytes: int = 4
    """Of one parameter of the frozen base."""

    @cached_property
    def places(self) -> Mapping[str, int]:
        """The number of every block, by its prefix."""
        return {block.prefix: index for index, block in enumerate(self.blocks)}

    @cached_property
    def sides(self) -> Mapping[str, tuple[int, Side, Side]]:
        """(block, output, input) of every linear layer of every block, by full name."""
        return {
            f"{block.prefix}.{layer}": (index, out, into)
            for index, block in enumerate(self.blocks)
            for layer, (out, into) in FAMILIES[self.family].items()
        }


@dataclass(frozen=True)
class BlockStructure:
    """What is left of one block: sorted indices in the base's coordinates."""

    q: tuple[int, ...]
    kv: tuple[int, ...]
    ff: tuple[int, ...]


@dataclass(frozen=True)
class ModelStructure:
    """What is left of every block of a base."""

    blocks: tuple[BlockStructure, ...]

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the lists, each with its length before it, as little-endian uint32."""
        # Each list with its length: otherwise [1], [2, 3] and [1, 2], [3] would have one digest.
        lists = (part for kept in self.blocks for part in (kept.q, kept.kv, kept.ff))
        numbers = [number for part in lists for number in (len(part), *part)]
        return hashlib.sha256(np.asarray(numbers, "<u4").tobytes()).digest()


def full_block(layout: BlockLayout) -> ModelStructure:
    """Return the structure that keeps everything."""
    return ModelStructure(
        tuple(
            BlockStructure(tuple(range(b.heads)), tuple(range(b.kv_heads)), tuple(range(b.channels)))
            for b in layout.blocks
        )
    )


def check(structure: ModelStructure, layout: BlockLayout) -> ModelStructure:
    """Return the structure if it is one of this base.

    Raises:
        ShapeError: naming block and list: another number of blocks, an empty, unsorted or repeated list, an index out
            of range, or key/value heads that do not keep the same number of query heads each (repeat_kv needs that).
    """
    if len(structure.blocks) != len(layout.blocks):
        raise ShapeError(
            f"structure: expected {len(layout.blocks)} blocks, as the base has; got {len(structure.blocks)}"
        )
    for block, left in zip(layout.blocks, structure.blocks, strict=True):
        parts = (("q", left.q, block.heads), ("kv", left.kv, block.kv_heads), ("ff", left.ff, block.channels))
        for name, part, size in parts:
            if not part:
                raise ShapeError(f"{block.prefix}, {name}: expected at least one of {size} to be kept; got none")
            if list(part) != sorted(set(part)):
                raise ShapeError(f"{block.prefix}, {name}: expected rising indices, each once; got {index_list(part)}")
            if part[0] < 0 or part[-1] >= size:
                raise ShapeError(
                    f"{block.prefix}, {name}: expected indices from 0 to {size - 1}; got {index_list(part)}"
                )
        # transformers repeats each key/value head equally often, so groups of different size cannot be computed.
        counts = {head: 0 for head in left.kv}
        for head in left.q:
            if head // block.group not in counts:
                raise ShapeError(
                    f"{block.prefix}, q: expected heads of the kept key/value heads {index_list(left.kv)}; got {head}"
                )
            counts[head // block.group] += 1
        if len(set(counts.values())) != 1:
            raise ShapeError(
                f"{block.prefix}, q: expected as many query heads for every kept key/value head; got {counts}"
            )
    return structure


def index_list(part: Sequence[int]) -> str:
    return f"{list(part[:8])}{' ...' if len(part) > 8 else ''}"


def bitmap(structure: ModelStructure, layout: BlockLayout) -> bytes:
    """Return a structure as it travels: by block a bit per query head, key/value head and channel, lowest bit first."""
    bits = []
    for block, left in zip(layout.blocks, structure.blocks, strict=True):
        for part, size in ((left.q, block.heads), (left.kv, block.kv_heads), (left.ff, block.channels)):
            row = np.zeros(size, bool)
            row[list(part)] = True
            bits.append(row)
    return np.packbits(np.concatenate(bits), bitorder="little").tobytes()


def from_bitmap(data: bytes, layout: BlockLayout) -> ModelStructure:
    """Return the structure that `bitmap` wrote.

    Raises:
        ShapeError: if the bits are not those of a structure of this base.
    """
    sizes = [size for b in layout.blocks for size in (b.heads, b.kv_heads, b.channels)]
    total = sum(sizes)
    if len(data) != -(-total // 8):
        raise ShapeError(f"structure: expected {-(-total // 8)} bytes, a bit per head and channel; got {len(data)}")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    # One structure has one form: otherwise two digests could name the same structure.
    if bits[total:].any():
        raise ShapeError(f"structure: expected zero bits after the {total} of the base; got others")
    parts = [tuple(np.flatnonzero(part).tolist()) for part in np.split(bits[:total], np.cumsum(sizes)[:-1])]
    return check(ModelStructure(tuple(BlockStructure(*parts[i : i + 3]) for i in range(0, len(parts), 3))), layout)


def rows(heads: Sequence[int], head_dim: int) -> Array:
    """Return the rows of a projection that belong to heads, head-major.

    >>> rows([1], 2).tolist(), rows([0, 3], 2).tolist()
    ([2, 3], [0, 1, 6, 7])
    """
    # Whole heads: rotary angles and Qwen3's norms of queries and keys belong to places within a head.
    return np.asarray((np.asarray(heads, np.int64)[:, None] * head_dim + np.arange(head_dim)).reshape(-1))


def places(block: Block, kept: BlockStructure, side: Side) -> Array | None:
    """Return the indices of one side of a layer that are kept, in the base's coordinates; None: all of them."""
    match side:
        case "q":
            return rows(kept.q, block.head_dim)
        case "kv":
            return rows(kept.kv, block.head_dim)
        # GPT-2's c_attn: queries, keys and values one after the other, as many heads of each.
        case "qkv":
            queries, width = rows(kept.q, block.head_dim), block.heads * block.head_dim
            return np.concatenate([queries, queries + width, queries + 2 * width])
        case "ff":
            return np.asarray(kept.ff, np.int64)
        case "all":
            return None


@dataclass(frozen=True)
class LayerSlice:
    """The rows and columns that are kept of one linear layer; None: all of a side."""

    out: Array | None
    into: Array | None


def cuts(structure: ModelStructure, layout: BlockLayout) -> Mapping[str, LayerSlice]:
    """Return what is kept of every linear layer of every block, by full name."""
    slices = {}
    for name, (index, out, into) in layout.sides.items():
        block, left = layout.blocks[index], structure.blocks[index]
        slices[name] = LayerSlice(out=places(block, left, out), into=places(block, left, into))
    return slices


FULL = LayerSlice(None, None)


def shapes(modules: Mapping[str, tuple[int, int]], cut: Mapping[str, LayerSlice]) -> Mapping[str, tuple[int, int]]:
    """Return (out, in) of modules after pruning; those outside of the blocks stay as they are."""
    shapes_after = {}
    for name, (m, n) in modules.items():
        at = cut.get(name, FULL)
        shapes_after[name] = (m if at.out is None else len(at.out), n if at.into is None else len(at.into))
    return shapes_after


def slice_factors(factors: Factors, cut: LayerSlice) -> Factors:
    """Return the change of the kept rows and columns alone: slice(W + b a) = slice(W) + slice(b) slice(a)."""
    return Factors(
        a=factors.a if cut.into is None else factors.a[:, cut.into],
        b=factors.b if cut.out is None else factors.b[cut.out],
    )


def scatter_factors(factors: Factors, cut: LayerSlice, shape: tuple[int, int]) -> Factors:
    """Return a pruned layer's change in the base's coordinates: zero rows and columns where nothing was kept."""
    a, b = factors.a, factors.b
    if cut.into is not None:
        # Zeros: a client cannot have changed what it did not hold, so the sum over clients stays exact.
        a = np.zeros((factors.rank, shape[1]), factors.a.dtype)
        a[:, cut.into] = factors.a
    if cut.out is not None:
        b = np.zeros((shape[0], factors.rank), factors.b.dtype)
        b[cut.out] = factors.b
    return Factors(a=a, b=b)


def scatter(adapter: Adapter, cut: Mapping[str, LayerSlice], modules: Mapping[str, tuple[int, int]]) -> Adapter:
    """Return an adapter of a pruned model in the base's coordinates."""
    return {name: scatter_factors(f, cut.get(name, FULL), modules[name]) for name, f in adapter.items()}


def slice_adapter(adapter: Adapter, cut: Mapping[str, LayerSlice]) -> Adapter:
    """Return what an adapter of the base is on a pruned model."""
    return {name: slice_factors(factors, cut.get(name, FULL)) for name, factors in adapter.items()}


def slice_flat(tensors: Tensors, cut: Mapping[str, LayerSlice]) -> Tensors:
    """Return flat factors `<module>.a`, `.b` and dense `.w` at the kept rows and columns alone."""
    sliced = {}
    for key, array in tensors.items():
        name, _, kind = key.rpartition(".")
        at = cut.get(name, FULL)
        # b and w have the output's rows, a and w the input's columns.
        if kind != "a" and at.out is not None:
            array = array[at.out]
        if kind != "b" and at.into is not None:
            array = array[:, at.into]
        sliced[key] = array
    return sliced


def within(before: Mapping[str, LayerSlice], after: Mapping[str, LayerSlice]) -> Mapping[str, LayerSlice]:
    """Return cuts of the base as cuts of what earlier ones left.

    Raises:
        ShapeError: naming a layer of which the earlier ones left less.
    """
    return {
        name: LayerSlice(places_in(name, old.out, after[name].out), places_in(name, old.into, after[name].into))
        for name, old in before.items()
    }


def places_in(name: str, before: Array | None, after: Array | None) -> Array | None:
    if before is None or after is None:
        return None
    # `check` has found the indices sorted, which this search needs.
    at: Array = np.searchsorted(before, after)
    if (at == len(before)).any() or (before[at] != after).any():
        raise ShapeError(f"{name}: expected a part of the {len(before)} rows or columns kept before; got others")
    return at


def sparsity(structure: ModelStructure, layout: BlockLayout) -> float:
    """Return the share of the blocks' linear weights that is gone."""
    # Of the blocks alone: embeddings would hide the ratio in a small model with a large vocabulary.
    before = after = 0
    for cut, (m, n) in zip(cuts(structure, layout).values(), linear_shapes(layout), strict=True):
        before += m * n
        after += (m if cut.out is None else len(cut.out)) * (n if cut.into is None else len(cut.into))
    return 1 - after / before


def linear_shapes(layout: BlockLayout) -> Iterator[tuple[int, int]]:
    """Yield (out, in) of the base's linear layers, in the order of `BlockLayout.sides`."""
    for index, out, into in layout.sides.values():
        block = layout.blocks[index]
        sizes = {
            "all": layout.width,
            "q": block.heads * block.head_dim,
            "kv": block.kv_heads * block.head_dim,
            "qkv": 3 * block.heads * block.head_dim,
            "ff": block.channels,
        }
        yield sizes[out], sizes[into]
