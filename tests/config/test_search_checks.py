"""What a search may not try, refused before anything is trained, each by its key."""

from __future__ import annotations

import pytest

from fedtune.config import bind, changes, digest, render
from fedtune.config.trials import bind_trial, check_search, quiet_recipe, search_of, trial_recipe
from fedtune.errors import ConfigError
from fedtune.search.settings import Range
from tests.config.conftest import SHORTEST, Faulty

SPACE = """
[search]
trials = 4
[search.space]
"client.learning_rate" = { low = 1e-4, high = 1e-2, log = true }
adapter.rank = [2, 4]
"""
TEXT = SHORTEST + SPACE


def faults(*overrides: str, space: str) -> dict[str, str]:
    """Return the faults of a search over a space, by path."""
    with pytest.raises(ConfigError) as caught:
        check_search(bind(SHORTEST + f"\n[search]\ntrials = 4\n[search.space]\n{space}\n", overrides=overrides))
    return {fault.path: str(fault) for fault in caught.value.faults}


def test_keys_are_written_in_quotes_or_as_tables() -> None:
    settings = search_of(bind(TEXT)).settings
    assert settings.space == {
        "client.learning_rate": Range(1e-4, 1e-2, log=True),
        "adapter.rank": (2, 4),
    }


def test_the_table_is_no_part_of_what_a_run_is() -> None:
    plain, searched = bind(SHORTEST), bind(TEXT)
    assert digest(plain) == digest(searched)
    assert not changes(plain, searched)
    assert bind(render(searched)) == searched
    assert "[search]" not in render(plain)


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["search.score=test"], "search.score", "a model chosen by it has no test score left; got 'test'"),
        (["search.score=train"], "search.score", "validation, the clients' held-out rows; got 'train'"),
        (["search.space={}"], "search.space", "at least one setting to try; got none"),
        (["search.space=7"], "search.space", "a table; got 7"),
        (["search=asha"], "search", "a table"),
        (["search.kind=hyperband"], "search.kind", "expected"),
        (["search.kind=shaa"], "search.kind", 'did you mean "sha"'),
        (["search.trails=7"], "search.trails", "did you mean search.trials?"),
        (["search.reduction=1"], "search.reduction", "got 1"),
        (["search.kind=sha", "search.first_rung=10"], "search.first_rung", "fewer than the 10 rounds of rounds.count"),
        (["search.kind=asha", "rounds.count=1"], "search.first_rung", "fewer than the 1 rounds"),
        (["search.first_rung=12"], "search.first_rung", "lower it, or raise rounds.count"),
        (["search.kind=asha", "search.trials=2"], "search.trials", "at least 3 with kind = 'asha'"),
        (["search.kind=pbt", "search.interval=10"], "search.interval", "or no trial ever copies another"),
        (["search.interval=2"], "search.interval", "nothing but with kind = 'pbt'"),
        (["search.kind=pbt"], 'search.space."adapter.rank"', "it changes while a model is trained"),
        (["search.kind=grid"], 'search.space."client.learning_rate".points', "write points = 5"),
        (["search.metric=accuracy"], "search.metric", "a score of model.task = 'causal'"),
        (["evaluate.clients=false"], "evaluate.clients", "true with [search]"),
        (['search.space={"seed" = [0, 1]}'], 'search.space."seed"', "fedtune compare --seeds"),
        (['search.space={"data.split.alpha" = [0.1, 1.0]}'], 'search.space."data.split.alpha"', "same held-out rows"),
        (['search.space={"model.base" = ["a", "b"]}'], 'search.space."model.base"', "search each base for itself"),
        (['search.space={"rounds.count" = [3, 4]}'], 'search.space."rounds.count"', "it is the budget of a trial"),
        (['search.space={"search.trials" = [3, 4]}'], 'search.space."search.trials"', "does not search for itself"),
        (['search.space={"client.steps" = []}'], 'search.space."client.steps"', "got an empty list"),
        (['search.space={"client.steps" = [3, 3]}'], 'search.space."client.steps"', "one of them twice"),
        (['search.space={"client.steps" = 3}'], 'search.space."client.steps"', "a list of values or a range"),
        (['search.space={"client.steps" = {low = 3, high = 3}}'], 'search.space."client.steps".high', "above low = 3"),
        (['search.space={"client.steps" = {low = 3}}'], 'search.space."client.steps".high', "got nothing"),
        (
            ['search.space={"client.weight_decay" = {low = 0.0, high = 1.0, log = true}}'],
            'search.space."client.weight_decay".low',
            "above 0 with log = true",
        ),
        (
            ['search.space={"client.steps" = {low = 3, high = 9, stepp = 2}}'],
            'search.space."client.steps".stepp',
            "unknown key",
        ),
    ],
)
def test_a_fault_of_the_table_is_named_by_its_key(faulty: Faulty, overrides: list[str], path: str, words: str) -> None:
    assert words in faulty(*overrides, more=SPACE)[path]


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
    assert course.trials == 16


def test_a_recipe_without_the_table_says_what_one_looks_like() -> None:
    with pytest.raises(ConfigError, match=r"search: expected the table \[search\].*got nothing"):
        check_search(bind(SHORTEST))


def test_a_trial_runs_all_its_rounds_and_its_recipe_is_the_users() -> None:
    text = TEXT.replace("count = 10", 'count = 10, keep = "best", patience = 2')
    recipe = trial_recipe(bind(text), {"client.learning_rate": 0.01})
    assert (recipe.rounds.keep, recipe.rounds.patience, recipe.client.learning_rate) == ("best", 2, 0.01)
    quiet = quiet_recipe(recipe)
    assert (quiet.rounds.keep, quiet.rounds.patience, quiet.evaluate.every) == ("last", None, 0)
