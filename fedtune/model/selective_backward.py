"""Selective backward: each block's forward pass is whole, its backward pass goes through a part of its units alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.functional import dropout, linear
from transformers.pytorch_utils import Conv1D

from fedtune.model.lora_layer import LoraLayer
from fedtune.model.surgery import core, layout_of, widths
from fedtune.pruning.structure import FAMILIES, Block, BlockLayout, BlockStructure, Side
from fedtune.seeds import derive, generator

OF_HEADS: tuple[Side, ...] = ("q", "kv", "qkv")


@dataclass(frozen=True)
class Segment:
    """Consecutive key/value heads (with their query heads) or channels of one block."""

    begin: int
    end: int
    trained: bool
    """Whether the backward pass goes through them."""


Segments: TypeAlias = Sequence[Segment]


def segments(begin: int, kept: int, size: int) -> Segments:
    """Return `size` units as segments of which `kept`, from `begin` on and around the end, are trained.

    Trained ones come first: what all segments share is computed there, with its gradient.

    >>> [(s.begin, s.end, s.trained) for s in segments(3, 2, 4)]
    [(3, 4, True), (0, 1, True), (1, 3, False)]
    """
    end = begin + kept
    trained = [(begin, min(end, size)), (0, end - size)]
    rest = [(end - size if end > size else 0, begin), (end, size)]
    return [Segment(a, b, which) for which, spans in ((True, trained), (False, rest)) for a, b in spans if a < b]


@dataclass(frozen=True)
class Part:
    """The half of a block that is a sum over heads, or over channels: what computes the terms, and what adds them."""

    module: str
    """Within the block; it takes hidden states, and gives what goes into `sink`, or comes out of it if that is its."""
    rows: Mapping[str, Side]
    """Layers within the module, by attribute: what their outputs consist of."""
    sink: str
    """Layer within the block that adds up the terms: its inputs are heads or channels."""
    heads: bool

    @property
    def inside(self) -> bool:
        """Whether the sink is called by the module, as in decoders, and not by another one after it."""
        return self.sink.startswith(f"{self.module}.")


def parts_of(family: str) -> Sequence[Part]:
    """Return the two halves of a family's blocks."""
    parts = []
    for heads in (True, False):
        sides = OF_HEADS if heads else ("ff",)
        rows = {layer: out for layer, (out, _) in FAMILIES[family].items() if out in sides}
        [sink] = (layer for layer, (_, into) in FAMILIES[family].items() if into in sides)
        module = next(iter(rows)).rpartition(".")[0]
        parts.append(Part(module, {name.removeprefix(f"{module}."): side for name, side in rows.items()}, sink, heads))
    return parts


def places(part: Segment, side: Side, block: Block) -> Sequence[slice]:
    """Return where a segment's rows (or columns) are in a layer's side; GPT-2's fused one has three places."""
    if side == "ff":
        return [slice(part.begin, part.end)]
    size = block.head_dim * (1 if side == "kv" else block.group)
    begin, end, width = part.begin * size, part.end * size, block.heads * block.head_dim
    return [slice(begin + at, end + at) for at in ((0, width, 2 * width) if side == "qkv" else (0,))]


def matrix(layer: Any) -> torch.Tensor:
    """Return the weight that a plain linear layer reads, as (out, in), without a copy."""
    weight: torch.Tensor = layer.weight
    return weight.T if isinstance(layer, Conv1D) else weight


@dataclass(eq=False)
class Beside:
    """What is added to some linear layer's output by low rank, before its last factor; shared by all segments."""

    local: torch.Tensor | None = None
    """scale * a @ dropout(x): (..., rank)"""
    frozen: torch.Tensor | None = None
    """What goes into the last matrix of the frozen change."""


