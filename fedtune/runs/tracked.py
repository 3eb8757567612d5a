"""The trackers that a recipe, or the command line, names for a run: checked, followed, and sent a run of the past."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

from fedtune.config import Recipe
from fedtune.errors import ConfigError, Fault, FedtuneError, StoreError
from fedtune.report.reader import recipe_table
from fedtune.rounds.events import Watch
from fedtune.store import result
from fedtune.store.run_directory import check_records
from fedtune.tracking.follow import follow, reason
from fedtune.tracking.packages import check_packages
from fedtune.tracking.sending import replay
from fedtune.tracking.tracker import TrackerName


def tracker_names(names: Sequence[str]) -> tuple[TrackerName, ...]:
    """Return names of the command line as those of trackers, each once, whose packages are installed.

    Raises:
        ConfigError: if one is no tracker.
        ExtraError: if its package is missing.
    """
    known: tuple[TrackerName, ...] = get_args(TrackerName)
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(Fault("--track", f"a tracker: {', '.join(known)}", repr(unknown[0])))
    chosen = tuple(name for name in known if name in names)
    check_packages(chosen)
    return chosen


def with_trackers(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """Return a recipe with these trackers beside its own.

    Raises:
        ConfigError: if one is no tracker.
        ExtraError: if its package is missing.
    """
    trackers = tuple(dict.fromkeys((*recipe.report.trackers, *tracker_names(names))))
    return replace(recipe, report=replace(recipe.report, trackers=trackers))


def track(
    run: Path, recipe: Recipe, watch: Watch, *, more: Sequence[TrackerName] = ()
) -> AbstractContextManager[Watch]:
    """Return an observer of a run that also sends its rounds to the trackers of its recipe, and to these."""
    settings = recipe.report
    return follow(
        run,
        (*settings.trackers, *more),
        watch,
        title=recipe.name,
        clients=settings.track_clients,
        result=partial(result.folder, run) if settings.track_result else None,
    )


def send_run(run: Path, name: TrackerName) -> str:
    """Send a tracker the rounds of a run that it has not, and return in a sentence how many those were.

    A run that the tracker followed goes on there; any other one, also copied from elsewhere, begins there.

    Raises:
        StoreError: if the run directory cannot be read, or the tracker cannot be reached.
    """
    check_records(run)
    table = recipe_table(run)
    settings, title = table.get("report"), table.get("name")
    settings = settings if isinstance(settings, dict) else {}  # of a copy that was changed by hand
    folder = result.folder(run) if settings.get("track_result") is True else None
    try:
        new, place = replay(
            name,
            run,
            title=str(title or ""),
            clients=settings.get("track_clients") is True,
            result=folder if folder is not None and folder.exists() else None,
        )
    except FedtuneError:
        raise
    # Another package's code, and a network, as in `follow`.
    except Exception as error:
        raise StoreError(f"{name}: expected that it takes the run; got {reason(error)}; try again") from error
    rounds = "1 round" if new == 1 else f"{new} rounds"
    return f"{name}: {rounds} sent, {place}" if new else f"{name}: has every round already, {place}"
