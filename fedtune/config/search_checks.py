"""What the table `search` must satisfy by itself, and with the tables of the recipe that it is in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedtune.config.error_text import display
from fedtune.config.recipe import Recipe
from fedtune.config.search_table import space_path
from fedtune.errors import Fault
from fedtune.search.settings import Range, SearchSettings
from fedtune.search.space import combinations, grid, size
from fedtune.search.steps import Search

SAME_FOR_ALL: Mapping[str, str] = {
    "name": "it names the run",
    "seed": "which of two seeds is luckier says nothing of a setting; compare seeds with fedtune compare --seeds",
    "model": "scores of different bases are no measure of settings; search each base for itself",
    "data": "trials are compared on the same held-out rows; search each data set for itself",
    "evaluate": "it says how trials are scored, which must be the same for all",
    "engine": "it changes no score",
    "report": "it changes no score",
    "fleet": "which devices there are is no choice",
    "device": "which devices there are is no choice",
    "search": "a search does not search for itself",
    "rounds.count": "it is the budget of a trial; search.first_rung and search.reduction say which trials run fewer",
    "rounds.keep": "trials are scored after their last round",
    "rounds.metric": "trials are compared by search.metric",
    "rounds.patience": "trials run all rounds of their budget",
}
"""Keys, and tables, that a search does not change, and why."""
MOVABLE = ("client.", "descend.", "method.server_learning_rate")
"""Beginnings of the keys that may change while a model is trained, as `pbt` does: no shape depends on them."""

LARGEST_GRID = 10_000
"""Trials of a grid: all are written down before the first one begins."""


def search_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield what is wrong with the table `search` by itself, and with the rounds that it shares out."""
    settings = recipe.search
    if settings is None:
        return
    if settings.score != "validation":
        hint = 'write score = "validation", and score the run of best.toml on test data once the search is over'
        why = ": a model chosen by it has no test score left" if "test" in settings.score else ""
        yield Fault("search.score", f"validation, the clients' held-out rows{why}", display(settings.score), hint)
    if not settings.space:
        hint = '"client.learning_rate" = { low = 1e-4, high = 1e-2, log = true }'
        yield Fault("search.space", "at least one setting to try", "none", f"e.g. {hint}")
    if not recipe.evaluate.clients:
        yield Fault(
            "evaluate.clients", "true with [search], which compares by clients' held-out rows", "false", "set it"
        )
    classifies = recipe.model.task == "classification"
    if settings.metric not in (
        ("loss", "accuracy", "macro_f1") if classifies else ("loss", "perplexity", "bits_per_character")
    ):
        expected = f"a score of model.task = {recipe.model.task!r}"
        yield Fault("search.metric", expected, display(settings.metric), "loss is one of either")
    if settings.kind == "grid" and (count := combinations(settings.space)) > LARGEST_GRID:
        hint = "give fewer points or values, or take kind = 'random'"
        yield Fault("search.space", f"at most {LARGEST_GRID} combinations with kind = 'grid'", f"{count}", hint)
        return
    yield from rung_faults(settings, recipe.rounds.count)
    for key, dimension in settings.space.items():
        yield from key_faults(settings, key)
        if isinstance(dimension, Range) and settings.kind == "grid" and dimension.points is None:
            hint = "write points = 5, or a list of values"
            yield Fault(f"{space_path(key)}.points", "a number with kind = 'grid'", "none", hint)


def rung_faults(settings: SearchSettings, rounds: int) -> Iterator[Fault]:
    """Yield what is wrong with the rounds after which trials are compared, and the keys that a kind does not read."""
    kind, first = settings.kind, settings.first_rung
    halves = kind in ("sha", "asha")
    if (first or (1 if halves else 0)) >= rounds:
        expected = (
            f"fewer than the {rounds} rounds of rounds.count: a rung with the rounds of the last one decides nothing"
        )
        yield Fault("search.first_rung", expected, f"{first or 1}", "lower it, or raise rounds.count")
    if kind == "pbt" and first is not None:
        yield Fault("search.first_rung", "nothing with kind = 'pbt'", f"{first}", "it reads search.interval")
    if kind != "pbt" and settings.interval is not None:
        yield Fault("search.interval", "nothing but with kind = 'pbt'", f"{settings.interval}", "leave it out")
    if kind == "pbt" and (settings.interval or 1) >= rounds:
        expected = f"fewer than the {rounds} rounds of rounds.count, or no trial ever copies another"
        yield Fault("search.interval", expected, f"{settings.interval or 1}", "lower it, or raise rounds.count")
    different = len(grid(settings.space)) if kind == "grid" else size(settings.space) if settings.space else None
    # A population may begin with equal ones: what it copies is changed.
    if settings.trials is not None and different is not None and settings.trials > different and kind != "pbt":
        expected = f"at most {different}: there are no more different trials in search.space"
        yield Fault("search.trials", expected, f"{settings.trials}", "leave it out to try all")
    least = settings.reduction if halves else 2 if kind == "pbt" else 1
    trials = settings.trials if different is None else Search(settings, rounds, 0).trials
    if trials and trials < least:
        hint = "" if settings.trials is not None else "try more settings in search.space, or take kind = 'random'"
        yield Fault("search.trials", f"at least {least} with kind = {kind!r}, or none is better", f"{trials}", hint)


def key_faults(settings: SearchSettings, key: str) -> Iterator[Fault]:
    """Yield why a search does not change a key."""
    for fixed, why in SAME_FOR_ALL.items():
        if key == fixed or key.startswith(f"{fixed}."):
            yield Fault(space_path(key), "a setting of how a model is trained", key, f"leave it out: {why}")
            return
    if settings.kind == "pbt" and not key.startswith(MOVABLE):
        expected = (
            "a key of client, or method.server_learning_rate, with kind = 'pbt': it changes while a model is trained"
        )
        yield Fault(space_path(key), expected, key, "search for it with another kind")
