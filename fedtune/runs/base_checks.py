"""Checks of a recipe against its base: ranks and pruning settings that the base's layers do not allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.config import Recipe
from fedtune.config.recipe import largest_rank
from fedtune.errors import ConfigError, Fault
from fedtune.messages import Blueprint
from fedtune.planning.arms import AdaptiveSettings
from fedtune.pruning.ranking import multiple_of
from fedtune.store import result


def check_ranks(recipe: Recipe, modules: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a rank above the smaller side of a layer, which adds parameters but no expressiveness.

    Raises:
        ConfigError: naming the smallest layer.
    """
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
