"""The recipe: everything that one experiment is, bound and frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fedtune.data.settings import DataSettings
from fedtune.messages import Training, Verb
from fedtune.model.settings import AdapterSettings, EvaluationSettings, ModelSettings
from fedtune.planning.adaptive import AdaptiveSettings
from fedtune.planning.fixed import FixedSettings
from fedtune.pruning.ranking import PruningSettings
from fedtune.rounds.schedule import Schedule
from fedtune.simulation.resources import Resources
from fedtune.simulation.settings import DeviceOverride, EngineSettings, FleetSettings


@dataclass(frozen=True)
class Override:
    """Settings that differ for some clients; one table `override` of the recipe."""

    clients: Sequence[str]
    """Names or globs (`*`, `?`, `[..]`); a client matches if one of them does."""
    rank: int | None = None
    """LoRA rank of these clients; none keeps `adapter.rank`."""
    ratio: float | None = None
    """Pruning ratio that the planner `fixed` gives these clients; none keeps `planner.ratio`."""
    verb: Verb | None = None
    """adapt: train a LoRA adapter; probe: measure losses along random directions (FedKSeed); none: as the method does.
    Clients of one run cannot differ in it yet."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """The fields of `Training` that change, by name; `steps` replaces `epochs` and the other way round."""
    resources: Mapping[str, Any] = field(default_factory=dict)
    """The fields of `Resources` that change, by name."""

    def covers(self, client: str) -> bool:
        return any(fnmatchcase(client, glob) for glob in self.clients)


@dataclass(frozen=True)
class ReportSettings:
    """What is written beside the run's records, when the run ends; the recipe's table `report`."""

    plots: bool = True
    """Write the page `report.html` and its figures."""
    tensorboard: bool = False
    """Also write event files for TensorBoard (needs the extra `tensorboard`)."""


@dataclass(frozen=True)
class Recipe:
    """One experiment. Local files that existed when it was bound stand here as absolute paths."""

    name: str
    """Letters, digits, `.`, `_` and `-`: the run's folder is named after it."""
    model: ModelSettings
    adapter: AdapterSettings
    method: Any
    """The settings dataclass of `METHODS[method.name]`."""
    client: Training
    rounds: Schedule
    data: DataSettings
    seed: int = 0
    """Seed of all randomness: the same recipe and seed give the same result, bit for bit, on one machine."""
    planner: FixedSettings | AdaptiveSettings = field(default_factory=FixedSettings)
    pruning: PruningSettings | None = None
    """None: every client trains the whole model."""
    fleet: FleetSettings | None = None
    """None: no devices are simulated."""
    device: Sequence[DeviceOverride] = ()
    """What is different for some clients' devices, applied in order."""
    evaluate: EvaluationSettings = field(default_factory=EvaluationSettings)
    override: Sequence[Override] = ()
    """Applied in order: where two name the same client and key, the later one holds."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    root: Path = field(default=Path(), compare=False)
    """Folder of the recipe's file; relative paths in it are relative to this."""


def requested_ratio(recipe: Recipe, client: str) -> float:
    """Return the pruning ratio that the planner `fixed` asks of one client, after all overrides that cover it."""
    ratio = recipe.planner.ratio if isinstance(recipe.planner, FixedSettings) else 0.0
    for override in recipe.override:
        if override.ratio is not None and override.covers(client):
            ratio = override.ratio
    return ratio


def planned_training(recipe: Recipe, client: str) -> tuple[int, Training]:
    """Return one client's rank and training after all overrides that cover it."""
    rank, training = recipe.adapter.rank, recipe.client
    for override in recipe.override:
        if override.covers(client):
            rank = rank if override.rank is None else override.rank
            training = with_changes(training, override.training)
    return rank, training


def resources(recipe: Recipe, client: str) -> Resources:
    """Return what one client takes of the machine after all overrides that cover it."""
    found = Resources(threads=recipe.model.threads)
    for override in recipe.override:
        if override.covers(client):
            found = replace(found, **override.resources)
    return found


def largest_rank(recipe: Recipe) -> int:
    """Return the largest rank that any client may be asked for, whoever is in the fleet."""
    if isinstance(recipe.planner, AdaptiveSettings):
        return max(recipe.planner.ranks)
    ranks = [recipe.adapter.rank]
    for override in recipe.override:
        if override.rank is not None:
            ranks = [override.rank] if "*" in override.clients else [*ranks, override.rank]
    return max(ranks)


def with_changes(training: Training, changes: Mapping[str, Any]) -> Training:
    """Return the training with some fields replaced; `steps` and `epochs` replace each other."""
    if "steps" in changes:
        training = replace(training, epochs=None)
    if "epochs" in changes:
        training = replace(training, steps=None)
    return replace(training, **changes)
