"""The memory that a client's work needs at its peak, by part, as autograd stores it for each family of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Literal

from fedtune.devices.cost import Body, Sizes, block_parameters, module_sides, sizes
from fedtune.messages import BaseDtype
from fedtune.pruning.depth import block_of
from fedtune.pruning.ranking import PruningSettings

RUNTIME_BYTES: Mapping[str, float] = {"cpu": 0.48e9, "cuda": 0.5e9}
"""What the libraries take. cpu: between a client's process (.43) and one that plans and simulates too (.54), measured;
cuda: assumed."""
HEAP: Mapping[str, float] = {"cpu": 1.5, "cuda": 1.0}
"""Memory that a process takes for each byte of tensors that come and go. cpu: glibc's heap, 1.3 to 1.7 measured on four
models; cuda: torch counts the tensors alone."""
LINEAR_BITS: Mapping[BaseDtype, float] = {"nf4": 4 + 32 / 64, "int8": 8.0}
"""Of a weight of a linear layer, with its share of the scales."""
CHUNK_BYTES: Mapping[str, float] = {"cpu": 32 * 2.0**20, "cuda": 256 * 2.0**20}
"""Of float32 logits at a time, where the loss is taken in chunks; see `model.fused_loss`."""
LOGIT_BYTES = 12
"""Per token and entry of the vocabulary where it is not: log-probabilities and two gradients, in float32."""
PACKED = 1.15
"""Tokens of packed rows, padding included, for each token of their examples (assumed)."""
SLIGHT = 64
"""A frozen change that costs less than one in so many of its layer's operations gets no weight of its own."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a client's work, by what they are for."""

    weights: float
    """The frozen base, and with autocast its copy in 16 bits."""
    frozen_change: float
    """The global change: a second copy of every adapted weight, or matrices beside it."""
    adapters: float
    """What is trained, and its initial values."""
    optimizer: float
    """Gradients and the optimizer's moments."""
    activations: float
    """What the forward pass stores for the backward pass, and what one block needs beside it while it computes."""
    logits: float
    """Output and loss."""
    runtime: float
    """The interpreter and its libraries; on a GPU, its context."""

    @property
    def total(self) -> float:
        return sum(self.by_part().values())

    def by_part(self) -> Mapping[str, float]:
        """Return the bytes of each part, by name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True)
class Footprint:
    """What of a client's work its memory depends on."""

    ranks: Mapping[str, float]
    """LoRA rank of each module that is trained, by full name."""
    rows: int
    """Examples per forward pass."""
    longest: float
    """Tokens of the longest example, to which the others of its batch are padded."""
    mean: float = 0.0
    """Tokens of an example on average; read where rows are packed."""
    ratio: float = 0.0
    """Share of the blocks' weights that is pruned."""
    whole: bool = False
    """Whether the whole base stays in memory beside the pruned one, as it does in a client of fedtune."""
    back: float = 0.0
    """Share of heads and channels that the backward pass leaves out."""
    base_dtype: BaseDtype = ""
    """Number format of the linear layers' weights; empty: the base's own."""
    global_rank: float = 0.0
    """Of the frozen change beside the adapters."""
    checkpointing: bool = False
    packed: bool = False
    fused: bool = True
    """Whether the loss of a causal model is taken in chunks, never holding all logits."""
    half: bool = False
    """Whether products are rounded to 16 bits (autocast) though the weights are not."""
    eager: bool = False
    """Whether attention stores its scores, (heads, time, time) per example; torch's own kernel stores none."""
    dropout: bool = False
    """On the adapters' inputs."""
    start_copy: bool = False
    """A second copy of all that is trained stays as it was received (FedProx)."""
    moments: int = 2
    """Numbers that the optimizer remembers of each trained one: 2 of AdamW, 1 of SGD with momentum, else 0."""
    forward_only: bool = False
    """No backward pass: losses are measured at several positions (FedKSeed)."""
    descends: Literal["", "rewritten", "beside"] = ""
    """With a backward pass and nothing trained but the numbers of seeds. rewritten: every tensor has a gradient, one at
    a time; beside: only small products beside the frozen weights have."""
    moved: float = 0.0
    """Numbers of the base that are copied in order to be moved; of `forward_only` and `descends`."""
    gradient: float = 0.0
    """Numbers of the largest tensor that has a gradient; of `descends`."""
    device: Literal["cpu", "cuda"] = "cuda"
    """What the bytes are counted on."""
    heap: float | None = None
    """In place of `HEAP`, as measured on the machine."""
    runtime: float | None = None
    """In place of `RUNTIME_BYTES`."""


