"""Selective backward: each block's forward pass is whole, its backward pass goes through a part of its units alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.functional import dropout, linear
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ClientError, ConfigError
from fedtune.model.lora_layer import LoraLayer
from fedtune.model.surgery import core, layout_of, refuse_codes, widths
from fedtune.pruning.structure import FAMILIES, Block, BlockStructure, Side
from fedtune.seeds import derive, generator

OF_HEADS: tuple[Side, ...] = ("q", "kv", "qkv")


@dataclass(frozen=True)
class Segment:
    """Consecutive key/value heads, with their query heads, or channels of one block."""

    begin: int
    end: int
    trained: bool
    """Whether the backward pass goes through them."""


Segments: TypeAlias = Sequence[Segment]
"""Of one half of a block, all that it has; trained ones come first."""


def segments(begin: int, count: int, size: int) -> Segments:
    """Return `size` units as segments, of which `count` units, from `begin` on and around the end, are trained.

    >>> [(part.begin, part.end, part.trained) for part in segments(3, 2, 4)]
    [(3, 4, True), (0, 1, True), (1, 3, False)]
    """
    end = begin + count
    trained = (begin, min(end, size)), (0, end - size)
    rest = (max(0, end - size), begin), (end, size)
    return [Segment(a, b, which) for which, spans in ((True, trained), (False, rest)) for a, b in spans if a < b]


class Windows:
    """Chooses by block the heads and channels that the backward pass goes through: a window of consecutive ones.

    So no weight is copied. After passes without gradients, such as those that measure the loss before training, it is
    the window whose units have added most to the outputs there; without any it is drawn anew for every step. Both
    follow from data and key: all processes of one client take the same.
    """

    def __init__(self, back: float, key: int) -> None:
        """Take the share that is left out, and a key from `derive`."""
        self._back, self._key, self._step = back, key, 0
        self._chosen = dict[tuple[str, int], Segments]()
        self._worth = dict[str, torch.Tensor]()

    def next_step(self) -> None:
        """Draw others from now on, where they are drawn."""
        self._step += 1
        self._chosen = {half: chosen for half, chosen in self._chosen.items() if half[0] in self._worth}

    def weigh(self, half: str, worth: torch.Tensor) -> None:
        """Add what each unit of one half of a block was worth in a pass; too late once windows are chosen."""
        if not self._chosen and not self._step:
            before = self._worth.get(half)
            self._worth[half] = worth if before is None else before + worth

    def of(self, half: str, size: int) -> Segments:
        """Return the segments of one half of a block, by the full name of its module; it has so many units."""
        if (half, size) not in self._chosen:
            count = max(1, round((1 - self._back) * size))
            if len(self._worth.get(half, range(size))) != size:  # of a model that has become smaller since
                del self._worth[half]
            if half not in self._worth:
                key = derive(self._key, "back.window", self._step, half)
                begin = int(generator(key).integers(size))
            else:
                begin = best_window(self._worth[half], count)
            self._chosen[half, size] = segments(begin, count, size)
        return self._chosen[half, size]


def best_window(worth: torch.Tensor, count: int) -> int:
    """Return where the window of so many units, around the end too, begins that is worth most; the first of equals.

    >>> best_window(torch.tensor([5.0, 0.0, 1.0, 4.0]), 2)
    3
    """
    sums = torch.cat([worth, worth[: count - 1]]).double().unfold(0, count, 1).sum(-1)
    return int(sums.argmax())


@dataclass(frozen=True)
class Part:
    """The half of a family's block that is a sum over heads, or over channels."""

    module: str
    """Within the block: what computes the terms, from hidden states."""
    rows: Mapping[str, Side]
    """Layers within the module, by attribute: what their outputs consist of."""
    sink: str
    """Layer within the block that adds up the terms: its inputs are heads or channels."""
    heads: bool

    @property
    def inside(self) -> str:
        """Attribute of the module that is the sink, as in decoders; empty where another module calls that."""
        return self.sink.removeprefix(f"{self.module}.") if self.sink.startswith(f"{self.module}.") else ""


def parts_of(family: str) -> Sequence[Part]:
    """Return the two halves of a family's blocks."""
    parts = []
    for sides in (OF_HEADS, ("ff",)):
        rows = {layer: out for layer, (out, _) in FAMILIES[family].items() if out in sides}
        [sink] = (layer for layer, (_, into) in FAMILIES[family].items() if into in sides)
        module = next(iter(rows)).rpartition(".")[0]
        own = {name.removeprefix(f"{module}."): side for name, side in rows.items()}
        parts.append(Part(module, own, sink, heads=sides is OF_HEADS))
    return parts


