"""Refuses a run on this machine whose clients need more memory than is free, before its base is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fedtune.config import Recipe
from fedtune.config.recipe import requested_ratio
from fedtune.devices.memory import memory
from fedtune.errors import ConfigError, Fault
from fedtune.model.machine import available_bytes
from fedtune.planning.fixed import FixedSettings
from fedtune.planning.policy import Arm
from fedtune.runs.bill import nearest, with_steps
from fedtune.runs.fleet import Fleet

WORKER_BYTES = 0.12e9
"""Of a worker process beside its client's work; base and libraries are one copy for all of them."""
LITTLE = 0.5
"""Runs that need less than this share of what is free by the coarsest bound are not looked at any closer."""


def plainly_fits(file_bytes: int, longest: int, recipe: Recipe) -> bool:
    """Return whether a run needs little by a coarse bound, which needs no sizes of the base.

    What is stored of one token for the backward pass is far below what the base's file takes, in any model whose
    layers are wider than some tens.
    """
    batches = [int(override.training.get("batch", 1)) for override in recipe.override]
    rows = max(recipe.client.batch, recipe.evaluate.batch, *batches)
    work = file_bytes * (6 + 2 * rows * longest)
    return 2e9 + file_bytes + workers_at_most(recipe) * work < LITTLE * available_bytes()


def workers_at_most(recipe: Recipe) -> int:
    """Return how many clients work at the same time here, each in a process of its own; 1 without such."""
    if recipe.engine.name == "inprocess":
        return 1
    return recipe.engine.workers or max(1, len(os.sched_getaffinity(0)) // recipe.model.threads)


def check_memory(fleet: Fleet, examples: Mapping[str, int]) -> None:
    """Refuse a run whose largest client this machine has too little memory for.

    A client of a planner that learns is counted as the recipe trains it: a planner may choose less, and does so only
    for devices that are simulated.

    Args:
        fleet: of the recipe, with the sizes of its base and the lengths of its data, and without devices.
        examples: by client.

    Raises:
        ConfigError: with what it needs by part, what is free, and the settings nearest to the recipe's that fit.
    """
    recipe, free = fleet.recipe, available_bytes()
    if fleet.body is None or not examples:
        return
    needs = {}
    for name, count in examples.items():
        rank, training = with_steps(recipe, name, count)
        ratio = requested_ratio(recipe, name) if isinstance(recipe.planner, FixedSettings) else 0.0
        footprint = fleet.footprint(name, Arm(ratio, rank), training)
        needs[name] = memory(fleet.body, recipe.pruning, footprint), footprint, training
    name = max(sorted(needs), key=lambda client: needs[client][0].total)
    (need, footprint, training), workers = needs[name], workers_at_most(recipe)
    shared = need.weights + need.runtime
    beside = WORKER_BYTES if workers > 1 else 0.0
    total = shared + workers * (need.total - shared + beside)
    if total <= free:
        return
    # What one client may take where the base is shared and every worker takes as much.
    spare = (free - shared) / workers - beside + shared
    parts = ", ".join(f"{part.replace('_', ' ')} {size / 1e9:.3g}" for part, size in need.by_part().items() if size)
    at_once = f", {workers} clients at a time" if workers > 1 else ""
    anyway = "set engine.memory_check = false to run anyway"
    smaller = nearest(fleet, recipe, footprint, spare / 1e9, training)
    raise ConfigError(
        Fault(
            "memory",
            f"at most the {free / 1e9:.3g} GB that are free on this machine",
            f"{total / 1e9:.3g} GB for {name}{at_once} ({parts})",
            f"nearest: {smaller}; or {anyway}",
        )
    )
