from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedtune.config import bind
from fedtune.config.split_checks import match_faults
from fedtune.data.settings import Split
from fedtune.errors import ConfigError


@pytest.fixture
def matched(tables: dict[str, Any]) -> dict[str, Any]:
    split = {"kind": "meta", "by": "kind", "clients": 2, "match": "train"}
    tables["data"] = {"source": "rows.jsonl", "test": "test.jsonl", "split": split}
    tables["override"] = []
    return tables


def test_a_planner_that_learns_from_losses_does_not_learn_from_the_test(matched: dict[str, Any]) -> None:
    bind(matched)
    planner = {"name": "expgrad", "learning_rates": [1e-3, 1e-2]}
    with pytest.raises(ConfigError, match=r"planner\.name: expected 'fixed' or 'random' with data\.split\.match"):
        bind({**matched, "planner": planner})
    del matched["data"]["split"]["match"]
    bind({**matched, "planner": planner})


def test_a_search_does_not_choose_by_the_test(matched: dict[str, Any]) -> None:
    search = {"kind": "random", "trials": 2, "space": {"client.learning_rate": {"low": 1e-4, "high": 1e-2}}}
    with pytest.raises(ConfigError, match=r"data\.split\.match: expected none with \[search\], which would choose by"):
        bind({**matched, "search": search})
    del matched["data"]["split"]["match"]
    bind({**matched, "search": search})


def test_a_guard_that_reads_clients_losses_does_not_read_the_test(matched: dict[str, Any]) -> None:
    kseed = {**matched, "method": {"name": "fedkseed"}, "adapter": {}}
    with pytest.raises(
        ConfigError, match=r"method\.name: expected a method of adapters with data\.split\.match: .*guard"
    ):
        bind(kseed)
    del matched["data"]["split"]["match"]
    bind(kseed)


def test_without_match_there_is_nothing_to_refuse(matched: dict[str, Any]) -> None:
    recipe = bind(matched)
    assert list(match_faults(recipe)) == []
    plain = replace(recipe, data=replace(recipe.data, split=Split("iid", clients=2)))
    assert list(match_faults(plain)) == []
