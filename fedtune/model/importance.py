"""The importance of heads and channels to a client's data, by five criteria of different cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ClientError, ConfigError, Fault
from fedtune.model.batches import Batch
from fedtune.model.frozen import own_weight
from fedtune.model.lora import layers
from fedtune.model.lora_layer import FrozenParts
from fedtune.model.loss import summed_loss
from fedtune.model.moments import Moments
from fedtune.model.surgery import core
from fedtune.pruning.ranking import Criterion, at_structure
from fedtune.pruning.structure import BlockLayout, BlockStructure, ModelStructure, Side, full_block
from fedtune.seeds import derive, generator
from fedtune.tensors import Tensors

DECAY = 0.9
"""Share of the former value in the moving mean of `lora` over steps: about the last ten batches count."""

Gradients = Mapping[torch.nn.Parameter, torch.Tensor]
"""Gradients of LoRA factors, by factor."""


def scores(
    model: Any,
    batches: Sequence[Batch],
    criterion: Criterion,
    layout: BlockLayout,
    *,
    task: str,
    key: int,
    structure: ModelStructure | None = None,
    moments: Moments | None = None,
) -> Tensors:
    """Return the importance of every head and channel that a model has now, float32 (heads,) and (channels,).

    The keys are `heads` and `channels`; each runs over all blocks. The model is left as it is, and no gradient of it
    changes. FedSpine-style, formulas ours.

    Args:
        model: in eval mode, with its adapters if it has any; `lora` needs a trainable one.
        batches: of the client's data; magnitude and random need none.
        criterion: wanda (Sun et al., arXiv 2306.11695): mean square of a column's input times the squared norm of the
            column, LoRA branch included; gate: absolute derivative of the mean loss by a gate of 1; lora: see
            `sketch`; magnitude: squared weights of the base; random: drawn by the key.
        layout: of the base.
        task: causal or classification.
        key: of this round and client, for random.
        structure: what the model was pruned to; None if it is whole.
        moments: to which the inputs of the same layers are added, in the same passes where the criterion is wanda.

    Raises:
        ClientError: if a criterion that needs data gets none, or a score is not finite.
        ConfigError: if `lora` finds no trainable adapter on layers of heads, or of channels.
    """
    present = full_block(layout) if structure is None else structure
    if moments is not None and criterion != "wanda":
        listen_to_inputs(model, readers_of_units(layout), batches, moments.add, task=task)
    if criterion == "random":
        return random_scores(layout, structure, key)
    if criterion == "magnitude":
        return pool(magnitudes(model, layout), layout, present)
    if not batches:
        raise ClientError(f"{criterion}: expected at least one batch to score by; got none; give the client more data")
    if criterion == "wanda":
        return pool(wanda(model, batches, layout, task=task, moments=moments), layout, present)
    if criterion == "gate":
        return pool(gate_gradients(model, batches, layout, present, task=task), layout, present)
    mean: Tensors | None = None
    for batch in batches:
        mean = smooth(mean, sketch(model, layout, present, gradients=gradients(model, batch, task=task)))
    assert mean is not None  # there is at least one batch
    return mean


def random_scores(layout: BlockLayout, structure: ModelStructure | None, key: int) -> Tensors:
    """Return random scores; the score of a head does not depend on what else of the base is kept."""
    # Drawn over the whole base and then sliced, or clients of other structures would disagree on every head.
    rng = generator(derive(key, "prune"))
    sizes = {"heads": sum(b.heads for b in layout.blocks), "channels": sum(b.channels for b in layout.blocks)}
    drawn = at_structure({name: rng.random(size) for name, size in sizes.items()}, structure, layout)
    return {name: array.astype(np.float32) for name, array in drawn.items()}


def magnitudes(model: Any, layout: BlockLayout) -> Mapping[str, torch.Tensor]:
    """Return the squared norm of every row or column that a layer can lose, by the layer's name."""
    squares = {}
    for name, (_, out, _) in layout.sides.items():
        weight = matrix(core(model.get_submodule(name)), own=True)
        squares[name] = weight.square().sum(dim=0 if out == "all" else 1)
    return squares


