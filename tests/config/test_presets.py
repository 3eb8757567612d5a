from __future__ import annotations

from typing import Any, get_args

from fedtune.config import bind, render
from fedtune.config.presets import DATA_PRESETS, PRESETS, expand_data_preset, expand_preset
from fedtune.data.settings import PresetName


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


def test_a_named_data_set_brings_its_place_its_template_and_its_revision() -> None:
    found = expand_data_preset({"data": {"preset": "gsm8k", "split": {"kind": "iid", "clients": 3}}})["data"]
    assert found == {
        "preset": "gsm8k",
        "split": {"kind": "iid", "clients": 3},
        "template": "alpaca",
        "source": "openai/gsm8k",
        "subset": "main",
        "revision": "e53f048856ff4f594e959d75785d2c2d37b678ee",
    }


def test_a_source_of_its_own_takes_columns_and_template_alone() -> None:
    own = {"preset": "gsm8k", "source": "mine.jsonl", "template": "plain"}
    assert expand_data_preset({"data": own})["data"] == own
    for table in ({"data": 3}, {}, {"data": {"preset": "gms8k"}}, {"data": {"preset": ["gsm8k"]}}):
        assert expand_data_preset(table) == table


def test_a_recipe_with_a_named_data_set_binds_and_renders_to_the_same(tables: dict[str, Any]) -> None:
    for preset in get_args(PresetName):
        tables["data"] = {"preset": preset, "split": {"kind": "iid", "clients": 3}}
        recipe = bind(tables)
        assert recipe.data.source == (DATA_PRESETS[preset].hub or DATA_PRESETS[preset].file)
        assert bind(render(recipe)) == recipe