@dataclass(frozen=True)
class Stored:
    """What a block of a family stores for its backward pass, in numbers per token."""

    norms: float
    """Inputs of norms, in widths of the residual stream."""
    wide_norms: bool
    """Whether norms compute, and store, in float32 whatever the base's format."""
    channels: float
    """Of the feed-forward part: activations and their inputs, in its width."""
    work: float
    """While its feed-forward part goes backward, beside what is stored: in its width."""
    work_again: float
    """The share of `work` where activations are computed again: what is read then is let go of."""
    head_norms: bool = False
    """Whether queries and keys have norms of their own."""


LLAMA, GPT2, BERT = (
    Stored(norms=2, wide_norms=True, channels=3, work=3, work_again=0.5),
    Stored(norms=2, wide_norms=False, channels=4, work=6, work_again=0.5),
    Stored(norms=2, wide_norms=False, channels=1, work=2, work_again=1),
)
STORED: Mapping[str, Stored] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": Stored(norms=2, wide_norms=True, channels=3, work=3, work_again=0.5, head_norms=True),
    "gpt2": GPT2,
    "bert": BERT,
    "roberta": BERT,
}
"""By family, as transformers' layers compute: read from autograd's graph, and held against it by the tests."""
ATTENTION, RESIDUAL = 4, 2
"""Widths that attention stores (queries, repeated keys and values, output), and streams that a block works with."""
ONE_INPUT: Mapping[str, str] = {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "attention.self.key": "attention.self.query",
    "attention.self.value": "attention.self.query",
}
"""Layers that read the same tensor as another one of their block."""
FREE_INPUT = ("self_attn.o_proj", "attn.c_proj", "attention.output.dense")
"""Layers whose input is attention's output, which it stores in any case."""


@dataclass(frozen=True)
class Rates:
    """What a client's memory consists of before its batches are known; many clients have these in common."""

    weights: float
    frozen_change: float
    adapters: float
    optimizer: float
    stored: float
    """Bytes per token for the backward pass."""
    stored_by_length: float
    """Likewise, and per token of the longest example: masks and scores of attention."""
    working: float
    """Bytes per token while one block computes."""
    working_by_length: float


def memory(body: Body, settings: PruningSettings | None, work: Footprint) -> Memory:
    """Return the memory at the peak of a client's work.

    The parts are those of the moment when most is in memory: after the last forward pass of a step, while the loss or
    the last block's feed-forward part goes backward, with the optimizer's moments of earlier steps.
    """
    return memory_at(rates(body, settings, work), body, work)


def memory_at(known: Rates, body: Body, work: Footprint) -> Memory:
    """Return the same from rates, of which only the batch's rows and lengths are not a part."""
    if ahead := body.virtual + body.prefix:
        work = replace(work, longest=work.longest + ahead, mean=work.mean + ahead)
    heap, tokens, loss = work.heap or HEAP[work.device], tokens_of(work), loss_bytes(body, work)
    working = tokens * (known.working + known.working_by_length * work.longest)
    return Memory(
        weights=known.weights,
        frozen_change=known.frozen_change,
        adapters=known.adapters,
        optimizer=known.optimizer,
        # Loss and the last block's backward pass follow each other: the larger one decides.
        activations=heap * (tokens * (known.stored + known.stored_by_length * work.longest) + max(0.0, working - loss)),
        logits=heap * loss,
        runtime=RUNTIME_BYTES[work.device] if work.runtime is None else work.runtime,
    )


