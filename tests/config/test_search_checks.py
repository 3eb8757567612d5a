"""What a search may not try, refused by its key when the recipe is bound."""

from __future__ import annotations

import pytest

from tests.config.conftest import SHORTEST, Faulty

SPACE = """
[search]
trials = 4
[search.space]
"client.learning_rate" = { low = 1e-4, high = 1e-2, log = true }
adapter.rank = [2, 4]
"""
TEXT = SHORTEST + SPACE


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
        (
            ["search.kind=asha", "search.trials=none", 'search.space={"client.steps" = [3, 4]}'],
            "search.trials",
            "at least 3 with kind = 'asha', or none is better; got 2; try more settings in search.space",
        ),
        (["search.kind=pbt", "search.interval=10"], "search.interval", "or no trial ever copies another"),
        (["search.interval=2"], "search.interval", "nothing but with kind = 'pbt'"),
        (["search.kind=pbt"], 'search.space."adapter.rank"', "it changes while a model is trained"),
        (
            ["search.kind=grid", 'search.space={"client.weight_decay" = {low = 0.0, high = 1.0, points = 1000000000}}'],
            "search.space",
            "at most 10000 combinations with kind = 'grid'; got 1000000000; give fewer points",
        ),
        (["search.kind=grid"], 'search.space."client.learning_rate".points', "write points = 5"),
        (
            ['search.space={"client.steps" = [3, 4, 5]}'],
            "search.trials",
            "at most 3: there are no more different trials",
        ),
        (
            ["search.kind=grid", 'search.space={"client.steps" = {low = 1, high = 9, points = 3}}'],
            "search.trials",
            "at most 3: there are no more different trials in search.space; got 4",
        ),
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
