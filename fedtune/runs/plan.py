"""A recipe as it would run on this machine, with every default and with what it will take; nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedtune.config import bind_for_sites, render
from fedtune.config.pinning import pin_digest
from fedtune.config.recipe import AT_SITES, possible_verbs
from fedtune.errors import ConfigError, Fault
from fedtune.model.machine import available_bytes
from fedtune.rounds.schedule import rate_text
from fedtune.runs.bill import Bill, bill_of
from fedtune.runs.split import split_of
from fedtune.runs.start import saturation_notes
from fedtune.store.files import write_text


@dataclass(frozen=True)
class Planned:
    """A recipe as it would run on this machine, before anything is trained."""

    recipe: str
    """As bound, in TOML; with the base's digest where that was pinned."""
    notes: Sequence[str]
    """Remarks of the preparation, and what each client holds."""
    bill: Bill | None = None
    """What it will take; None for a base without a cost model."""
    split: Mapping[str, Any] = field(default_factory=dict)
    """Who holds how many rows of which labels; empty where the data are at sites."""


def plan(
    recipe: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = (), pin: bool = False, measure: bool = False
) -> Planned:
    """Read a recipe's data and the sizes of its base, and return the recipe as it would run and what it will take.

    No weights are loaded, unless they are asked for: to pin their digest, or to measure steps of training.

    Args:
        recipe: path, text or tables.
        overrides: `table.key=value`, as for `simulate`.
        pin: write the base's digest into the file `recipe`.
        measure: train some steps on this machine for about ten seconds, and predict by them.

    Raises:
        ConfigError: with what is wrong with recipe, data or base.
    """
    bound = bind_for_sites(recipe, overrides=overrides)
    if pin:  # the digest that the file has may be the one to be replaced
        bound = replace(bound, model=replace(bound.model, digest=None))
    from fedtune.runs.local import Experiment, prepare, sites_experiment

    sites = bound.data.source == AT_SITES
    experiment: Experiment = sites_experiment(bound) if sites else prepare(bound, sizes_alone=not (pin or measure))
    whole, digest = experiment.recipe, experiment.base.digest
    if digest:
        whole = replace(whole, model=replace(whole.model, digest=digest))
    notes = [*experiment.federation.notes, *experiment.base.notes]
    if not sites:
        counts = ", ".join(f"{name} {count:,}" for name, count in list(experiment.fleet.items())[:8])
        notes.append(f"training examples: {counts}{', ...' * (len(experiment.fleet) > 8)}")
    if (rounds := whole.rounds).schedule != "constant" or rounds.warmup:
        verbs = possible_verbs(whole)
        if verbs != ("descend",):
            notes.append(f"learning rate: {rate_text(whole.client.learning_rate, rounds)}")
        if whole.descend is not None:
            notes.append(f"learning rate of descending: {rate_text(whole.descend.learning_rate, rounds)}")
    notes += saturation_notes(whole, experiment.blueprint, list(experiment.fleet))
    if pin:
        path = Path(str(recipe))
        write_text(path, pin_digest(path.read_text(encoding="utf-8"), digest, label=path.name))
        notes.append(f"wrote model.digest into {path}")
    split = split_of(experiment.federation, whole.data.split.kind)
    return Planned(render(whole), notes, bill_of_experiment(experiment, measure=measure), split)


def bill_of_experiment(experiment: Any, *, measure: bool) -> Bill | None:
    """Return what a prepared run will take; None for a base without a cost model."""
    fleet = experiment.devices
    if fleet.body is None:
        return None
    calibration = None
    if measure:
        from fedtune.runs.calibration import calibrate

        if experiment.recipe.data.source == AT_SITES:
            expected, hint = "data on this machine, to train some steps on", "leave it out"
            raise ConfigError(Fault("--measure", expected, "a recipe whose data are at the sites", hint))
        calibration = calibrate(experiment)
        fleet = replace(fleet, heap=calibration.heap, runtime=calibration.runtime_bytes)
    bill = bill_of(
        fleet,
        experiment.blueprint,
        experiment.fleet,
        labels=experiment.federation.labels if experiment.recipe.data.source == AT_SITES else (),
        memory_gb=available_bytes() / 1e9,
        calibration=(calibration.step_s, calibration.s_per_tflop) if calibration else None,
    )
    return replace(bill, measured=calibration.as_json()) if calibration else bill