def rates(body: Body, settings: PruningSettings | None, work: Footprint) -> Rates:
    """Return what memory follows from, apart from `rows`, `longest`, `mean` and `packed`."""
    size = sizes(body.layout, settings, work.ratio)
    trained = sum(rank * sum(module_sides(body, name, size)) for name, rank in work.ranks.items()) + body.saved
    if work.forward_only or work.descends:
        trained = 0
    stored, working = activations(body, size, work)
    return Rates(
        weights=weight_bytes(body, settings, size, work),
        frozen_change=change_bytes(body, size, work) if work.global_rank else 0.0,
        adapters=4 * trained * (2 + work.start_copy),
        optimizer=4 * trained * (1 + work.moments) + work.gradient * gradient_bytes(body),
        stored=stored.constant,
        stored_by_length=stored.by_length,
        working=working.constant,
        working_by_length=working.by_length,
    )


def gradient_bytes(body: Body) -> float:
    """Return the bytes of a number of a gradient that is projected: its own format's, and a copy in float32 beside it.

    Where that is float32 already, none is made.
    """
    return body.layout.number_bytes + (4 if body.layout.number_bytes < 4 else 0)


def weight_bytes(body: Body, settings: PruningSettings | None, size: Sizes, work: Footprint) -> float:
    """Return the bytes of the frozen base: linear layers in their format, all else in the checkpoint's."""
    layout = body.layout
    whole, left = block_parameters(layout, sizes(layout, None, 0.0)), block_parameters(layout, size)
    bits = LINEAR_BITS.get(work.base_dtype, 8.0 * layout.number_bytes)
    present = left if not work.whole or work.ratio == 0 else whole + left
    total = (body.parameters - whole) * layout.number_bytes + present * bits / 8
    if work.base_dtype:
        # One layer's weight at a time is a number again.
        total += max(_numbers(body, name, size) for name in layout.sides) * layout.number_bytes
    if work.half and layout.number_bytes == 4 and not work.forward_only:
        total += 2 * left  # autocast's copies, which the backward pass reads again
    return total + work.moved * layout.number_bytes


def _numbers(body: Body, name: str, size: Sizes) -> float:
    m, n = module_sides(body, name, size)
    return m * n


def change_bytes(body: Body, size: Sizes, work: Footprint) -> float:
    """Return the bytes of the global change: see `model.frozen` for when it is a weight and when it stays factors."""
    total, exact = 0.0, body.layout.number_bytes == 4 and not work.half and not work.base_dtype
    for name in body.modules:
        m, n = module_sides(body, name, size)
        sides, rank = m + n, min(work.global_rank, m, n)
        factors = 4 * rank * sides
        total += factors  # as received
        if exact and SLIGHT * rank * sides > m * n:
            total += 4 * m * n
        elif 2 * rank * sides < m * n:
            total += factors
        else:
            total += 2 * m * n
    return total


def tokens_of(work: Footprint) -> float:
    """Return the tokens of a batch, padding included."""
    padded = work.rows * work.longest
    if not work.packed:
        return padded
    return min(padded, work.longest * ceil(PACKED * work.rows * (work.mean or work.longest) / work.longest))


@dataclass(frozen=True)
class PerToken:
    """Bytes per token: a constant, and some for each token of the longest example."""

    constant: float
    by_length: float = 0.0

    def __add__(self, other: PerToken) -> PerToken:
        return PerToken(self.constant + other.constant, self.by_length + other.by_length)

    def times(self, factor: float) -> PerToken:
        return PerToken(self.constant * factor, self.by_length * factor)


