"""Resuming a run: its recipe, base and data held against the journal, its last state, and the command for it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fedtune.config import Recipe, bind, changes
from fedtune.config.reading import read
from fedtune.config.recipe import Objects
from fedtune.errors import ConfigError, Fault, StoreError
from fedtune.methods import serialization
from fedtune.methods.flora import FloraSettings
from fedtune.methods.method import Method
from fedtune.methods.settings import AveragingSettings
from fedtune.planning.arms import AdaptiveSettings
from fedtune.pruning.ranking import PruningSettings
from fedtune.rounds.events import Note, Watch
from fedtune.rounds.record import RoundRecord
from fedtune.runs.context import Door, RunContext, first_state
from fedtune.store.files import write_text
from fedtune.store.history import has_begun
from fedtune.store.round_records import read_rounds
from fedtune.store.run_journal import RunJournal

LINK, OPTIONS = "link", "options"
"""Of a served run: the folder of the link, and the file in it that notes the options of its server."""
ADAPTING = (AveragingSettings, FloraSettings, AdaptiveSettings, PruningSettings)
OLD_DEFAULTS = {"state_max_rank": None, "wire_dtype": "bf16"}
"""Of `[method]`, what releases before 0.3.0 did where a recipe said nothing."""
OLD_ARMS: Mapping[str, Any] = {"tops": (1.0,), "backs": (0.0,), "shares": (1.0,)}
"""Of `[planner]`, the arms of releases before 0.3.0 beside ratios and ranks, which they wrote into every recipe."""
OLD_FLOOR: Mapping[str, Any] = {"floor": "ramp"}
"""Of `[pruning]`, which ratios these releases allowed."""
RESTORE_ADVICE = "put back a copy of the run directory, or start the run again"


def load_resumed(
    context: RunContext, run: Path, journal: RunJournal, watch: Watch
) -> tuple[list[RoundRecord], Any | None]:
    """Return the records of a run, and the state after the last of them; None before the first round.

    Raises:
        ConfigError: if it was started with another base or other data, or has more rounds than the recipe.
        StoreError: if round lines, journal and states do not belong together.
    """
    check_inputs(context, journal.first, watch)
    if context.recipe.rounds.count < journal.begun:
        expected = f"at least {journal.begun}, the rounds that have begun"
        raise ConfigError(Fault("rounds.count", expected, str(context.recipe.rounds.count)))
    records = list(read_rounds(run))
    if not records and journal.begun:
        raise StoreError(
            f"{run / 'rounds.jsonl'}: expected the lines of {journal.begun} rounds; got none; {RESTORE_ADVICE}"
        )
    state = journal.resume(records[-1].round if records else 0)
    if state is None:
        return records, None
    if why := serialization.why_not_finite(state):
        raise not_finite(run, journal, records[-1].round, why)
    return records, serialization.decode(state, first_state(context.recipe, context.blueprint))


def not_finite(run: Path, journal: RunJournal, round: int, why: str) -> StoreError:
    """Return why a run cannot go on whose last state is not finite, and what is left to go on from."""
    best = journal.kept_round
    if best and best != round and not journal.why_not_finite(best):
        advice = (
            f"the last finite state on the disk is that of round {best}: start another run with adapter.start = "
            f'"{(run / "adapter").absolute()}", which is its model'
        )
    else:
        advice = "no earlier state is on the disk: start the run again with --fresh; what made it so is now refused"
    return StoreError(
        f"{run}: expected a finite state after round {round}; got {why}, committed by a release before 0.3.0; {advice}"
    )


def check_inputs(context: RunContext, start: Mapping[str, str], watch: Watch) -> None:
    """Refuse to go on over another base or other data, and note other versions.

    Args:
        context: what the run is given now.
        start: what the journal notes of its start.
        watch: called with a note for each version that differs.

    Raises:
        ConfigError: naming what differs.
    """
    now = context.inputs
    faults = [
        Fault(path, f"what the run was started with (digest {start[key][:12]})", f"{now[key][:12]}", hint)
        for key, path, hint in (
            ("base", "model.base", "load the same model in the same revision and dtype"),
            ("data", "data", "put the files back, or start another run with --fresh"),
            ("start", "adapter.start", "put the adapter back, or start another run with --fresh"),
        )
        if start.get(key) and now.get(key) and start[key] != now[key]
    ]
    if faults:
        raise ConfigError(faults)
    if bool(start["data"]) != bool(now["data"]):
        watch(Note("the data are known at only one of start and resume: whether they are the same is not checked"))
    for key in ("versions", "platform"):
        if start[key] != now[key]:
            watch(Note(f"started with {key} {start[key]}; now {now[key]}: the last bits may differ from here on"))


def as_started(run: Path, recipe: Recipe) -> Recipe:
    """Return the recipe that a run is resumed with: the day, the number format and the defaults that it began with.

    A recipe that names another keeps it.

    Raises:
        StoreError: if the folder is no run, or its journal cannot be trusted.
    """
    if not has_begun(run):
        return recipe
    start = started_with(run, recipe.objects.method)
    recipe = replace(
        recipe,
        method=with_begun_defaults(recipe.method, start.method, OLD_DEFAULTS),
        planner=with_begun_defaults(recipe.planner, start.planner, (*OLD_ARMS, "ratios", "ranks")),
        pruning=with_begun_defaults(recipe.pruning, start.pruning, OLD_FLOOR),
    )
    if recipe.data.date is None:
        recipe = replace(recipe, data=replace(recipe.data, date=start.data.date))
    if recipe.model.dtype == "auto":
        recipe = replace(recipe, model=replace(recipe.model, dtype=start.model.dtype))
    return recipe


def with_begun_defaults(ours: Any, its: Any, of: Iterable[str]) -> Any:
    """Return settings with what a run has begun with for those of the keys that are at a default of this release."""
    if type(ours) is not type(its) or not isinstance(ours, ADAPTING):
        return ours
    defaults = {each.name: each.default for each in fields(ours)}
    keys = [key for key in of if key in defaults and getattr(ours, key) == defaults[key]]
    return replace(ours, **{key: getattr(its, key) for key in keys})


def started_with(run: Path, method: Method[Any] | None) -> Recipe:
    """Return the recipe that the journal notes of a run's start, with the defaults of the release that began it."""
    text = RunJournal.inputs(run)["recipe"]
    # A method that was given as an object is needed to read its settings; the other objects are names in the text.
    start = bind(text, objects=Objects(method=method))
    *_, tables = read(text)
    # Later releases write `planner.goal` into every recipe.
    if isinstance(start.planner, AdaptiveSettings) and "goal" not in tables["planner"]:
        start = replace(start, planner=replace(start.planner, **OLD_ARMS))
        start = replace(start, pruning=start.pruning and replace(start.pruning, **OLD_FLOOR))
    if not isinstance(start.method, ADAPTING):
        return start
    # Releases before 0.3.0 left `state_max_rank` out where nothing was cut, which was the default.
    unstated = {each.name for each in fields(start.method)} - tables["method"].keys()
    old: dict[str, Any] = {key: default for key, default in OLD_DEFAULTS.items() if key in unstated}
    return replace(start, method=replace(start.method, **old))


