"""Everything that a run is given: recipe, base, fleet, planner, clock, and how global models are scored."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fedtune.config import Recipe, bind, digest, render
from fedtune.config.plugins import method_names, planner_names
from fedtune.config.reading import read
from fedtune.config.recipe import PYTHON, method_of, missing_plugin
from fedtune.errors import ConfigError
from fedtune.messages import Blueprint, PlannedClient, Traffic
from fedtune.methods.method import GlobalModel
from fedtune.planning.fixed import FixedSettings
from fedtune.planning.planner import Planner
from fedtune.pruning.structure import ModelStructure
from fedtune.rounds.clock import Clock
from fedtune.rounds.probe import Prober
from fedtune.rounds.record import Metrics
from fedtune.rounds.transport import UnsolicitedReply
from fedtune.store import peft
from fedtune.store.run_journal import RunJournal

Door: TypeAlias = Literal["simulate", "flower", "link"]
"""What a run is started by: a simulation, a Flower app, or `fedtune serve`."""

VERSIONS = ("fedtune", "numpy", "torch", "transformers", "peft", "flwr")
"""Packages whose versions a run notes: another one may change the last bits."""


@dataclass(frozen=True)
class ModelScores:
    """Scores of one global model; none where there is no model or nothing to score."""

    test: Metrics | None = None
    held_out: Mapping[str, Metrics] = field(default_factory=dict)
    """By client, on its held-out rows."""
    personal: Mapping[str, Metrics] = field(default_factory=dict)
    """Of each client's own model, on the same rows."""
    deployed: Metrics | None = None
    """Of the same model pruned to what is deployed, on the test data."""
    traffic: Traffic = field(default_factory=Traffic)
    """Bytes of the messages that were needed for it, where the clients score."""
    unsolicited: Sequence[UnsolicitedReply] = ()
    """What came meanwhile from clients that were not asked."""


def no_scores(
    tuned: GlobalModel, *, round: int = 0, test: bool, clients: bool, structure: ModelStructure | None = None
) -> ModelScores:
    """Score nothing: a server has neither model nor data."""
    return ModelScores()


def no_samples(tuned: GlobalModel) -> Mapping[str, Any]:
    """Answer nothing: a server has no model."""
    return {"sample": None}


@dataclass(frozen=True)
class RunContext:
    """What a run is given, the same in a simulation and on a server without a model."""

    recipe: Recipe
    blueprint: Blueprint
    planner: Planner
    base: Mapping[str, Any]
    """`name`, `digest` and, where the model is loaded, `parameters`."""
    target: peft.Target
    fleet: Mapping[str, int]
    """Training examples by client, as known at the start."""
    machine: Mapping[str, Any]
    data: str = ""
    """Digest of every client's examples; empty where they are not known."""
    partition: str = ""
    """Text of the partition file, which says who holds which rows; empty where that is not known."""
    start: str = ""
    """Digest of the adapter that it starts from; empty for the base."""
    form: str = ""
    """Of the training rows: text or instruction; empty where they are not known."""
    labels: Sequence[str] = ()
    """Classification: the class names, by class."""
    sent_labels: Sequence[str] = ()
    """The same, where clients must be asked to use them."""
    sent_date: str = ""
    """The day that chat templates write, where clients must be asked to write it."""
    notes: Sequence[str] = ()
    """Remarks of the preparation, such as examples that were dropped."""
    score: Callable[..., ModelScores] = no_scores
    sample: Callable[[GlobalModel], Mapping[str, Any]] = no_samples
    """Answers the recipe's prompts before and after."""
    door: Door = "simulate"
    number: str = ""
    """Of the run, where its clients know it by one: 16 hex digits."""
    clock: Clock | None = None
    """Measures or simulates the time on the clients' devices; None where it is not known."""
    prober: Prober | None = None
    """Asks clients for their speed before every round; None where the planner reads none."""
    expected: Callable[[PlannedClient], Mapping[str, float]] = lambda planned: {}
    """A client's `planned_s` and `planned_bytes` by the cost model, as far as they are known."""
    devices: Mapping[str, Any] = field(default_factory=dict)
    """By client, the profile of the device that it is simulated on, with the provenance of each number."""
    scored_rounds: Collection[int] = ()
    """Rounds after which the clients' held-out rows are scored, beside the last one: those where a search decides."""
    copied_from: str = ""
    """Of a run that goes on from another one's state under its own recipe: that run, and the round."""
    on_journal: Callable[[RunJournal], None] = lambda journal: None
    """Called with the journal before the first round; over the link, receipts state its last record."""

    @property
    def inputs(self) -> Mapping[str, str]:
        """What the journal notes at a run's start, and a resumed run is compared with."""
        return {
            "recipe": render(self.recipe),
            "recipe_digest": digest(self.recipe),
            "base": self.base["digest"],
            "data": self.data,
            **({"partition": sha256(self.partition.encode()).hexdigest()} if self.partition else {}),
            **({"start": self.start} if self.start else {}),
            "door": self.door,
            **({"number": self.number} if self.number else {}),
            **({"copied_from": self.copied_from} if self.copied_from else {}),
            "versions": " ".join(f"{name} {number}" for name, number in versions().items()),
            "platform": platform.platform(),
        }


def versions() -> Mapping[str, str]:
    """Return the versions of Python and of the packages in `VERSIONS`, as far as they are installed."""
    return dict(installed_versions()) | {"python": platform.python_version()}


def installed_versions() -> Iterator[tuple[str, str]]:
    for name in VERSIONS:
        with suppress(PackageNotFoundError):
            yield name, version(name)


def first_state(recipe: Recipe, blueprint: Blueprint) -> Any:
    """Return the state of the recipe's method before any round."""
    return method_of(recipe).init(blueprint, recipe.method)


def bind_recorded(source: Path | str) -> Recipe:
    """Return a recipe that a run has recorded, from its file or its text.

    Raises:
        ConfigError: if its method or planner is not installed: one that Python code passed as an object never is.
    """
    *_, tables = read(source)
    for table, names in (("method", method_names()), ("planner", (*planner_names(), PYTHON))):
        content = tables.get(table)
        name = content.get("name") if isinstance(content, Mapping) else None
        if isinstance(name, str) and name not in names:
            raise ConfigError(missing_plugin(table, name))
    return bind(source)


def bind_to_score(run: Path) -> Recipe:
    """Return the recipe of a run whose model is scored or exported, for which no client is planned any more.

    Raises:
        ConfigError: as `bind_recorded`.
    """
    recipe = bind_recorded(run / "recipe.toml")
    # What it started from is in its states, and the folder may be gone.
    recipe = replace(recipe, adapter=replace(recipe.adapter, start=None))
    # A planner that was a Python object is gone. Like the fixed one it leaves the largest rank to the recipe.
    return replace(recipe, planner=FixedSettings()) if recipe.planner.name == PYTHON else recipe
