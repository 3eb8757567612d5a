"""The recipes of a search's trials, and values that make none, refused before the first trial."""

from __future__ import annotations

import pytest

from fedtune.config import bind
from fedtune.config.trials import bind_trial, check_search, quiet_recipe, trial_recipe
from fedtune.errors import ConfigError
from tests.config.conftest import SHORTEST
from tests.config.test_search_checks import TEXT


def faults(*overrides: str, space: str) -> dict[str, str]:
    """Return the faults of a search over a space, by path."""
    with pytest.raises(ConfigError) as caught:
        check_search(bind(SHORTEST + f"\n[search]\n[search.space]\n{space}\n", overrides=overrides))
    return {fault.path: str(fault) for fault in caught.value.faults}


def test_a_key_that_does_not_exist_is_refused_with_the_nearest() -> None:
    (message,) = faults(space='"client.learning_rat" = [0.1, 0.2]').values()
    assert message == ('search.space."client.learning_rat": unknown key; did you mean client.learning_rate?')
    (message,) = faults(space='"clients.steps" = [1, 2]').values()
    assert message == 'search.space."clients.steps": unknown key; did you mean client?'


def test_a_value_that_no_recipe_takes_is_named_by_its_place() -> None:
    assert 'search.space."adapter.rank".1' in faults(space='"adapter.rank" = [4, 0]')
    assert 'search.space."client.dropout".high' in faults(space='"client.dropout" = { low = 0.0, high = 1.5 }')
    assert 'search.space."method".1' in faults(space='"method" = ["flora", "fedavgg"]')


def test_values_that_do_not_go_together_name_the_trial() -> None:
    space = '"client.optimizer" = ["adamw", "sgd"]\n"client.momentum" = [0.0, 0.9]'
    found = faults("search.kind=grid", space=space)
    (path,) = found
    assert path == 'trial 1 (client.optimizer = "adamw", client.momentum = 0.9): client.momentum'
    assert "0 with optimizer 'adamw'" in found[path]


def test_methods_and_overrides_may_be_searched_for() -> None:
    check_search(bind(SHORTEST + '\n[search]\n[search.space]\n"method" = ["flora", "fedit"]\n'))
    text = SHORTEST + '\n[[override]]\nclients = "client-0"\nrank = 4\n[search]\n[search.space]\n'
    course = check_search(bind(text + '"override.0.rank" = [2, 4, 8]\n'))
    recipe = bind_trial(bind(text + '"override.0.rank" = [2]\n'), 3, {"override.0.rank": 8})
    assert (recipe.override[0].rank, recipe.name, recipe.search) == (8, "run-003", None)
    assert course.trials == 3


def test_a_recipe_without_the_table_says_what_one_looks_like() -> None:
    with pytest.raises(ConfigError, match=r"search: expected the table \[search\].*got nothing"):
        check_search(bind(SHORTEST))


def test_a_trial_runs_all_its_rounds_and_its_recipe_is_the_users() -> None:
    text = TEXT.replace("count = 10", 'count = 10, keep = "best", patience = 2')
    recipe = trial_recipe(bind(text), {"client.learning_rate": 0.01})
    assert (recipe.rounds.keep, recipe.rounds.patience, recipe.client.learning_rate) == ("best", 2, 0.01)
    quiet = quiet_recipe(recipe)
    assert (quiet.rounds.keep, quiet.rounds.patience, quiet.evaluate.every) == ("last", None, 0)
