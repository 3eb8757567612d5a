"""Checks of a recipe against its base: ranks and pruning settings that the base's layers do not allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.config import Recipe
from fedtune.config.recipe import largest_rank, method_type_of
from fedtune.errors import ConfigError, Fault
from fedtune.lora.virtual_tokens import are_virtual, num_layers, own_names
from fedtune.messages import Blueprint
from fedtune.methods import with_settings
from fedtune.methods.method import LinearMethod
from fedtune.model.emulator_facts import ENDS
from fedtune.model.emulator_facts import NAME as FACTS
from fedtune.model.emulator_facts import read as read_facts
from fedtune.model.settings import in_layers
from fedtune.planning.arms import AdaptiveSettings
from fedtune.pruning.ranking import multiple_of
from fedtune.store import result
from fedtune.tensors import Tensors


def check_ranks(recipe: Recipe, modules: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a rank above the smaller side of a layer, which adds parameters but no expressiveness.

    Raises:
        ConfigError: naming the smallest layer.
    """
    if not modules:  # virtual tokens have no rank
        return
    module, shape = min(modules.items(), key=lambda item: min(item[1]))
    if (rank := largest_rank(recipe)) > min(shape):
        raise ConfigError(
            Fault(
                path="planner.ranks" if isinstance(recipe.planner, AdaptiveSettings) else "adapter.rank",
                expected=f"at most {min(shape)}, the smaller side of {module} {shape}",
                got=f"{rank}, the largest in the recipe",
                hint="lower the rank, or name the layers in adapter.targets without that one",
            )
        )


def check_kind(recipe: Recipe, saved: Tensors) -> None:
    """Refuse clients that train another kind of adapter than the recipe says.

    Raises:
        ConfigError: naming both.
    """
    kind, own = recipe.adapter.kind, own_names(saved) if are_virtual(saved) else {}
    prefix = num_layers(own) > 0
    if bool(own) != (kind != "lora") or (own and prefix != (kind == "prefix")):
        got = "factors" if not own else "keys and values" if prefix else "embeddings"
        hint = "set the same adapter.kind in the recipe and in the sites' files"
        raise ConfigError(Fault("adapter.kind", "clients that train what the recipe says", f"{got}, not {kind}", hint))


def check_layers(recipe: Recipe, modules: Iterable[str]) -> None:
    """Refuse clients that adapt other layers (blocks) than the recipe names.

    The ends of an emulator are those of the folder that the recipe names; where the server has none, sites know them.

    Raises:
        ConfigError: naming a module.
    """
    layers, folder = recipe.adapter.layers, recipe.root / recipe.model.base
    if layers == ENDS:
        layers = ", ".join(map(str, read_facts(folder).ends)) if (folder / FACTS).is_file() else None
    outside = [name for name in modules if not in_layers(name, layers)]
    if outside:
        expected = f"clients that adapt layers {layers} alone, as the recipe says"
        got = f"{len(outside)} modules of others, such as {outside[0]}"
        hint = f"set layers = {recipe.adapter.layers!r} in the table [adapter] of the sites' files"
        raise ConfigError(Fault("adapter.layers", expected, got, hint))


def check_pruning(blueprint: Blueprint) -> None:
    """Refuse pruning settings that do nothing to this base, or that every client would fail with.

    Raises:
        ConfigError: with every fault, and the nearest setting that works.
    """
    settings, layout = blueprint.pruning, blueprint.anatomy
    if settings is None or layout is None:
        return
    faults, narrow = [], min(layout.blocks, key=lambda block: block.channels)
    if settings.multiple != "auto" and settings.multiple >= narrow.channels:
        expected = f"fewer than the {narrow.channels} channels of {narrow.prefix}, or none could be pruned"
        hint = f'e.g. {multiple_of(replace(settings, multiple="auto"), narrow)}, or "auto"'
        faults.append(Fault("pruning.multiple", expected, str(settings.multiple), hint))
    if settings.unit == "even_q" and any(block.group == 1 for block in layout.blocks):
        expected = "kv_group for a base with one query head for every key/value head"
        faults.append(Fault("pruning.unit", expected, "'even_q'", 'set unit = "auto"'))
    saved = sorted({name.removesuffix(".weight").removesuffix(".bias") for name in blueprint.saved} & set(layout.sides))
    if saved:
        expected = f"no layers of blocks, which are pruned; {saved[0]} is one"
        faults.append(Fault("adapter.modules_to_save", expected, f"{len(saved)} of them", "adapt it by LoRA"))
    touched = {side for name in blueprint.modules for side in layout.sides.get(name, ("", ""))[1:]}
    if settings.score == "lora" and not ("ff" in touched and touched & {"q", "kv", "qkv"}):
        expected = "adapters on layers of heads and of channels, by whose gradients lora scores"
        hint = 'set score = "wanda", or targets = ["all-linear"]'
        faults.append(Fault("pruning.score", expected, f"adapters that touch {sorted(touched - {'all', ''})}", hint))
    if faults:
        raise ConfigError(faults)


def check_kept(recipe: Recipe, blueprint: Blueprint) -> None:
    """Refuse globs of `personal.keep` that name none of what is trained, or all of it.

    Raises:
        ConfigError: with what there is to name.
    """
    personal = recipe.personal.in_full() if recipe.personal else None
    if personal is None or not personal.keep:
        return
    names = [name.partition("/")[2] for name in current_names(recipe, blueprint)]
    path = "personal.keep" if recipe.personal and recipe.personal.keep else "personal.kind"
    some = f"{names[0]}, {names[-1]} and {len(names) - 2} more" if len(names) > 3 else ", ".join(names)
    for glob in personal.keep:
        if not any(replace(personal, keep=(glob,)).keeps(name) for name in names):
            hint = "name modules to train in full in adapter.modules_to_save"
            if personal.kind == "fedbn":
                hint = 'name the norms in adapter.modules_to_save, such as ["input_layernorm", "norm"]'
            raise ConfigError(Fault(path, f"globs over what is trained ({some})", f"{glob!r}, which names none", hint))
    if all(map(personal.keeps, names)):
        raise ConfigError(Fault(path, "globs that leave something to average", "all that is trained", "name less"))


def current_names(recipe: Recipe, blueprint: Blueprint) -> Sequence[str]:
    """Return the names of all that a linear method averages, before a round."""
    method = with_settings(method_type_of(recipe), recipe.method)
    assert isinstance(method, LinearMethod)  # checked when the recipe is bound
    return sorted(method.current(method.init(blueprint, recipe.method)))


def check_base(digest: str, origin: Mapping[str, Any], run: Path) -> None:
    """Refuse an adapter that was trained over other weights than those that are loaded now."""
    wanted = str(origin.get("base", {}).get("digest"))
    if digest != wanted:
        raise ConfigError(
            Fault(
                path="model.base",
                expected=f"the base that {result.folder(run)} was trained on (digest {wanted[:12]})",
                got=f"another one (digest {digest[:12]})",
                hint="load the same model in the same revision and dtype",
            )
        )
