"""`fedtune search`: the trials of a recipe's table `search`, one after the other, journalled, and their comparison."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedtune.config import Recipe, bind, digest, render
from fedtune.config.render import plain
from fedtune.config.trials import check_search, trial_recipe
from fedtune.errors import FedtuneError, RoundError, StoreError
from fedtune.report.search import content_of, values_text, write_search
from fedtune.rounds.events import Note, Phase, Watch
from fedtune.rounds.schedule import cohort_size
from fedtune.runs.context import versions
from fedtune.runs.path_checks import check_paths
from fedtune.search.settings import HALVING
from fedtune.search.steps import Result, Search, Step, best_result, first_values, next_step
from fedtune.search.tpe import load_optuna
from fedtune.store import files
from fedtune.store.files import write_text
from fedtune.store.run_directory import check_vacant, vacant, write_recipe
from fedtune.store.search_journal import SearchJournal, read_search

BEST = "best.toml"


@dataclass(frozen=True)
class SearchRun:
    """The folder of a search, and the content of its search.json."""

    path: Path
    content: Mapping[str, Any]
    best: Path | None
    """The recipe of the best trial."""
    page: Path


def search(
    recipe: Recipe, *, out: Path | None = None, fresh: bool = False, resume: bool = False, watch: Watch
) -> SearchRun:
    """Run a recipe's search, or what is left of it, and return its result.

    Args:
        recipe: with the table `search`.
        out: the folder; `runs/<name>-search` without it. With `resume`, that of the search.
        fresh: if the folder is taken, start beside it.
        resume: go on with a search that was stopped or killed; its table is what it would have been.
        watch: called with each event.

    Raises:
        ConfigError: before anything is written, with what is wrong with the recipe, its data, or a value of a trial.
        ExtraError: if a package that the search draws with is missing.
        RoundError: if no trial has a score.
        StoreError: if the folder cannot be written or trusted, or is that of another search.
    """
    course = check_search(recipe)
    if course.settings.kind == "tpe":
        load_optuna()
    target = out if out is not None else Path("runs") / f"{recipe.name}-search"
    if not resume:
        vacant(target, fresh=fresh)
    check_paths(recipe)
    from fedtune.runs.search_trial import Sites, check_held_out

    for note in remarks(recipe):
        watch(Note(note))
    watch(Phase("loading data and base"))
    sites = Sites()
    experiment = sites.prepare(replace(recipe, search=None), watch)
    check_held_out(experiment)
    # As it was prepared: the day that a chat template writes, and the number format, are those of every trial.
    prepared = replace(experiment.recipe, search=recipe.search)
    inputs = {
        "recipe": render(prepared),
        "recipe_digest": digest(prepared),
        "search_digest": search_digest(prepared),
        "base": experiment.base.digest,
        "versions": " ".join(f"{name} {number}" for name, number in versions().items()),
    }
    folder = target if resume else check_vacant(target, fresh=fresh)
    with SearchJournal.open(folder) as journal:
        check_same(folder, journal.inputs, inputs, watch)
        write_recipe(folder, inputs["recipe"])
        journal.begin(inputs)
        try:
            run_steps(course, prepared, folder, journal, sites, watch)
        except (KeyboardInterrupt, FedtuneError) as stop:
            reason = "Ctrl-C" if isinstance(stop, KeyboardInterrupt) else str(stop)
            if journal.results:
                write_search(folder, content_of(course, journal.results, name=recipe.name, ended=f"stopped: {reason}"))
            watch(Note(f"stopped after {len(journal.results)} steps; resume with: fedtune search --resume {folder}"))
            raise
        return write_result(course, prepared, folder, journal.results)


def run_steps(course: Search, recipe: Recipe, folder: Path, journal: SearchJournal, sites: Any, watch: Watch) -> None:
    """Run the steps that are left, each noted before it begins and once it has ended."""
    from fedtune.runs.search_trial import run_step

    if (folder / "trials").exists():
        files.sweep(folder / "trials")
    while (step := journal.step or next_step(course, journal.results)) is not None:
        if journal.step is None:
            journal.start(step)
        journal.finish(run_step(course, recipe, step, folder, sites, watch))
        watch(Note(line_of(course, journal.results)))


def write_result(course: Search, recipe: Recipe, folder: Path, results: Sequence[Result]) -> SearchRun:
    """Write the tables, the picture and the recipe of the best trial.

    Raises:
        RoundError: if no trial has a score.
    """
    content = content_of(course, results, name=recipe.name)
    page = write_search(folder, content)
    best = best_result(course, results)
    if best is None:
        reasons = "; ".join(f"trial {result.step.trial}: {result.reason}" for result in results[:3])
        raise RoundError(
            f"{folder}: expected a trial with a score; got {len(results)} that failed: {reasons}; "
            "narrow search.space, or run the recipe by itself to see why"
        )
    write_text(folder / BEST, best_text(course, recipe, best, results))
    return SearchRun(folder, content, folder / BEST, page)


def best_text(course: Search, recipe: Recipe, best: Result, results: Sequence[Result]) -> str:
    """Return the recipe of the best trial, ready for `fedtune simulate`, with what is to be known of it in front."""
    metric = course.settings.metric
    lines = [
        f"# The best of {len({result.step.trial for result in results})} trials of the search {recipe.name!r}: trial "
        f"{best.step.trial}, held-out {metric} {best.score:.6g} after round {best.step.until}.",
        "# That score chose it and is therefore too good: the test data were not looked at, and say what it is worth.",
    ]
    steps = [result.step for result in results if result.step.trial == best.step.trial]
    if best.step.segment:
        lines.append("# The trial took another one's model on its way; these are its last settings. Before them:")
        lines += [f"# from round {step.since}: {values_text(step.values)}" for step in lineage(results, best.step)]
    elif steps[-1].until < course.rounds:
        lines.append(f"# No trial reached round {course.rounds}, for which the recipe is.")
    bound = trial_recipe(recipe, best.step.values, name=f"{recipe.name[:94]}-best")
    return "\n".join(lines) + "\n" + render(bound)


def lineage(results: Sequence[Result], step: Step) -> Sequence[Step]:
    """Return the steps from which a model has come, the first one first, across the trials whose states were taken."""
    steps = {(result.step.trial, result.step.segment, result.step.until): result.step for result in results}
    path = [step]
    while path[-1].since:
        last = path[-1]
        trial, segment = (last.trial, last.segment) if last.source is None else (last.source, last.source_segment)
        path.append(steps[trial, segment, last.since])
    return path[::-1]


def line_of(course: Search, results: Sequence[Result]) -> str:
    """Return the last step in one line, with the best score so far."""
    last = results[-1]
    step, best = last.step, best_result(course, results)
    rounds = f"round {step.until}" if step.until - step.since == 1 else f"rounds {step.since + 1} to {step.until}"
    took = f", on the model of trial {step.source}" if step.source is not None else ""
    outcome = f"failed: {last.reason}" if last.score is None else f"{course.settings.metric} {last.score:.4f}"
    leader = "" if best is None else f" (best: trial {best.step.trial}, {best.score:.4f})"
    return f"trial {step.trial} ({values_text(step.values)}), {rounds}{took}: {outcome}{leader}"


def remarks(recipe: Recipe) -> Iterator[str]:
    """Yield what trials do otherwise than a run of the recipe."""
    rounds = recipe.rounds
    if rounds.keep != "last" or rounds.patience is not None:
        yield "trials run all rounds of their budget; rounds.keep and rounds.patience hold for best.toml alone"
    if recipe.personal is not None:
        yield "trials are compared by the global model's scores, not by those of the clients' own models"


def search_digest(recipe: Recipe) -> str:
    """Return the SHA-256 of a recipe's table `search`, which the digest of the recipe leaves out."""
    return hashlib.sha256(repr(plain(recipe.search)).encode()).hexdigest()