def check_resumable(run: Path, recipe: Recipe) -> None:
    """Refuse to resume a run with another recipe than at its start; rounds.count and the engine may change.

    Raises:
        ConfigError: with every key that differs.
        StoreError: if the folder is no run, or its journal cannot be trusted.
    """
    if not has_begun(run):
        return  # killed before anything of it was noted: it starts
    start = started_with(run, recipe.objects.method)
    different = [change for change in changes(start, recipe) if not resumable(change)]
    if start.rounds.count != recipe.rounds.count and start.rounds.schedule != "constant":
        shape = start.rounds.schedule
        expected = f"{start.rounds.count}, by which rounds.schedule = {shape!r} has set the rates so far"
        hint = f'to train on, start another run with adapter.start = "{(run / "adapter").absolute()}"'
        raise ConfigError(Fault("rounds.count", expected, str(recipe.rounds.count), hint), source=f"resume {run}")
    if different:
        raise ConfigError(
            [Fault("", "the recipe that the run was started with", change) for change in different],
            source=f"resume {run}",
        )


def resumable(change: str) -> bool:
    """Return whether a run may go on in spite of a change, as `config.changes` writes it."""
    return change.startswith(("rounds.count:", "model.digest:"))


def write_options(run: Path, options: Sequence[str]) -> None:
    """Note with which options a run is served, beside its links: a server is not resumed without its own file."""
    write_text(run / LINK / OPTIONS, json.dumps(list(options)) + "\n")


def read_options(run: Path) -> Sequence[str]:
    """Return the options that a run was last served with; none where they are not noted, or not readable."""
    try:
        options = json.loads((run / LINK / OPTIONS).read_text(encoding="utf-8"))
    # They are a hint: what is wrong with the file must not hide what the hint is for.
    except (OSError, ValueError, RecursionError):
        return []
    return options if isinstance(options, list) and all(isinstance(one, str) for one in options) else []


def resume_command(door: Door, run: Path) -> str:
    """Return the command that resumes a run, ready to be pasted into a shell."""
    if door == "simulate":
        return f"fedtune simulate --resume {shlex.quote(str(run))}"
    if door == "link":
        return shlex.join(["fedtune", "serve", "--resume", str(run), *read_options(run)])
    path = run.absolute()
    return f'flwr run . --run-config \'recipe="{path}/recipe.toml" store="{path.parent}" resume="{path.name}"\''
