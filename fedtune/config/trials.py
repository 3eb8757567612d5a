"""The recipes of a search's trials, and what is known to be wrong with them before the first one runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from fedtune.config.binding import bind, bind_types
from fedtune.config.recipe import Recipe
from fedtune.config.render import render, toml
from fedtune.config.search_table import space_path
from fedtune.errors import ConfigError, Fault
from fedtune.search.settings import Range, SearchSettings, Value
from fedtune.search.steps import Search, first_values


def search_of(recipe: Recipe) -> Search:
    """Return what decides the course of a recipe's search.

    Raises:
        ConfigError: if it has no table `search`.
    """
    settings = recipe.search
    if settings is None:
        example = '[search.space] "client.learning_rate" = { low = 1e-4, high = 1e-2, log = true }'
        raise ConfigError(Fault("search", "the table [search], with what is to be tried", "nothing", f"e.g. {example}"))
    return Search(settings, recipe.rounds.count, recipe.seed if settings.seed is None else settings.seed)


def trial_recipe(recipe: Recipe, values: Mapping[str, Value], *, name: str = "") -> Recipe:
    """Return a recipe with some of its keys replaced, and without its search.

    Raises:
        ConfigError: if it does not bind.
    """
    text = render(replace(recipe, search=None, name=name or recipe.name))
    bound = bind(text, overrides=[f"{key}={toml(value)}" for key, value in values.items()], objects=recipe.objects)
    return replace(bound, root=recipe.root)


def quiet_recipe(recipe: Recipe) -> Recipe:
    """Return a trial's recipe as a search runs it: to the end of its rounds, unscored on test data on the way.

    The result is the last round's: a round that is chosen by a score, or an early end, would make trials of different
    lengths of what a search compares at one length.
    """
    rounds = replace(recipe.rounds, keep="last", patience=None)
    evaluate = replace(recipe.evaluate, every=0, generate=0, prompt=None, prompts=(), references=())
    return replace(recipe, rounds=rounds, evaluate=evaluate)


def check_search(recipe: Recipe) -> Search:
    """Return a recipe's search after checking that every value that can be known before it begins is one of a recipe.

    Raises:
        ConfigError: naming the setting, or the trial whose values do not go together.
    """
    search = search_of(recipe)
    faults = [fault for key in search.settings.space for fault in value_faults(recipe, search.settings, key)]
    if faults:
        raise ConfigError(faults)
    if search.settings.kind != "tpe":  # whose later draws follow from scores
        for trial in range(search.trials):
            try:
                bind_trial(recipe, trial, first_values(search, trial))
            except ConfigError as error:
                faults.extend(error.faults)
    if faults:
        raise ConfigError(faults[:8])
    return search


def bind_trial(recipe: Recipe, trial: int, values: Mapping[str, Value]) -> Recipe:
    """Return the recipe of a trial.

    Raises:
        ConfigError: naming the trial and its values, if they do not go together.
    """
    try:
        return trial_recipe(recipe, values, name=f"{recipe.name[:94]}-{trial:03d}")
    except ConfigError as error:
        raise ConfigError([of_trial(fault, trial, values) for fault in error.faults]) from error


def of_trial(fault: Fault, trial: int, values: Mapping[str, Value]) -> Fault:
    """Return the fault of a trial's recipe with the trial's number and values."""
    own = ", ".join(f"{key} = {toml(value)}" for key, value in values.items())
    return replace(fault, path=f"trial {trial} ({own}): {fault.path}")


def value_faults(recipe: Recipe, settings: SearchSettings, key: str) -> Iterator[Fault]:
    """Yield which values of a setting, or ends of its range, its key does not take whatever the other settings are."""
    dimension = settings.space[key]
    if isinstance(dimension, Range):
        places = {".low": dimension.low, ".high": dimension.high}
    else:
        places = {f".{place}": value for place, value in enumerate(dimension)}
    text = render(replace(recipe, search=None))
    for place, value in places.items():
        faults: list[Fault] = []
        bind_types(text, [f"{key}={toml(value)}"], recipe.objects, faults)
        unknown = next((fault for fault in faults if fault.got == "unknown key"), None)
        if unknown is not None:
            yield replace(unknown, path=space_path(key))
            return
        for fault in faults:
            yield replace(fault, path=f"{space_path(key)}{place}", hint=fault.hint or "leave it out of the space")
