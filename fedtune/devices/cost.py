"""What a round costs one client: operations and bytes, as functions of pruning ratio, rank, batch and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2, prod

from fedtune.messages import BankName, WireDtype
from fedtune.pruning.depth import backward_blocks, module_ranks
from fedtune.pruning.least_squares import TRAVELLING, moment_shapes
from fedtune.pruning.ranking import PruningSettings, counts, unit_of
from fedtune.pruning.structure import Block, BlockLayout, Side

BYTES: Mapping[WireDtype, float] = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1 + 2 / 64, "int4": 0.5 + 2 / 64}
"""Of a number; codes with their share of a scale, and without what deflating them saves, a tenth at most."""

MIXING, DRAWING = 8.0, 20.0
"""Operations of a random sign with what rounds a weight, and of a normally distributed number (assumed)."""


@dataclass(frozen=True)
class Body:
    """The sizes of a base from which its costs follow."""

    layout: BlockLayout
    modules: Mapping[str, tuple[int, int]]
    """(out, in) of every module that gets an adapter."""
    parameters: int
    """Of the whole base."""
    saved: int = 0
    """Numbers of modules_to_save, trained in full and sent in float32; of virtual tokens."""
    virtual: int = 0
    """Virtual tokens of each text that go through all layers, as those of a prompt do."""
    prefix: int = 0
    """Virtual tokens that are keys and values of each layer."""
    classifies: bool = False
    """Whether the output is one row per example instead of one per token."""


@dataclass(frozen=True)
class Work:
    """The work of one client in one round, beside ratio and rank."""

    steps: int
    rows: int
    """Examples per forward pass."""
    passes: int
    """Forward passes per step."""
    tokens: float
    """Per example: the mean."""
    longest: float
    """Per example: the most, to which the others of its batch are padded."""
    checkpointing: bool = False
    side_tokens: float = 0.0
    """Tokens that go forward for scores and losses."""
    global_rank: float = 0.0
    """Of the frozen adapter beside the one that is trained."""
    start_copy: bool = False
    """A copy of all that is trained stays in memory as it was received (FedProx)."""

    @property
    def trained_tokens(self) -> float:
        return self.steps * self.rows * self.passes * self.tokens


@dataclass(frozen=True)
class Sizes:
    """How wide a block is after pruning: the mean over blocks where they differ."""

    q: float
    """Query heads."""
    kv: float
    ff: float


def sizes(layout: BlockLayout, settings: PruningSettings | None, ratio: float) -> Sizes:
    """Return the widths of a block at a ratio; they do not depend on which heads and channels stay."""
    number = len(layout.blocks)
    if settings is None or ratio == 0:
        return Sizes(*(sum(each) / number for each in zip(*map(_whole, layout.blocks), strict=True)))
    # Blocks of one base have the same numbers of heads, so the first gives the size of a group.
    count, block = counts(layout, settings, ratio), layout.blocks[0]
    units = count.total / number
    q, kv = (
        (units * block.group, units)
        if unit_of(settings, block) == "kv_group"
        else (
            units * block.kv_heads,
            float(block.kv_heads),
        )
    )
    return Sizes(q, kv, sum(count.channels) / number)


def _whole(block: Block) -> tuple[int, int, int]:
    return block.heads, block.kv_heads, block.channels


def _side(side: Side, size: Sizes, layout: BlockLayout) -> float:
    head_dim = layout.blocks[0].head_dim
    return {
        "all": float(layout.width),
        "q": size.q * head_dim,
        "kv": size.kv * head_dim,
        "qkv": 3 * size.q * head_dim,
        "ff": size.ff,
    }[side]


def block_parameters(layout: BlockLayout, size: Sizes) -> float:
    """Return the weights of the linear layers of all blocks at these widths."""
    return sum(_side(out, size, layout) * _side(into, size, layout) for _, out, into in layout.sides.values())


def adapter_sides(body: Body, size: Sizes) -> float:
    """Return the sum over adapted modules of (out + in) at these widths: the numbers of an adapter of rank 1."""
    return sum(sum(module_sides(body, name, size)) for name in body.modules)


def module_sides(body: Body, name: str, size: Sizes) -> tuple[float, float]:
    """Return (out, in) of a linear layer at these widths: one of a block, or a target outside of the blocks."""
    if name not in body.layout.sides:
        return body.modules[name]
    _, out, into = body.layout.sides[name]
    return _side(out, size, body.layout), _side(into, size, body.layout)


@dataclass(frozen=True)
class Trained:
    """What of a model one client trains in one round, beside the structure that is left of it."""

    ranks: Mapping[str, float]
    """LoRA rank of each module that is trained, by full name."""
    depth: float
    """Share of the blocks that backward passes go through: from the top to the lowest trained one."""
    back: float = 0.0
    """Share of heads and channels that backward passes leave out."""


def trained_of(body: Body, ranks: Mapping[str, float], back: float = 0.0) -> Trained:
    """Return what a client trains that has these ranks, by full name of the module."""
    return Trained(ranks, backward_blocks(ranks, body.layout, ()) / len(body.layout.blocks), back)


def trained_modules(body: Body, rank: int, *, top: float = 1.0, back: float = 0.0) -> Trained:
    """Return what is trained at one rank in the upper share of the blocks."""
    names = sorted(body.modules)
    ranks = module_ranks(names, body.layout, rank, top) or (rank,) * len(names)
    return trained_of(body, {name: own for name, own in zip(names, ranks, strict=True) if own > 0}, back)


def flops_per_token(body: Body, size: Sizes, rank: int, work: Work, trained: Trained | None = None) -> float:
    """Return the operations of one token, forward and backward over a frozen base: no gradient of its weights.

    With all modules trained 4 P_kept + 4 P_head + 6 r sum(|O| + |I|) + 12 s sum n_l h + 4 rank_global sum(|O| + |I|);
    the base's part is half as much again where activations are computed twice. A classifier's head sees one row per
    example. Where the upper blocks alone are trained, and heads and channels are left out of the backward pass, the
    backward part of the blocks is depth * (1 - back) of that: 2 P_kept + 2 depth (1 - back) P_kept + ...

    Args:
        body: sizes of the base.
        size: of its blocks, after pruning.
        rank: of all modules, where `trained` does not say it.
        work: of the client.
        trained: which modules are trained, and how much of the backward pass is left out; None: all, and nothing.
    """
    layout = body.layout
    head = 0.0 if body.classifies else float(layout.head)
    # Backward relative to forward: 1 where all is trained.
    depth = 1.0 if trained is None else trained.depth
    backward = 1.0 if trained is None else depth * (1.0 - trained.back)
    sides = adapter_sides(body, size)
    # For each weight 2 forward, 2 backward for the inputs, none for its own gradient; with checkpointing the forward
    # operations of the blocks that backward passes go through count twice.
    again = 2.0 if work.checkpointing else 0.0
    left_out = (again * (1.0 - depth) + 2.0 * (1.0 - backward)) * block_parameters(layout, size)
    # Scores and weighted sums: 4 operations forward, 8 backward, for every token and number of a head.
    attention = (4.0 + 8.0 * backward) * work.tokens * len(layout.blocks) * size.q * layout.blocks[0].head_dim
    # The factors in training cost 2 forward and 4 backward; the frozen adapter beside them 2 and 2.
    factors = 6.0 * rank if trained is None else 6.0 * factor_numbers(body, size, trained.ranks) / sides
    whole = (4.0 + again) * (block_parameters(layout, size) + head)
    total = whole - left_out + (factors + (2.0 + 2.0 * depth) * work.global_rank) * sides + attention
    if not (body.virtual or body.prefix):
        return total
    # Seen by every token of the text; a prompt's are read beside these, which alone are counted.
    total += attention * (body.virtual + body.prefix) / work.tokens
    return total * (1.0 + body.virtual / work.tokens)


def forward_flops_per_token(body: Body, tokens: float, bank_rank: int = 0) -> float:
    """Return the operations of one token that goes forward through the whole base, and through a seed's directions.

    2 P_blocks + 2 P_head + 4 s sum n_l h + 2 p sum(|O| + |I|) + 2 p^2 for each layer of the blocks; a classifier's head
    sees one row per example.

    Args:
        body: sizes of the base.
        tokens: per example.
        bank_rank: p of the bank kron, whose directions are added in the forward pass; 0: nothing is added.
    """
    layout, size = body.layout, sizes(body.layout, None, 0.0)
    head = 0.0 if body.classifies else float(layout.head)
    attention = 4.0 * tokens * len(layout.blocks) * size.q * layout.blocks[0].head_dim
    both = sum(_side(out, size, layout) + _side(into, size, layout) for _, out, into in layout.sides.values())
    directions = 2.0 * bank_rank * both + 2.0 * bank_rank**2 * len(layout.sides)
    return 2.0 * (block_parameters(layout, size) + head) + attention + directions


def descend_flops_per_token(body: Body, tokens: float, bank_rank: int = 0) -> float:
    """Return the operations of one token of a step that descends: forward, and backward down to every slope.

    With gradients of all weights 6 P_blocks + 6 P_head + 12 s sum n_l h. With the bank kron the weights are frozen, and
    only the small products beside them have gradients: 4 P_blocks + 4 P_head + 6 p sum(|O| + |I|) + 6 p^2 for each
    layer + 12 s sum n_l h; a classifier's head sees one row per example.

    Args:
        body: sizes of the base.
        tokens: per example.
        bank_rank: p of the bank kron; 0: the weights themselves are moved.
    """
    layout, size = body.layout, sizes(body.layout, None, 0.0)
    head = 0.0 if body.classifies else float(layout.head)
    attention = 12.0 * tokens * len(layout.blocks) * size.q * layout.blocks[0].head_dim
    whole = block_parameters(layout, size) + head
    if not bank_rank:
        return 6.0 * whole + attention
    both = sum(_side(out, size, layout) + _side(into, size, layout) for _, out, into in layout.sides.values())
    return 4.0 * whole + attention + 6.0 * bank_rank * both + 6.0 * bank_rank**2 * len(layout.sides)


def rebuild_flops(body: Body, bank: BankName, seeds: int) -> float:
    """Return the operations of rebuilding all weights from their seeds once, or of projecting all gradients on them.

    A fast transform for each K weights (hadamard), or K random numbers for each weight (gaussian); with kron nothing is
    rebuilt.
    """
    per_weight = {"hadamard": log2(seeds) + MIXING, "gaussian": DRAWING * seeds, "kron": 0.0}
    return per_weight[bank] * body.parameters


def move_flops(body: Body, bank: BankName) -> float:
    """Return the operations of adding one direction to all weights: a random sign (hadamard) or number for each."""
    return {"hadamard": MIXING, "gaussian": DRAWING, "kron": 0.0}[bank] * body.parameters


def largest_tensor(body: Body) -> float:
    """Return about the numbers of the largest tensor of a base: its output, its embeddings or a layer."""
    layout = body.layout
    rest = body.parameters - block_parameters(layout, sizes(layout, None, 0.0))
    layers = [float(m * n) for m, n in body.modules.values()]
    # What is neither block nor head are embeddings, which a head may share.
    return max(float(layout.head), rest - layout.head, *layers)


def factor_numbers(body: Body, size: Sizes, ranks: Mapping[str, float]) -> float:
    """Return the numbers of an adapter whose modules have ranks of their own."""
    return sum(rank * sum(module_sides(body, name, size)) for name, rank in ranks.items())


def round_flops(
    body: Body,
    settings: PruningSettings | None,
    ratio: float,
    rank: int,
    work: Work,
    trained: Trained | None = None,
) -> float:
    """Return the operations of a round; tokens that only go forward, for scores and losses, cost half of a dense step's
    whatever is trained.
    """
    size = sizes(body.layout, settings, ratio)
    side = flops_per_token(body, size, rank, work) if work.side_tokens else 0.0
    return flops_per_token(body, size, rank, work, trained) * work.trained_tokens + 0.5 * side * work.side_tokens


def round_bytes(
    body: Body,
    settings: PruningSettings | None,
    ratio: float,
    rank: int,
    *,
    global_rank: float,
    wire_dtype: WireDtype,
    down_dtype: WireDtype | None = None,
    trained: Trained | None = None,
) -> tuple[float, float]:
    """Return (bytes down, bytes up) of a round: the sliced global change and the factors, modules_to_save, bitmaps.

    The change comes down whole; up go the factors of what was trained. A pruned client is sent the moments from which
    `pruning.repair` mends its layers, in every round.
    """
    size = sizes(body.layout, settings, ratio)
    sides = adapter_sides(body, size)
    factors = rank * sides if trained is None else factor_numbers(body, size, trained.ranks)
    # Two bitmaps of a bit per group: the structure and the previous one.
    groups = sum(b.heads + b.kv_heads + b.channels for b in body.layout.blocks) if settings else 0
    mended = settings is not None and settings.repair != "none" and ratio > 0
    moments = sum(map(prod, moment_shapes(settings, body.layout).values())) if settings and mended else 0
    return (
        BYTES[down_dtype or wire_dtype] * global_rank * sides
        + 4 * body.saved
        + groups / 4
        + TRAVELLING.itemsize * moments,
        BYTES[wire_dtype] * factors + 4 * body.saved,
    )


def roberta_base() -> Body:
    """Return RoBERTa-base with all six linear layers of a block adapted."""
    blocks = tuple(Block(f"roberta.encoder.layer.{i}", 12, 12, 64, 3072) for i in range(12))
    # The head: 768 x 768 and 768 x 2 with their biases.
    layout = BlockLayout("roberta", blocks, width=768, head=592_130, outputs=2, number_bytes=4)
    shapes = {name: _shape(layout, out, into) for name, (_, out, into) in layout.sides.items()}
    return Body(layout, shapes, parameters=124_647_170, saved=592_130, classifies=True)


def llama_7b() -> Body:
    """Return LLaMA-7B in 16 bits with all seven linear layers of a block adapted."""
    blocks = tuple(Block(f"model.layers.{i}", 32, 32, 128, 11008) for i in range(32))
    layout = BlockLayout("llama", blocks, width=4096, head=131_072_000, outputs=32000, number_bytes=2)
    shapes = {name: _shape(layout, out, into) for name, (_, out, into) in layout.sides.items()}
    return Body(layout, shapes, parameters=6_738_415_616)


def smollm2_135m() -> Body:
    """Return SmolLM2-135M in 32 bits with all seven linear layers of a block adapted."""
    blocks = tuple(Block(f"model.layers.{i}", 9, 3, 64, 1536) for i in range(30))
    layout = BlockLayout("llama", blocks, width=576, head=28_311_552, outputs=49_152, number_bytes=4)
    shapes = {name: _shape(layout, out, into) for name, (_, out, into) in layout.sides.items()}
    return Body(layout, shapes, parameters=134_515_008)


def _shape(layout: BlockLayout, out: Side, into: Side) -> tuple[int, int]:
    size = sizes(layout, None, 0.0)
    return int(_side(out, size, layout)), int(_side(into, size, layout))


PROXIES = {"roberta-base": roberta_base, "llama-7b": llama_7b, "smollm2-135m": smollm2_135m}
"""Larger models whose costs may be charged in place of those of the model that is trained."""