def check_same(folder: Path, began: Mapping[str, str], now: Mapping[str, str], watch: Watch) -> None:
    """Refuse to go on with another search than was begun, and note other versions.

    Raises:
        StoreError: naming what differs.
    """
    for key, what in (("recipe_digest", "recipe"), ("search_digest", "table [search]"), ("base", "base")):
        if began and began[key] != now[key]:
            raise StoreError(
                f"{folder}: expected the {what} that the search was begun with ({began[key][:12]}); got another "
                f"({now[key][:12]}); give it back, or start another search with --out"
            )
    if began and began["versions"] != now["versions"]:
        watch(Note(f"begun with versions {began['versions']}; now {now['versions']}: the last bits may differ"))


def recipe_of_search(folder: Path) -> Recipe:
    """Return the recipe of a search, as it was begun.

    Raises:
        StoreError: if the folder holds no search, or its journal cannot be trusted.
    """
    inputs, _ = read_search(folder)
    return bind(inputs["recipe"])


def plan_search(recipe: Recipe) -> Mapping[str, Any]:
    """Return what a search would run and, by the cost model, send, before anything is trained.

    Of trials whose values follow from scores only the number is known.

    Raises:
        ConfigError: as `search`.
    """
    course = check_search(recipe)
    check_paths(recipe)
    from fedtune.runs.plan import bill_of_experiment
    from fedtune.runs.search_trial import Sites, check_held_out

    sites, rows, bytes_are = Sites(sizes_alone=True), [], "estimated"
    experiment = sites.prepare(replace(recipe, search=None))
    check_held_out(experiment)
    for trial in range(0 if course.settings.kind == "tpe" else course.trials):
        values = first_values(course, trial)
        bill = bill_of_experiment(sites.prepare(trial_recipe(recipe, values)), measure=False)
        bytes_are = bill.kind_of_bytes if bill is not None else bytes_are
        traffic = [] if bill is None else [down + up for down, up in bill.by_round]
        first = None if bill is None else sum(traffic[: course.rungs[0]])
        rows.append(
            {
                "trial": trial,
                "values": dict(values),
                "first_bytes": first,
                "bytes": sum(traffic) if bill else None,
            }
        )
    rounds = rounds_planned(course)
    return {
        "name": recipe.name,
        "kind": course.settings.kind,
        "trials": course.trials,
        "rungs": list(course.rungs),
        "rounds": rounds,
        "client_rounds": rounds * cohort_size(len(experiment.fleet), recipe.rounds.cohort),
        "bytes_are": bytes_are,
        "rows": rows,
    }


def rounds_planned(course: Search) -> int:
    """Return how many rounds all trials take together if none fails; of asha, which decides as it goes, those of sha.

    >>> from fedtune.search.settings import SearchSettings
    >>> rounds_planned(Search(SearchSettings(kind="sha", trials=9), 9, 0))
    21
    """
    if course.settings.kind not in HALVING:
        return course.trials * course.rounds
    left, before, total = course.trials, 0, 0
    for rung in course.rungs:
        total, before = total + left * (rung - before), rung
        left = -(-left // course.settings.reduction)
    return total