@dataclass(frozen=True, eq=False)
class Half:
    """One half of one block of a model, with its adapters attached."""

    name: str
    """Of the module in the model."""
    part: Part
    whole: Block
    """As it was when the block began."""
    family: str
    module: Any
    sink: Any

    @property
    def block(self) -> Block:
        """The block as it is now: a model that is pruned in stages becomes smaller between two steps."""
        size = {side: len(matrix(core(self.module.get_submodule(row)))) for row, side in self.part.rows.items()}
        if not self.part.heads:
            return replace(self.whole, channels=size["ff"])
        q, kv = (size.get(side, size.get("qkv", 0) // 3) // self.whole.head_dim for side in ("q", "kv"))
        return replace(self.whole, heads=q, kv_heads=kv)

    def segments(self, windows: Windows) -> tuple[Block, Segments]:
        """Return the block as it is now, and its units."""
        block = self.block
        return block, windows.of(self.name, block.kv_heads if self.part.heads else block.channels)

    def learns(self, x: torch.Tensor) -> bool:
        """Return whether a backward pass comes here for this input; if not, the plain forward pass is the cheaper."""
        layers = [*(self.module.get_submodule(row) for row in self.part.rows), self.sink]
        return x.requires_grad or any(p.requires_grad for layer in layers for p in layer.parameters())

    def copies(self, block: Block, chosen: Segments) -> Iterator[tuple[Segment, Any]]:
        """Yield for each segment the module with views of the weights in place of its layers."""
        beside = {row: Beside() for row in self.part.rows}
        for segment in chosen:
            replaced: dict[str, Any] = {
                row: Rows(self.module.get_submodule(row), places(segment, side, block), beside[row])
                for row, side in self.part.rows.items()
            }
            if self.part.inside:
                replaced[self.part.inside] = identity
            yield segment, twin(self.module, replaced, self.sizes(block, segment))

    def sizes(self, block: Block, segment: Segment) -> Mapping[str, Any]:
        """Return the attributes of the module that follow from how many heads or channels it has."""
        units = tuple(range(segment.end - segment.begin))
        kv, ff = (units, ()) if self.part.heads else (range(block.kv_heads), units)
        small = BlockStructure(tuple(range(len(kv) * block.group)), tuple(kv), ff)
        return widths(self.family, block, small).get(self.part.module, {})

    def column(self, block: Block, segment: Segment) -> slice:
        """Return where a segment is in the input of the sink."""
        return places(segment, "q" if self.part.heads else "ff", block)[0]


def identity(x: torch.Tensor) -> torch.Tensor:
    """Stand in for a sink that is applied later, to all segments at once."""
    return x


def places(part: Segment, side: Side, block: Block) -> Sequence[slice]:
    """Return where a segment's rows (or columns) are in a side of a layer; in GPT-2's fused one at three places."""
    if side == "ff":
        return [slice(part.begin, part.end)]
    size = block.head_dim * (1 if side == "kv" else block.group)
    begin, end, width = part.begin * size, part.end * size, block.heads * block.head_dim
    return [slice(begin + at, end + at) for at in ((0, width, 2 * width) if side == "qkv" else (0,))]


def matrix(layer: Any) -> torch.Tensor:
    """Return the weight that a plain linear layer reads as (out, in), without a copy."""
    weight: torch.Tensor = layer.weight
    return weight.T if isinstance(layer, Conv1D) else weight


def twin(module: Any, replaced: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """Return a module that shares everything with another, except for some submodules and attributes."""
    other = object.__new__(type(module))
    vars(other).update({**vars(module), "_modules": {**module._modules, **replaced}, **values})
    return other


@dataclass(eq=False)
class Beside:
    """What is added to a linear layer's output by low rank, up to the last factor: the same for all segments."""

    local: torch.Tensor | None = None
    """scale * a @ dropout(x): (..., rank)"""
    frozen: torch.Tensor | None = None
    """What the last matrix of the frozen change is applied to."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Gives some outputs of a linear layer, in the arithmetic of `LoraLayer`, through views of its weight."""

    layer: Any
    at: Sequence[slice]
    beside: Beside

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., rows) for x (..., in)."""
        outputs = [self.rows(x, at) for at in self.at]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def rows(self, x: torch.Tensor, at: slice) -> torch.Tensor:
        layer, base = self.layer, core(self.layer)
        result = linear(x, matrix(base)[at], None if base.bias is None else base.bias[at])
        if not isinstance(layer, LoraLayer):
            return result
        given = result.dtype
        # Computed by the first segment, which is trained; the others are without gradients, and so is what they read.
        if layer.frozen:
            if self.beside.frozen is None:
                self.beside.frozen = reduce(linear, layer.frozen[:-1], x.to(layer.frozen[0].dtype))
            result = result + linear(self.beside.frozen, layer.frozen[-1][at])
        if layer.a is not None:
            if self.beside.local is None:
                self.beside.local = linear(factor_input(x, layer), layer.a) * layer.scale
            result = result + linear(self.beside.local, layer.b[at])
        return result.to(given)


def factor_input(x: torch.Tensor, layer: LoraLayer) -> torch.Tensor:
    """Return what a layer's trainable factors are applied to."""
    x = x.to(layer.a.dtype)
    return dropout(x, layer.dropout) if layer.training and layer.dropout else x


def add_up(layer: Any, terms: Sequence[tuple[torch.Tensor, slice]]) -> torch.Tensor:
    """Return a linear layer's output for an input in pieces, each with its place, in the arithmetic of `LoraLayer`.

    A piece that is constant costs nothing in the backward pass, except that a trainable `a` learns from every piece.
    """
    base = core(layer)
    weight = matrix(base)
    # The bias once, and within a product: under autocast a sum with it would be of 32 bits.
    result = total(linear(z, weight[:, at], None if i else base.bias) for i, (z, at) in enumerate(terms))
    if not isinstance(layer, LoraLayer):
        return result
    given = result.dtype
    if layer.frozen:
        first, *rest = layer.frozen
        result = result + reduce(linear, rest, total(linear(z.to(first.dtype), first[:, at]) for z, at in terms))
    if layer.a is not None:
        local = total(linear(factor_input(z, layer), layer.a[:, at]) for z, at in terms)
        result = result + linear(local * layer.scale, layer.b)
    return result.to(given)


def total(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the sum of tensors, at least one, without a zero before them."""
    return reduce(add, tensors)


@contextmanager
def with_selective_backward(model: Any, windows: Windows) -> Iterator[Any]:
    """Let the backward pass of a model go through the windows of each block alone, inside the block.

    Outputs stay what they are, up to the order of sums. Gradients are those of the same model in which the inputs of
    o_proj and down_proj (by their names in Llama) outside of the windows are constants: of what lies outside nothing
    is stored for the backward pass, and no matrix is multiplied there. No weight is copied. Passes without gradients,
    and those that fill a cache, are the plain ones. Adapters must have been attached before.

    Raises:
        ClientError: for a model whose blocks are no sums over heads and channels that are known.
    """
    patched, hooks = dict[nn.Module, Any](), list[RemovableHandle]()
    try:
        for half in halves_of(model):
            hooks.append(half.sink.register_forward_pre_hook(partial(weigh, half, windows)))
            patch(patched, half.module, source(half, windows))
            if not half.part.inside:
                patch(patched, half.sink, sink(half, windows))
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        for module, before in patched.items():
            if before is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = before


def weigh(half: Half, windows: Windows, module: Any, args: tuple[Any, ...]) -> None:
    """Tell windows how much each head or channel adds to the output of a sink: |z|^2 |W|^2, by its columns W."""
    if torch.is_grad_enabled():
        return
    # In 32 bits, as sums over a batch; the norm is computed without such a copy of the weight.
    size = torch.linalg.vector_norm(matrix(core(module)), dim=0, dtype=torch.float32)
    columns = (args[0].detach().float() * size).square().flatten(0, -2).sum(0)
    units = half.block.kv_heads if half.part.heads else half.block.channels
    windows.weigh(half.name, columns.unflatten(0, (units, -1)).sum(-1).cpu())


def patch(patched: dict[nn.Module, Any], module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give a module another forward pass, and note the one that it has of its own, if any."""
    patched[module] = vars(module).get("forward")
    vars(module)["forward"] = forward


def halves_of(model: Any) -> Sequence[Half]:
    """Return both halves of every block of a model.

    Raises:
        ClientError: for a model of another family, or whose projections are fused, quantised or experts.
    """
    try:
        layout = layout_of(model)
        refuse_codes(model, layout)
    except ConfigError as error:
        [fault] = error.faults
        raise ClientError(
            f"backward passes through a part of heads and channels: expected {fault.expected}; got {fault.got}; let "
            "the planner choose fewer blocks (top) or fewer steps (share) in place of back"
        ) from error
    halves = []
    for block in layout.blocks:
        for part in parts_of(layout.family):
            name = f"{block.prefix}.{part.module}"
            sums = model.get_submodule(f"{block.prefix}.{part.sink}")
            halves.append(Half(name, part, block, layout.family, model.get_submodule(name), sums))
    return halves


def source(half: Half, windows: Windows) -> Callable[..., Any]:
    """Return the forward pass of the module that computes heads or channels: one segment after the other."""
    plain = half.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        fills = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        if fills or not torch.is_grad_enabled() or not half.learns(x):
            return plain(*args, **kwargs)
        block, chosen = half.segments(windows)
        terms = []
        for segment, module in half.copies(block, chosen):
            with nullcontext() if segment.trained else torch.no_grad():
                output = type(module).forward(module, *args, **kwargs)
            terms.append((output[0] if half.part.heads else output, half.column(block, segment)))
        if half.part.inside:
            output = add_up(half.sink, terms)
        else:
            output = torch.cat([z for z, _ in sorted(terms, key=lambda term: term[1].start)], dim=-1)
        # The second are the weights of attention, for those who ask for them, as no training does.
        return (output, None) if half.part.heads else output

    return forward


def sink(half: Half, windows: Windows) -> Callable[..., Any]:
    """Return the forward pass of a layer that adds up what another module hands it, as in encoders."""
    plain = half.sink.forward

    def forward(x: torch.Tensor) -> Any:
        if not torch.is_grad_enabled() or not half.learns(x):
            return plain(x)
        block, chosen = half.segments(windows)
        pieces = [(x[..., (at := half.column(block, s))], at, s.trained) for s in chosen]
        return add_up(half.sink, [(z if trained else z.detach(), at) for z, at, trained in pieces])

    return forward