def wanda(
    model: Any, batches: Sequence[Batch], layout: BlockLayout, *, task: str, moments: Moments | None = None
) -> Mapping[str, torch.Tensor]:
    """Return E[x_j^2] ||W_j + s B a_j||^2 of the columns j that read heads and channels, padding left out."""
    names = readers_of_units(layout)
    squares: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor, mask: torch.Tensor) -> None:
        total = (x.square() * mask.to(x.dtype)[..., None]).sum(dim=(0, 1)).cpu().double()
        squares[name] = squares[name] + total if name in squares else total
        if moments is not None:
            moments.add(name, x, mask)

    listen_to_inputs(model, names, batches, add, task=task)
    tokens = sum(batch.tokens for batch in batches)
    with torch.no_grad():
        return {name: squares[name] / tokens * column_norms(model.get_submodule(name)) for name in names}


def readers_of_units(layout: BlockLayout) -> Sequence[str]:
    """Return the names of the layers whose input is heads, then of those whose input is channels."""
    return [*readers(layout, "q"), *readers(layout, "ff")]


def listen_to_inputs(
    model: Any,
    names: Sequence[str],
    batches: Sequence[Batch],
    add: Callable[[str, torch.Tensor, torch.Tensor], None],
    *,
    task: str,
) -> None:
    """Send batches forward, and call `add` with name, input (batch, time, in) and mask of every layer named."""
    mask = torch.zeros(())

    def listen(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        # The mask is read from the loop below: padding would count as activity.
        return lambda _, args: add(name, widen(args[0]), mask)

    hooks = [model.get_submodule(name).register_forward_pre_hook(listen(name)) for name in names]
    try:
        with torch.no_grad():
            for batch in batches:
                mask = batch.attention_mask
                options = {"use_cache": False} if task == "causal" else {}
                # Without the head: its logits, as wide as the vocabulary, would be thrown away.
                model.base_model(**batch.inputs, **options)
    finally:
        for hook in hooks:
            hook.remove()


def column_norms(module: Any) -> torch.Tensor:
    """Return ||W_j + B a_j||^2 of every column, (in,), the changes beside the weight as A (r, in) and B (out, r)."""
    weight = matrix(core(module))
    for part in dense_changes(module):
        weight = weight + part
    squared = weight.square().sum(dim=0)
    # The norm of the sum from products of r rows, so that W + B A is never formed.
    if parts := low_rank_changes(module):
        a, b = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)
        squared = squared + 2 * ((weight.T @ b) * a.T).sum(dim=1) + (a * ((b.T @ b) @ a)).sum(dim=0)
    return squared.detach().cpu().double()


def low_rank_changes(module: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return a (r, in) and b (out, r), the scale folded in, of the changes beside a layer's weight: frozen, trained."""
    frozen: FrozenParts = getattr(module, "frozen", ())
    parts = [(widen(frozen[0]), widen(frozen[1]))] if len(frozen) == 2 else []
    if getattr(module, "a", None) is not None:
        parts.append((widen(module.a), widen(module.b) * module.scale))
    return parts


def dense_changes(module: Any) -> list[torch.Tensor]:
    """Return the frozen change beside a layer's weight where it is one matrix, (out, in)."""
    frozen: FrozenParts = getattr(module, "frozen", ())
    return [widen(frozen[0])] if len(frozen) == 1 else []


def gate_gradients(
    model: Any, batches: Sequence[Batch], layout: BlockLayout, structure: ModelStructure, *, task: str
) -> Mapping[str, torch.Tensor]:
    """Return dL/dm of a gate m = 1 on every head and channel, L the mean loss over all batches together."""
    names = readers_of_units(layout)
    sizes = [*(len(units.q) for units in structure.blocks), *(len(units.ff) for units in structure.blocks)]
    values = {}
    for name, size in zip(names, sizes, strict=True):
        weight = core(model.get_submodule(name)).weight
        values[name] = torch.ones(size, dtype=accumulation_dtype(weight), device=weight.device, requires_grad=True)
    count = max(1, sum(batch.count for batch in batches))
    sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in zip(names, sizes, strict=True)}
    with gates(model, values), torch.enable_grad():
        for batch in batches:
            loss = summed_loss(model, batch, task=task) / count
            # `grad` and not `backward`: the gradients that the parameters hold stay as they are.
            for name, gradient in zip(values, torch.autograd.grad(loss, list(values.values())), strict=True):
                sums[name] += gradient.cpu().double()
    return sums


