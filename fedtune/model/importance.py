"""What a head or channel of a model is worth to a client's data, by five criteria of different cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ClientError, ConfigError, Fault
from fedtune.model.lora import layers
from fedtune.model.surgery import core, gates, readers
from fedtune.model.train import Batch, summed_loss
from fedtune.pruning.ranking import Criterion, at_structure
from fedtune.pruning.structure import BlockLayout, BlockStructure, ModelStructure, Side, full_block
from fedtune.seeds import derive, generator
from fedtune.tensors import Tensors

DECAY = 0.9
"""Share of the former value in the moving mean of `lora` over steps."""

Gradients = Mapping[torch.nn.Parameter, torch.Tensor]


def scores(
    model: Any,
    batches: Sequence[Batch],
    criterion: Criterion,
    anatomy: BlockLayout,
    *,
    task: str,
    key: int,
    keep: ModelStructure | None = None,
) -> Tensors:
    """Return what every head and channel that a model has now is worth: `heads` and `channels` over all blocks.

    The model is left as it is, and no gradient of it changes. FedSpine-style, formulas ours.

    Args:
        model: in eval mode, with its adapters if it has any; `lora` needs a trainable one.
        batches: a client's own; magnitude and random need none.
        criterion: wanda: mean square of what enters a column, times the squared norm of the column, LoRA branch
            included; gate: absolute derivative of the mean loss by a gate of 1; lora: see `sketch`; magnitude: squared
            weights of the base; random: what the key says.
        anatomy: of the base.
        task: causal or classification.
        key: of this round and client, for random.
        keep: what the model was pruned to; None if it is whole.

    Raises:
        ClientError: if a criterion that needs data gets none, or a score is not finite.
        ConfigError: if `lora` finds no trainable adapter on layers of heads, or of channels.
    """
    kept = full_block(anatomy) if keep is None else keep
    if criterion == "random":
        return at_random(anatomy, keep, key)
    if criterion == "magnitude":
        return pool(magnitudes(model, anatomy), anatomy, kept)
    if not batches:
        raise ClientError(f"{criterion}: expected at least one batch to score by; got none; give the client more data")
    if criterion == "wanda":
        return pool(wanda(model, batches, anatomy, task=task), anatomy, kept)
    if criterion == "gate":
        return pool(gate(model, batches, anatomy, kept, task=task), anatomy, kept)
    found: Tensors | None = None
    for batch in batches:
        found = smooth(found, sketch(model, anatomy, kept, gradients=gradients(model, batch, task=task)))
    assert found is not None
    return found


def at_random(anatomy: BlockLayout, keep: ModelStructure | None, key: int) -> Tensors:
    """Return scores that are the same for a head whatever else of the base is kept."""
    rng = generator(derive(key, "prune"))
    sizes = {"heads": sum(b.heads for b in anatomy.blocks), "channels": sum(b.channels for b in anatomy.blocks)}
    found = at_structure({name: rng.random(size) for name, size in sizes.items()}, keep, anatomy)
    return {name: array.astype(np.float32) for name, array in found.items()}


def magnitudes(model: Any, anatomy: BlockLayout) -> Mapping[str, torch.Tensor]:
    found = {}
    for name, (_, out, _) in anatomy.sides.items():
        weight = matrix(core(model.get_submodule(name)))
        found[name] = weight.square().sum(dim=0 if out == "all" else 1)
    return found


def wanda(model: Any, batches: Sequence[Batch], anatomy: BlockLayout, *, task: str) -> Mapping[str, torch.Tensor]:
    """Return E[x_j^2] ||W_j + s B a_j||^2 of the columns j that heads and channels are read by, padding left out."""
    names = [*readers(anatomy, "q"), *readers(anatomy, "ff")]
    squares: dict[str, torch.Tensor] = {}
    mask = torch.zeros(())

    def listen(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = widened(args[0])  # (batch, time, in)
            total = (x.square() * mask.to(x.dtype)[..., None]).sum(dim=(0, 1)).cpu().double()
            squares[name] = squares[name] + total if name in squares else total

        return add

    hooks = [model.get_submodule(name).register_forward_pre_hook(listen(name)) for name in names]
    try:
        with torch.no_grad():
            for batch in batches:
                mask = batch.attention_mask
                options = {"use_cache": False} if task == "causal" else {}
                # Without the head: its logits, as wide as the vocabulary, would be thrown away.
                model.base_model(input_ids=batch.input_ids, attention_mask=mask, **options)
            tokens = sum(batch.tokens for batch in batches)
            return {name: squares[name] / tokens * column_norms(model.get_submodule(name)) for name in names}
    finally:
        for hook in hooks:
            hook.remove()


def column_norms(module: Any) -> torch.Tensor:
    """Return ||W_j + B a_j||^2 of every column, (in,), all active adapters stacked into A (r, in) and B (out, r)."""
    weight = matrix(core(module))
    squared = weight.square().sum(dim=0)
    parts = [
        (widened(module.lora_A[name].weight), widened(module.lora_B[name].weight) * module.scaling[name])
        for name in getattr(module, "lora_A", {})
        if name in module.active_adapters
    ]
    if parts:
        a, b = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)
        squared = squared + 2 * ((weight.T @ b) * a.T).sum(dim=1) + (a * ((b.T @ b) @ a)).sum(dim=0)
    return squared.detach().cpu().double()


def gate(
    model: Any, batches: Sequence[Batch], anatomy: BlockLayout, kept: ModelStructure, *, task: str
) -> Mapping[str, torch.Tensor]:
    """Return dL/dm of a gate m on every head and channel, L the mean loss over all batches together."""
    names = [*readers(anatomy, "q"), *readers(anatomy, "ff")]
    sizes = [*(len(one.q) for one in kept.blocks), *(len(one.ff) for one in kept.blocks)]
    values = {}
    for name, size in zip(names, sizes, strict=True):
        weight = core(model.get_submodule(name)).weight
        values[name] = torch.ones(size, dtype=accumulation_dtype(weight), device=weight.device, requires_grad=True)
    count = max(1, sum(batch.count for batch in batches))
    found = {name: torch.zeros(size, dtype=torch.float64) for name, size in zip(names, sizes, strict=True)}
    with gates(model, values), torch.enable_grad():
        for batch in batches:
            loss = summed_loss(model, batch, task=task) / count
            for name, gradient in zip(values, torch.autograd.grad(loss, list(values.values())), strict=True):
                found[name] += gradient.cpu().double()
    return found


def gradients(model: Any, batch: Batch, *, task: str) -> Gradients:
    """Return the gradients of a batch's mean loss by the trainable factors, which keep their own `grad`."""
    factors = [
        weight
        for layer in layers(model, "local").values()
        for weight in (layer.lora_A["local"].weight, layer.lora_B["local"].weight)
        if weight.requires_grad
    ]
    if not factors:
        raise no_adapter("no trainable adapter")
    with torch.enable_grad():
        loss = summed_loss(model, batch, task=task) / max(1, batch.count)
        return dict(zip(factors, torch.autograd.grad(loss, factors), strict=True))


