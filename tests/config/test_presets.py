from __future__ import annotations

from fedtune.config.presets import PRESETS, expand_preset


def test_a_preset_is_written_out_and_what_the_recipe_says_holds() -> None:
    found = expand_preset({"method": {"name": "fedspine", "mode": "reinit"}, "pruning": {"target": 0.25}})
    assert found == {
        "method": {"name": "flora", "mode": "reinit"},
        "pruning": {"target": 0.25},
        "planner": {"name": "bandit"},
    }


def test_other_methods_and_faults_are_left_alone() -> None:
    for table in ({"method": {"name": "flora"}}, {"method": 3}, {"method": {"name": ["fedspine"]}}, {}):
        assert expand_preset(table) == table
    assert expand_preset({"method": {"name": "fedspine"}, "pruning": 3})["pruning"] == 3


def test_every_preset_names_a_method() -> None:
    assert all("name" in tables["method"] for tables in PRESETS.values())


def test_fedpipe_is_flora_with_its_planner() -> None:
    found = expand_preset({"method": {"name": "fedpipe"}, "planner": {"importance": "gain"}})
    assert found == {"method": {"name": "flora"}, "planner": {"name": "fedpipe", "importance": "gain"}}
