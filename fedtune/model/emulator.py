"""Emulators for offsite tuning: the ends of a base around a middle of fewer, pruned or quantised blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ConfigError, Fault
from fedtune.model.blocks import find_blocks, without_blocks
from fedtune.model.device import DTYPES
from fedtune.model.emulator_facts import EmulatorFacts, Kind, true_name
from fedtune.model.importance import scores
from fedtune.model.libraries import quiet
from fedtune.model.quantise import dequantise, quantise
from fedtune.model.quantised_layers import quantisable
from fedtune.model.settings import QuantisedFormat
from fedtune.model.skeleton import finish, place, skeleton
from fedtune.model.surgery import layout_of
from fedtune.pruning.ranking import PruningSettings, rank_units, structure_at
from fedtune.pruning.structure import LayerSlice, ModelStructure, cuts, full_block
from fedtune.seeds import derive, generator

Projection = Callable[[str, torch.Tensor], torch.Tensor]
"""From the name of a tensor of the middle and its free values to those that the emulator has."""
ROWS, LENGTH = 2, 48
"""Random texts that an emulator is compared on, and their tokens."""


def as_it_is(name: str, values: torch.Tensor) -> torch.Tensor:
    """Return the values: a middle of fewer blocks is free."""
    return values


def build_emulator(model: Any, layers: Sequence[int], *, task: str) -> Any:
    """Return a stock model of some blocks of another: the middle's tensors are the caller's to change.

    Embeddings, output layer and whatever else lies outside of blocks share the memory of the model's own.

    Args:
        model: of transformers, whole.
        layers: numbers of the blocks, in order.
        task: causal or classification.

    Raises:
        ConfigError: if its config cannot describe these blocks alone, or they compute something else there.
    """
    name, blocks = find_blocks(model)
    try:
        with quiet():
            config = config_of(model.config, layers, len(blocks))
            emulator = skeleton(config, task=task, dtype=next(model.parameters()).dtype)
        # Where each tensor of a block stands in the emulator.
        expected = dict(emulator.state_dict())
        for key, tensor in model.state_dict().items():
            for target in emulator_names(key, name, layers):
                if expected.pop(target).shape != tensor.shape:
                    raise ValueError(f"{target} has another shape")
                # Not those of blocks: pruning, quantising and distilling write into them.
                place(emulator, target, tensor.detach().clone() if target.startswith(f"{name}.") else tensor.detach())
        if expected:
            raise ValueError(f"no {next(iter(expected))} in the base")
        emulator = finish(emulator, (), key=0, device=model.device).requires_grad_(False)
    except (KeyError, ValueError, AssertionError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise other_places(model, f"its config cannot describe them ({reason})") from error
    emulator.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    compare_blocks(model, emulator, layers)
    return emulator


def config_of(config: Any, layers: Sequence[int], count: int) -> Any:
    """Return a model's config for some of its blocks; what it lists by block is listed for these."""
    smaller = copy.deepcopy(config)
    text = smaller.get_text_config()
    for key, value in config.get_text_config().to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == count:
            setattr(text, key, [value[number] for number in layers])
    text.num_hidden_layers = len(layers)
    return smaller


def emulator_names(name: str, blocks: str, layers: Sequence[int]) -> Sequence[str]:
    """Return where a base's tensor stands in its emulator: nowhere where it is of a block that was dropped."""
    if not name.startswith(f"{blocks}."):
        return [name]
    number, _, rest = name.removeprefix(f"{blocks}.").partition(".")
    return [f"{blocks}.{place}.{rest}" for place, layer in enumerate(layers) if layer == int(number)]