def gradients(model: Any, batch: Batch, *, task: str) -> Gradients:
    """Return the gradients of a batch's mean loss by the trainable factors; their own `grad` stays as it is."""
    factors = [weight for layer in layers(model).values() for weight in (layer.a, layer.b) if weight.requires_grad]
    if not factors:
        raise no_adapter("no trainable adapter")
    with torch.enable_grad():
        loss = summed_loss(model, batch, task=task) / max(1, batch.count)
        return dict(zip(factors, torch.autograd.grad(loss, factors), strict=True))


def sketch(
    model: Any, layout: BlockLayout, structure: ModelStructure | None = None, *, gradients: Gradients | None = None
) -> Tensors:
    """Return the importance of heads and channels by the gradients of the LoRA factors alone: |sum of Ghat * W|.

    Ghat = g_B A + B g_A, with factors and gradients as the layer holds them, and W the base's weight with the frozen
    change; neither Ghat nor the frozen change is ever formed. The sum of a group is taken in each of its matrices,
    and its absolute values are added. Only adapted layers count.

    Args:
        model: with a trainable adapter `local`.
        layout: of the base.
        structure: what the model was pruned to; None if it is whole.
        gradients: of the factors; None takes the `grad` of a backward pass, before it is clipped or used.

    Raises:
        ConfigError: if no layer of heads, or none of channels, has a trainable adapter.
    """
    parts = sketch_layers(model, layout, gradients)
    kinds = {"channels" if prunable_side(layout, name) == "ff" else "heads" for name in parts}
    if missing := {"heads", "channels"} - kinds:
        raise no_adapter(f"no trained adapter on a layer of {' or '.join(sorted(missing))}")
    return pool(parts, layout, full_block(layout) if structure is None else structure)


def sketch_layers(model: Any, layout: BlockLayout, gradients: Gradients | None) -> Mapping[str, torch.Tensor]:
    """Return the sums of Ghat * W over the rows or columns that an adapted layer can lose, by the layer's name."""
    parts = {}
    with torch.no_grad():
        for name, layer in layers(model).items():
            if name not in layout.sides:
                continue
            # W without the trained adapter, whose change is as small as a round's steps; with it, as in LoRAPrune, a
            # temporary matrix as large as W would be needed.
            pair = [layer.a, layer.b]
            grads = [factor.grad if gradients is None else gradients.get(factor) for factor in pair]
            if grads[0] is None and grads[1] is None:
                continue
            a, b = (widen(factor) for factor in pair)  # (r, in), (out, r)
            g_a, g_b = (
                torch.zeros_like(factor) if grad is None else widen(grad)
                for factor, grad in zip((a, b), grads, strict=True)
            )
            # Products of W with r vectors in place of the (out, in) matrix Ghat.
            if layout.sides[name][1] == "all":
                parts[name] = (left(layer, g_b) * a.T).sum(dim=1) + (left(layer, b) * g_a.T).sum(dim=1)  # (in,)
            else:
                parts[name] = (g_b * right(layer, a.T)).sum(dim=1) + (b * right(layer, g_a.T)).sum(dim=1)  # (out,)
    return parts


def no_adapter(got: str) -> ConfigError:
    expected = "trained adapters on layers of heads and of channels, by whose gradients lora scores"
    return ConfigError(Fault("pruning.score", expected, got, 'set score = "wanda", or targets = ["all-linear"]'))


def right(module: Any, factor: torch.Tensor) -> torch.Tensor:
    """Return W @ factor, (out, k), W with the frozen change; factor is (in, k)."""
    product = matrix(core(module)) @ factor
    if module.frozen:
        change = factor
        for part in module.frozen:
            change = widen(part) @ change
        product = product + change
    return product


