"""Whether a recipe fits the base that it names: what can only be checked against its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedtune.config import Recipe
from fedtune.config.recipe import largest_rank
from fedtune.errors import ConfigError, Fault
from fedtune.messages import Blueprint
from fedtune.planning.adaptive import AdaptiveSettings
from fedtune.pruning.ranking import multiple_of


def check_ranks(recipe: Recipe, modules: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a rank above the smaller side of a layer: more columns than that add parameters and nothing else.

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
                hint="lower the rank, or leave that layer out of adapter.targets",
            )
        )


def check_pruning(blueprint: Blueprint) -> None:
    """Refuse settings of surgery that do nothing to this base, or that every client would fail with.

    Raises:
        ConfigError: with every fault, and the nearest that would do.
    """
    settings, anatomy = blueprint.pruning, blueprint.anatomy
    if settings is None or anatomy is None:
        return
    faults, narrow = [], min(anatomy.blocks, key=lambda block: block.channels)
    if settings.multiple != "auto" and settings.multiple >= narrow.channels:
        expected = f"fewer than the {narrow.channels} channels of {narrow.prefix}, or none could be cut"
        hint = f'e.g. {multiple_of(replace(settings, multiple="auto"), narrow)}, or "auto"'
        faults.append(Fault("pruning.multiple", expected, str(settings.multiple), hint))
    if settings.unit == "even_q" and any(block.group == 1 for block in anatomy.blocks):
        expected = "kv_group for a base with one query head for every key/value head"
        faults.append(Fault("pruning.unit", expected, "'even_q'", 'set unit = "auto"'))
    saved = sorted(
        {name.removesuffix(".weight").removesuffix(".bias") for name in blueprint.saved} & set(anatomy.sides)
    )
    if saved:
        expected = f"no layers of blocks, which are cut; {saved[0]} is one"
        faults.append(Fault("adapter.modules_to_save", expected, f"{len(saved)} of them", "adapt it by LoRA"))
    touched = {side for name in blueprint.modules for side in anatomy.sides.get(name, ("", ""))[1:]}
    if settings.score == "lora" and not ("ff" in touched and touched & {"q", "kv", "qkv"}):
        expected = "adapters on layers of heads and of channels, by whose gradients lora scores"
        hint = 'set score = "wanda", or targets = ["all-linear"]'
        faults.append(Fault("pruning.score", expected, f"adapters that touch {sorted(touched - {'all', ''})}", hint))
    if faults:
        raise ConfigError(faults)
