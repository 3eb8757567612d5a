"""What the table `asynchronous` excludes: one fault each, with what to do."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

import pytest

from fedtune.config import bind, digest, render
from fedtune.errors import ConfigError
from fedtune.rounds.asynchronous import AsyncSettings
from tests.config.conftest import SHORTEST

FIVE = {
    **tomllib.loads(SHORTEST),
    "data": {"source": "rows.jsonl", "split": {"kind": "iid", "clients": 5}},
}


def bound(asynchronous: Mapping[str, Any], **tables: Any) -> Any:
    return bind({**FIVE, "asynchronous": asynchronous, **tables})


REFUSED = [
    ({}, {}, "asynchronous.buffer: expected the number of updates that end a round; got nothing"),
    ({"trigger": "time"}, {}, "asynchronous.budget_s: expected the seconds of a round; got nothing"),
    ({"trigger": "time", "budget_s": 1.0, "buffer": 2}, {}, "asynchronous.buffer: expected nothing with trigger"),
    ({"buffer": 2, "budget_s": 9.5}, {}, "asynchronous.budget_s: expected nothing with trigger .* got 9.5"),
    ({"buffer": 0}, {}, "asynchronous.buffer"),
    ({"buffer": 2, "staleness_exponent": -1.0}, {}, "asynchronous.staleness_exponent"),
    ({"buffer": 2, "max_staleness": -1}, {}, "asynchronous.max_staleness"),
    ({"buffer": 3, "concurrency": 2}, {}, "asynchronous.buffer: expected at most the 2 clients that work at the same"),
    ({"buffer": 3}, {"rounds": {"cohort": 2}}, "asynchronous.buffer: expected at most the 2 clients that work"),
    ({"buffer": 6}, {}, "asynchronous.buffer: expected at most the 5 clients of data.split"),
    ({"buffer": 2, "concurrency": 9}, {}, "asynchronous.concurrency: expected at most the 5 clients of data.split"),
    ({"buffer": 2, "concurrency": 4}, {"rounds": {"cohort": 4}}, "rounds.cohort: expected nothing beside"),
    ({"buffer": 2}, {"rounds": {"min_clients": 3}}, "rounds.min_clients: expected at most asynchronous.buffer = 2"),
    ({"buffer": 2}, {"method": {"name": "fedex"}}, "asynchronous: expected none with .fedex.: its residual"),
    ({"buffer": 2}, {"method": {"name": "hetlora"}}, "asynchronous: expected none with .hetlora."),
    ({"buffer": 2}, {"method": {"name": "flexlora"}}, "asynchronous: expected none with .flexlora."),
    ({"buffer": 2}, {"method": {"name": "fedkseed"}}, "asynchronous: expected none with .fedkseed."),
    ({"buffer": 2}, {"planner": {"name": "deadline"}, "fleet": {}}, "planner: expected .fixed. with .asynchronous."),
    ({"buffer": 2}, {"method": {"name": "flora"}, "pruning": {}}, "pruning: expected no table beside .asynchronous."),
    ({"buffer": 2, "goal": 3}, {}, "asynchronous.goal"),
]


@pytest.mark.parametrize(("asynchronous", "tables", "text"), REFUSED, ids=[text[:50] for *_, text in REFUSED])
def test_what_does_not_fit_is_refused_by_name(asynchronous: Any, tables: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        bound(asynchronous, **tables)


def test_over_selection_and_a_fleet_go_together_in_asynchronous_rounds() -> None:
    """A synchronous round would end in the order of this machine's work."""
    recipe = bound({"buffer": 3, "concurrency": 2}, fleet={"name": "phones"}, rounds={"over_select": 1.5})
    assert recipe.asynchronous.working(5, recipe.rounds) == 3
    with pytest.raises(ConfigError, match=r"rounds\.over_select"):
        bind({**FIVE, "fleet": {"name": "phones"}, "rounds": {"over_select": 1.5}})


def test_without_the_table_recipes_are_written_as_they_were() -> None:
    plain, recipe = bind(SHORTEST), bound({"buffer": 2})
    assert plain.asynchronous is None
    assert "asynchronous" not in render(plain)
    assert recipe.asynchronous == AsyncSettings(buffer=2)
    assert bind(render(recipe)) == recipe
    assert digest(bind(FIVE)) != digest(recipe)