class RowPart(nn.Module):
    """Gives some outputs of a linear layer, through views of its weight."""

    def __init__(self, layer: nn.Module, at: Sequence[slice], shared: Beside) -> None:
        super().__init__()
        # Not as a submodule: the layer stays where it is, under its own name.
        vars(self)["layer"], self.at, self.shared = layer, at, shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., rows) for x (..., in)."""
        outputs = [self.rows(x, at) for at in self.at]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def rows(self, x: torch.Tensor, at: slice) -> torch.Tensor:
        layer: Any = vars(self)["layer"]
        base = core(layer)
        result = linear(x, matrix(base)[at], None if base.bias is None else base.bias[at])
        if not isinstance(layer, LoraLayer):
            return result
        given, grad = result.dtype, torch.is_grad_enabled()
        if layer.frozen:
            if self.shared.frozen is None:
                self.shared.frozen = before_last(x, layer)
            result = result + linear(of(self.shared.frozen, grad), layer.frozen[-1][at])
        if layer.a is not None:
            if self.shared.local is None:
                self.shared.local = linear(dropped(x, layer), layer.a) * layer.scale
            result = result + linear(of(self.shared.local, grad), layer.b[at])
        return result.to(given)


def before_last(x: torch.Tensor, layer: LoraLayer) -> torch.Tensor:
    change = x.to(layer.frozen[0].dtype)
    for one in layer.frozen[:-1]:
        change = linear(change, one)
    return change


def dropped(x: torch.Tensor, layer: LoraLayer) -> torch.Tensor:
    """Return what goes into a trainable adapter."""
    x = x.to(layer.a.dtype)
    return dropout(x, layer.dropout) if layer.training and layer.dropout else x


def of(shared: torch.Tensor, grad: bool) -> torch.Tensor:
    return shared if grad else shared.detach()


def add_up(layer: Any, terms: Sequence[tuple[torch.Tensor, slice]]) -> torch.Tensor:
    """Return a linear layer's output for an input that comes in pieces, each with its place in the input.

    A piece without a gradient costs nothing in the backward pass, except that a trainable `a` learns from all pieces.
    """
    base = core(layer)
    weight, bias = matrix(base), base.bias
    result = sum_of(linear(z, weight[:, at], bias if index == 0 else None) for index, (z, at) in enumerate(terms))
    if not isinstance(layer, LoraLayer):
        return result
    given = result.dtype
    if layer.frozen:
        first, *rest = layer.frozen
        change = sum_of(linear(z.to(first.dtype), first[:, at]) for z, at in terms)
        for one in rest:
            change = linear(change, one)
        result = result + change
    if layer.a is not None:
        local = sum_of(linear(dropped(z, layer), layer.a[:, at]) for z, at in terms)
        result = result + linear(local * layer.scale, layer.b)
    return result.to(given)


def sum_of(tensors: Iterator[torch.Tensor]) -> torch.Tensor:
    total = next(tensors)
    for tensor in tensors:
        total = total + tensor
    return total


class Windows:
    """Draws, by block and anew for every step, the heads and channels that the backward pass goes through."""

    def __init__(self, back: float, key: int) -> None:
        self.back, self._key, self._step = back, key, 0

    def next_step(self) -> None:
        """Draw other ones from now on."""
        self._step += 1

    def of(self, half: Half) -> Segments:
        """Return the segments of one half of a block."""
        kept = max(1, round((1 - self.back) * half.size))
        key = derive(self._key, f"back.{half.part.module}", self._step, half.block.prefix)
        return segments(int(generator(key).integers(half.size)), kept, half.size)


@dataclass(frozen=True, eq=False)
class Half:
    """One half of one block of a model, with its LoRA layers attached."""

    part: Part
    block: Block
    family: str
    module: Any
    sink: Any

    @property
    def size(self) -> int:
        """Key/value heads, or channels."""
        return self.block.kv_heads if self.part.heads else self.block.channels

    def layers(self) -> Sequence[nn.Module]:
        return [*(self.module.get_submodule(name) for name in self.part.rows), self.sink]

    def learns(self, x: torch.Tensor) -> bool:
        """Return whether a backward pass will come here; if not, the plain forward pass is the cheaper one."""
        return x.requires_grad or any(p.requires_grad for layer in self.layers() for p in layer.parameters())

    def clones(self, chosen: Segments) -> Sequence[tuple[Segment, Any]]:
        """Return the module once for each segment, with views of the weights in place of its layers."""
        shared = {name: Beside() for name in self.part.rows}
        result = []
        for segment in chosen:
            replaced: dict[str, nn.Module] = {
                name: RowPart(self.module.get_submodule(name), places(segment, side, self.block), shared[name])
                for name, side in self.part.rows.items()
            }
            if self.part.inside:
                replaced[self.part.sink.removeprefix(f"{self.part.module}.")] = nn.Identity()
            result.append((segment, twin(self.module, replaced, self.sizes(segment))))
        return result

    def sizes(self, segment: Segment) -> Mapping[str, Any]:
        """Return the attributes of the module that follow from how many heads or channels it has."""
        count, block = range(segment.end - segment.begin), self.block
        whole = range(block.kv_heads), range(block.channels)
        groups, channels = (count, whole[1]) if self.part.heads else (whole[0], count)
        units = BlockStructure(tuple(range(len(groups) * block.group)), tuple(groups), tuple(channels))
        return widths(self.family, block, units).get(self.part.module, {})

    def columns(self, segment: Segment) -> slice:
        """Return where a segment is in the input of the sink."""
        return places(segment, "q" if self.part.heads else "ff", self.block)[0]

    def terms(self, chosen: Segments, args: Any, kwargs: Any) -> Sequence[tuple[torch.Tensor, slice]]:
        """Return what the segments give to the sink, each with its place there."""
        terms = []
        # New ones for each pass: what they share belongs to this input alone.
        for segment, module in self.clones(chosen):
            with nullcontext() if segment.trained else torch.no_grad():
                output = type(module).forward(module, *args, **kwargs)
            terms.append((output[0] if isinstance(output, tuple) else output, self.columns(segment)))
        return terms


def twin(module: Any, replaced: Mapping[str, nn.Module], values: Mapping[str, Any]) -> Any:
    """Return a module that shares everything with another, except for some submodules and attributes."""
    other = object.__new__(type(module))
    vars(other).update({**vars(module), "_modules": {**module._modules, **replaced}, **values})
    return other


@contextmanager
def with_selective_backward(model: Any, windows: Windows) -> Iterator[Any]:
    """Let the backward pass of a model go through the windows of each block alone, inside the block.

    Outputs stay what they are, up to the order of sums, and no weight is copied. Gradients are those of the same model
    in which the inputs of o_proj and down_proj (by their names in Llama) that lie outside of the windows are constants.
    Outside of the windows nothing is stored for the backward pass. Adapters must be attached before. Passes without
    gradients, and those with a cache, are the plain ones.

    Raises:
        ConfigError: for a model whose blocks are no sums over heads and channels; see `surgery.layout_of`.
    """
    halves = halves_of(model, layout_of(model))
    patched = dict[nn.Module, Any]()
    try:
        for half in halves:
            patch(patched, half.module, source(half, windows))
            if not half.part.inside:
                patch(patched, half.sink, sink(half, windows))
        yield model
    finally:
        for module, before in patched.items():
            vars(module).pop("forward")
            if before is not None:
                vars(module)["forward"] = before


def patch(patched: dict[nn.Module, Any], module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give a module another forward pass, and note the one that it had of its own."""
    patched[module] = vars(module).get("forward")
    vars(module)["forward"] = forward