def sketch(
    model: Any, anatomy: BlockLayout, keep: ModelStructure | None = None, *, gradients: Gradients | None = None
) -> Tensors:
    """Return what heads and channels are worth by the gradients of the LoRA factors alone: |sum of Ghat * W|.

    Ghat = g_B A + B g_A, with factors and gradients as peft holds them, and W the base's weight with the frozen
    adapter; neither Ghat nor the frozen change is ever formed. The sum of a group is taken in each of its matrices,
    and its absolute values are added. Only adapted layers count.

    Args:
        model: with a trainable adapter `local`.
        anatomy: of the base.
        keep: what the model was pruned to; None if it is whole.
        gradients: of the factors; None takes the `grad` that a backward pass left, before it is clipped or used.

    Raises:
        ConfigError: if no layer of heads, or none of channels, has a trainable adapter.
    """
    parts = sketch_layers(model, anatomy, gradients)
    kinds = {"channels" if prunable_side(anatomy, name) == "ff" else "heads" for name in parts}
    if missing := {"heads", "channels"} - kinds:
        raise no_adapter(f"no trained adapter on a layer of {' or '.join(sorted(missing))}")
    return pool(parts, anatomy, full_block(anatomy) if keep is None else keep)


def sketch_layers(model: Any, anatomy: BlockLayout, gradients: Gradients | None) -> Mapping[str, torch.Tensor]:
    """Return the sums of Ghat * W over the rows or columns that an adapted layer can lose, by the layer's name."""
    parts = {}
    with torch.no_grad():
        for name, layer in layers(model, "local").items():
            if name not in anatomy.sides:
                continue
            pair = [layer.lora_A["local"].weight, layer.lora_B["local"].weight]
            held = [one.grad if gradients is None else gradients.get(one) for one in pair]
            if held[0] is None and held[1] is None:
                continue
            a, b = (widened(one) for one in pair)  # (r, in), (out, r)
            g_a, g_b = (
                torch.zeros_like(one) if grad is None else widened(grad) for one, grad in zip((a, b), held, strict=True)
            )
            if anatomy.sides[name][1] == "all":
                parts[name] = (left(layer, g_b) * a.T).sum(dim=1) + (left(layer, b) * g_a.T).sum(dim=1)  # (in,)
            else:
                parts[name] = (g_b * right(layer, a.T)).sum(dim=1) + (b * right(layer, g_a.T)).sum(dim=1)  # (out,)
    return parts