def left(module: Any, factor: torch.Tensor) -> torch.Tensor:
    """Return W^T @ factor, (in, k), W with the frozen change; factor is (out, k)."""
    product = matrix(core(module)).T @ factor
    if module.frozen:
        change = factor
        for part in reversed(module.frozen):
            change = widen(part).T @ change
        product = product + change
    return product


def smooth(before: Tensors | None, now: Tensors) -> Tensors:
    """Return the moving mean of scores over steps, which starts at the first step."""
    if before is None:
        return now
    rest = np.float32(1 - DECAY)
    return {name: np.float32(DECAY) * before[name] + rest * array for name, array in now.items()}


def pool(parts: Mapping[str, torch.Tensor], layout: BlockLayout, structure: ModelStructure) -> Tensors:
    """Return `heads` and `channels`, float32, from a number for every row or column that a layer can lose.

    `parts` are by the layer's name. The numbers of a head are summed within a layer, and the absolute values of the
    sums are added up over the layers.
    """
    # In float64 until the end: a sum over thousands of columns loses digits in float32.
    heads = [np.zeros(len(units.q)) for units in structure.blocks]
    channels = [np.zeros(len(units.ff)) for units in structure.blocks]
    for name, values in parts.items():
        index, side = layout.sides[name][0], prunable_side(layout, name)
        # Not normalised by layer: that would hide which layers matter, and cost more than a worse criterion.
        target = channels if side == "ff" else heads
        target[index] += unit_scores(values.detach().cpu().double(), side, structure.blocks[index]).numpy()
    pooled = {"heads": np.concatenate(heads), "channels": np.concatenate(channels)}
    for name, array in pooled.items():
        if not np.isfinite(array).all():
            raise ClientError(f"scores of {name}: expected finite numbers; got others; use another model.dtype")
    return {name: array.astype(np.float32) for name, array in pooled.items()}


def prunable_side(layout: BlockLayout, name: str) -> Side:
    """Return what the one prunable side of a layer consists of: heads or channels."""
    _, out, into = layout.sides[name]
    return into if out == "all" else out


def unit_scores(values: torch.Tensor, side: Side, units: BlockStructure) -> torch.Tensor:
    """Return a number for every head or channel; a key/value head's number is split equally among its query heads."""
    match side:
        case "ff":
            return values.abs()
        case "kv":
            group = len(units.q) // len(units.kv)
            return (values.reshape(len(units.kv), -1).sum(dim=1).abs() / group).repeat_interleave(group)
        case "qkv":
            return torch.stack([unit_scores(part, "q", units) for part in values.chunk(3)]).sum(dim=0)
        case _:
            return values.reshape(len(units.q), -1).sum(dim=1).abs()


def matrix(module: Any, *, own: bool = False) -> torch.Tensor:
    """Return a linear layer's weight as (out, in), in at least 32 bits; `own`: without a frozen change."""
    weight = widen((own_weight(module) if own else module.weight).detach())
    return weight.T if isinstance(module, Conv1D) else weight


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in at least 32 bits: squares and sums would lose their last digits in 16."""
    return tensor.to(accumulation_dtype(tensor))


def accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@contextmanager
def gates(model: Any, values: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    """Multiply the inputs of modules by gates inside the block; `values` are (groups,) by the module's full name.

    The hook sits on the LoRA layer where there is one: if it were on the layer beneath, the adapter would see the
    inputs that the gate hides, and send gradients back past it.
    """

    def gate(value: torch.Tensor) -> Callable[[torch.nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def multiply(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]  # (batch, time, in), each group `in / groups` columns in a row
            return x * value.to(x.dtype).repeat_interleave(x.shape[-1] // len(value)), *args[1:]

        return multiply

    hooks = [model.get_submodule(name).register_forward_pre_hook(gate(value)) for name, value in values.items()]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def readers(layout: BlockLayout, side: Side) -> list[str]:
    """Return the names of the layers whose input is heads (`q`) or channels (`ff`), one per block, in order."""
    return [name for name, (_, _, into) in layout.sides.items() if into == side]