def activations(body: Body, size: Sizes, work: Footprint) -> tuple[PerToken, PerToken]:
    """Return (bytes stored for the backward pass, bytes that one block works with beside them), per token."""
    layout, family = body.layout, STORED[body.layout.family]
    number = 2 if layout.number_bytes == 2 or work.half else 4
    streams, heads = RESIDUAL * layout.width, size.q * layout.blocks[0].head_dim
    if work.forward_only:
        # Nothing is stored: the feed-forward part's widest moment, or attention's.
        widest = max(max(family.channels, 2) * size.ff, (ATTENTION + 1) * heads) + streams
        return PerToken(0.0), PerToken(number * widest, 2 * number * size.q if work.eager else 0.0)
    working = PerToken(number * (family.work * size.ff + streams))
    if work.eager:
        working = PerToken(number * 3 * layout.width, number * 2 * size.q)
    by_block: dict[int, list[str]] = {}
    for name in work.ranks:
        place = layout.sides[name][0] if name in layout.sides else block_of(name, layout) or 0
        by_block.setdefault(place, []).append(name)
    # The gradient of virtual tokens comes through every block.
    lowest = 0 if body.virtual or body.prefix else min(by_block, default=len(layout.blocks))
    places = range(lowest, len(layout.blocks))
    per_block = [block_bytes(body, size, work, by_block.get(place, ())) for place in places]
    if work.checkpointing and per_block:
        # The input of every block, for gradients are asked for from the embeddings on; then one block at a time.
        inputs = PerToken(len(layout.blocks) * layout.width * layout.number_bytes)
        return inputs, max(per_block, key=lambda each: each.constant) + working.times(family.work_again)
    return sum(per_block, PerToken(0.0)), working


def block_bytes(body: Body, size: Sizes, work: Footprint, modules: Sequence[str]) -> PerToken:
    """Return the bytes per token that one block stores for its backward pass, with adapters on some of its layers."""
    layout, family = body.layout, STORED[body.layout.family]
    alive = 1 - work.back  # of heads and channels; norms and the residual stream are whole
    half = layout.number_bytes == 2 or work.half
    number = 2 if half else 4
    heads = size.q * alive
    q, kv = heads * layout.blocks[0].head_dim, size.kv * alive * layout.blocks[0].head_dim
    total = family.norms * layout.width * (4 if family.wide_norms else layout.number_bytes)
    total += family.channels * size.ff * alive * number
    if family.head_norms:
        total += (q + kv) * 4
    by_length = float(number)  # the mask of a padded batch
    if work.eager:
        total += 3 * q * number
        by_length += heads * (6 if half and family.wide_norms else number)
    else:
        total += ATTENTION * q * number + heads * 4
    return PerToken(total + input_bytes(body, size, work, modules), by_length)


def input_bytes(body: Body, size: Sizes, work: Footprint, modules: Sequence[str]) -> float:
    """Return the bytes per token of what adapters store: their inputs, and what their first factor gives."""
    layout, inputs, total = body.layout, set[str](), 0.0
    for name in modules:
        total += (2 if work.half else 4) * work.ranks[name]
        into = module_sides(body, name, size)[1]
        block = layout.sides[name][0] if name in layout.sides else None
        leaf = name if block is None else name.removeprefix(f"{layout.blocks[block].prefix}.")
        if work.descends == "beside":
            continue  # the first factor is drawn and never trained: its input is not read again
        if work.descends:
            # The layer reads its own input again, in its own format, for the gradient of its weight.
            source = ONE_INPUT.get(leaf, leaf)
            if source not in inputs and (leaf not in FREE_INPUT or work.eager):
                inputs.add(source)
                total += into * (2 if layout.number_bytes == 2 or work.half else 4)
        elif work.dropout:
            total += into * (6 if work.half else 8)  # what is left of it, and the mask as numbers
        elif work.half:
            total += 2 * into  # autocast makes a copy for each
        elif layout.number_bytes == 2:
            total += 4 * into  # as does the adapter, whose factors are float32
        elif leaf not in FREE_INPUT or work.eager:
            source = ONE_INPUT.get(leaf, leaf)
            if source not in inputs:
                inputs.add(source)
                total += 4 * into
    return total


def loss_bytes(body: Body, work: Footprint) -> float:
    """Return the bytes of output and loss: of one chunk, or of all logits; of a classifier next to none."""
    layout, tokens = body.layout, tokens_of(work)
    if body.classifies:
        return 4.0 * work.rows * layout.outputs * 3
    half = layout.number_bytes == 2 or work.half
    if not work.fused:
        return tokens * layout.outputs * LOGIT_BYTES
    chunk = min(4.0 * tokens * layout.outputs, CHUNK_BYTES[work.device]) * (1.5 if half else 1.0)
    # The hidden states that count, and their gradient.
    hidden = tokens * layout.width * (2 if half else 4)
    return chunk + hidden * (1 if work.forward_only else 2)