def no_adapter(got: str) -> ConfigError:
    expected = "trained adapters on layers of heads and of channels, by whose gradients lora scores"
    return ConfigError(Fault("pruning.score", expected, got, 'set score = "wanda", or targets = ["all-linear"]'))


def right(module: Any, factor: torch.Tensor) -> torch.Tensor:
    """Return W @ factor, (out, k), W with the frozen adapter."""
    product = matrix(core(module)) @ factor
    if "global" in module.lora_A:
        a, b = widened(module.lora_A["global"].weight), widened(module.lora_B["global"].weight)
        product = product + module.scaling["global"] * (b @ (a @ factor))
    return product


def left(module: Any, factor: torch.Tensor) -> torch.Tensor:
    """Return W^T @ factor, (in, k), W with the frozen adapter."""
    product = matrix(core(module)).T @ factor
    if "global" in module.lora_A:
        a, b = widened(module.lora_A["global"].weight), widened(module.lora_B["global"].weight)
        product = product + module.scaling["global"] * (a.T @ (b.T @ factor))
    return product


def smooth(before: Tensors | None, now: Tensors) -> Tensors:
    """Return the moving mean of scores over steps, which starts at the first."""
    if before is None:
        return now
    rest = np.float32(1 - DECAY)
    return {name: np.float32(DECAY) * before[name] + rest * array for name, array in now.items()}


def pool(parts: Mapping[str, torch.Tensor], anatomy: BlockLayout, keep: ModelStructure) -> Tensors:
    """Return scores from a number for every row or column that a layer can lose, by the layer's name.

    A group's numbers are summed layer by layer, and the absolute values of the sums added up.
    """
    heads = [np.zeros(len(kept.q)) for kept in keep.blocks]
    channels = [np.zeros(len(kept.ff)) for kept in keep.blocks]
    for name, values in parts.items():
        index, side = anatomy.sides[name][0], prunable_side(anatomy, name)
        own = channels if side == "ff" else heads
        own[index] += unit_scores(values.detach().cpu().double(), side, keep.blocks[index]).numpy()
    found = {"heads": np.concatenate(heads), "channels": np.concatenate(channels)}
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise ClientError(f"scores of {name}: expected finite numbers; got others; use another model.dtype")
    return {name: array.astype(np.float32) for name, array in found.items()}


def prunable_side(anatomy: BlockLayout, name: str) -> Side:
    """Return what the one side of a layer that can shrink consists of."""
    _, out, into = anatomy.sides[name]
    return into if out == "all" else out


def unit_scores(values: torch.Tensor, side: Side, kept: BlockStructure) -> torch.Tensor:
    """Return a number for every head or channel; query heads share equally what their key/value head is worth."""
    match side:
        case "ff":
            return values.abs()
        case "kv":
            group = len(kept.q) // len(kept.kv)
            return (values.reshape(len(kept.kv), -1).sum(dim=1).abs() / group).repeat_interleave(group)
        case "qkv":
            return torch.stack([unit_scores(part, "q", kept) for part in values.chunk(3)]).sum(dim=0)
        case _:
            return values.reshape(len(kept.q), -1).sum(dim=1).abs()


def matrix(module: Any) -> torch.Tensor:
    """Return a linear layer's weight as (out, in), in at least 32 bits."""
    weight = widened(module.weight.detach())
    return weight.T if isinstance(module, Conv1D) else weight


def widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(accumulation_dtype(tensor))


def accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