def halves_of(model: Any, layout: BlockLayout) -> Sequence[Half]:
    """Return both halves of every block."""
    return [
        Half(
            part,
            block,
            layout.family,
            model.get_submodule(f"{block.prefix}.{part.module}"),
            model.get_submodule(f"{block.prefix}.{part.sink}"),
        )
        for block in layout.blocks
        for part in parts_of(layout.family)
    ]


def source(half: Half, windows: Windows) -> Callable[..., Any]:
    """Return the forward pass of the module that computes heads or channels, segment by segment."""
    plain = half.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        cached = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        if cached or not torch.is_grad_enabled() or not half.learns(x):
            return plain(*args, **kwargs)
        terms = half.terms(windows.of(half), args, kwargs)
        if half.part.inside:
            output = add_up(half.sink, terms)
        else:
            output = torch.cat([z for z, _ in sorted(terms, key=lambda term: term[1].start)], dim=-1)
        # Attention's second output are its weights, for callers that ask for them; in training there is none.
        return (output, None) if half.part.heads else output

    return forward


def sink(half: Half, windows: Windows) -> Callable[..., torch.Tensor]:
    """Return the forward pass of a layer that adds up what another module gives it."""
    plain = half.sink.forward

    def forward(z: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() or not half.learns(z):
            return plain(z)
        pieces = [(segment, half.columns(segment)) for segment in windows.of(half)]
        return add_up(half.sink, [(z[..., at] if s.trained else z[..., at].detach(), at) for s, at in pieces])

    return forward