def compare_blocks(model: Any, emulator: Any, layers: Sequence[int]) -> None:
    """Refuse blocks that compute something else in the emulator than in the base, where all others are skipped.

    Raises:
        ConfigError: naming the family.
    """
    rng = generator(derive(0, "emulator.compare"))
    rows = model.get_input_embeddings().num_embeddings
    ids = torch.from_numpy(rng.integers(0, rows, (ROWS, LENGTH))).to(model.device)
    skipped = set(range(len(find_blocks(model)[1]))) - set(layers)
    with torch.inference_mode():
        with without_blocks(model, skipped):
            wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        got = emulator(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    scale = float(wanted.abs().max())
    if not torch.allclose(got, wanted, rtol=0, atol=1e-5 * max(1.0, scale)):
        raise other_places(model, "they compute something else at another place")


def other_places(model: Any, reason: str) -> ConfigError:
    expected = "a model whose blocks can stand at other places"
    got = f"a {model.config.model_type}: {reason}"
    return ConfigError(Fault("model.base", expected, got, "choose another base, such as a Llama, Qwen or GPT-2"))


def projection_of(
    model: Any, kind: Kind, middle: Collection[int], *, ratio: float = 0.0, codes: QuantisedFormat = "nf4"
) -> Projection:
    """Return what a kind of emulator does to the tensors of the middle, by their names in it.

    Args:
        model: the base, whose blocks stand in the emulator where they stand here.
        kind: drop leaves them free; prune writes zeros for whole heads and channels, the least by weight; quantise
            takes the nearest values of codes.
        middle: numbers of the blocks between the ends.
        ratio: share that is pruned.
        codes: of a quantised middle.

    Raises:
        ConfigError: for a base that cannot be pruned.
    """
    if kind == "drop":
        return as_it_is
    if kind == "prune":
        return pruning_projection(model, middle, ratio)
    name, _ = find_blocks(model)
    prefixes = tuple(f"{name}.{number}." for number in middle)
    transposed = {
        f"{layer}.weight": isinstance(model.get_submodule(layer), Conv1D)
        for layer in quantisable(model)
        if layer.startswith(prefixes)
    }

    def on_grid(tensor: str, values: torch.Tensor) -> torch.Tensor:
        if tensor not in transposed:
            return values
        weight = values.T if transposed[tensor] else values
        near = dequantise(quantise(weight, codes), torch.float32).to(values.device)
        return (near.T if transposed[tensor] else near).contiguous()

    return on_grid


def pruning_projection(model: Any, middle: Collection[int], ratio: float) -> Projection:
    """Return the projection that writes zeros for a share of each middle block's heads and channels."""
    layout, settings = layout_of(model), PruningSettings(score="magnitude", target=ratio)
    if not 0 < ratio <= 0.875:
        raise ConfigError(Fault("drop", "a share above 0, up to 0.875, of heads and channels", f"{ratio:g}"))
    importance = scores(model, [], "magnitude", layout, task="causal", key=0)
    small, whole = structure_at(rank_units(importance, layout, settings), layout, settings, ratio), full_block(layout)
    blocks = [small.blocks[i] if i in middle else block for i, block in enumerate(whole.blocks)]
    masks = dict[str, torch.Tensor]()
    for layer, cut in cuts(ModelStructure(tuple(blocks)), layout).items():
        module = model.get_submodule(layer)
        for tensor, parameter in module.named_parameters():
            masks[f"{layer}.{tensor}"] = mask_of(cut, parameter, transposed=isinstance(module, Conv1D))
    return lambda name, values: values * masks[name].to(values.device) if name in masks else values


def mask_of(cut: LayerSlice, parameter: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """Return 1 where a layer's weight or bias stays and 0 elsewhere, float32."""
    shape = tuple(parameter.shape[::-1] if transposed else parameter.shape)
    mask = np.ones(shape, np.float32)
    for axis, places in enumerate((cut.out, cut.into)[: len(shape)]):
        if places is not None:
            gone = np.setdiff1d(np.arange(shape[axis]), places)
            mask[(slice(None),) * axis + (gone,)] = 0
    return torch.from_numpy(mask.T.copy() if transposed else mask)


def write_projected(emulator: Any, names: Collection[str], projection: Projection) -> None:
    """Give tensors of an emulator's middle the values that their own are projected to, in place."""
    parameters = dict(emulator.named_parameters())
    with torch.no_grad():
        for name in names:
            parameters[name].copy_(projection(name, parameters[name].detach()))


def other_end(model: Any, emulator: Any, facts: EmulatorFacts, *, leave_out: Collection[str]) -> str | None:
    """Return the first tensor outside of an emulator's middle that is not the base's, in the emulator's number format.

    Args:
        model: the base, with blocks as the facts count them.
        emulator: of it.
        facts: from the emulator's folder.
        leave_out: names of modules that a run trains whole, such as a head that is drawn anew.
    """
    stored, loaded = DTYPES[facts.dtype], next(emulator.parameters()).dtype
    own: Mapping[str, torch.Tensor] = model.state_dict()
    state: Mapping[str, torch.Tensor] = emulator.state_dict()
    middle = {*range(len(facts.layers))} - {*facts.ends}
    skipped = tuple([f"{facts.blocks}.{number}." for number in middle] + [f"{name}." for name in leave_out])
    for name, tensor in state.items():
        if name.startswith(skipped):
            continue
        wanted = own.get(true_name(name, facts))
        if wanted is None or not torch.equal(wanted.to(stored).to(loaded).cpu(), tensor.to(loaded).cpu()):
            return name
    return None


def middle_names(emulator: Any, middle: Collection[int]) -> Sequence[str]:
    """Return the names of an emulator's parameters in the blocks between the ends."""
    prefixes = tuple(f"{find_blocks(emulator)[0]}.{number}." for number in middle)
    return [name for name, _ in emulator.named_parameters() if name.startswith(prefixes)]
