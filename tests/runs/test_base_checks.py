from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config import Recipe, bind
from fedtune.errors import ConfigError
from fedtune.messages import Blueprint
from fedtune.model.emulator_facts import NAME, EmulatorFacts, encode
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import Block, BlockLayout, linear_shapes
from fedtune.runs.base_checks import check_layers, check_pruning, check_ranks

BERT = BlockLayout("bert", (Block("x", 4, 4, 2, 32),), width=8)
MODULES = dict(zip(BERT.sides, linear_shapes(BERT), strict=True))


def blueprint(*names: str, **settings: Any) -> Blueprint:
    modules = {name: MODULES[f"x.{name}"] for name in names}
    modules = {f"x.{name}": shape for name, shape in modules.items()} or MODULES
    return Blueprint(modules, saved={}, max_rank=4, seed=0, anatomy=BERT, pruning=PruningSettings(**settings))


@pytest.fixture
def recipe(tables: dict[str, Any]) -> Recipe:
    return bind(tables)


def test_a_rank_may_reach_the_smaller_side_of_the_smallest_layer_and_no_more(recipe: Recipe) -> None:
    modules = {"wide": (64, 32), "narrow": (8, 128)}
    check_ranks(recipe, modules)  # the largest override asks for 8
    larger = replace(recipe, adapter=replace(recipe.adapter, rank=9))
    with pytest.raises(ConfigError, match=r"at most 8, the smaller side of narrow \(8, 128\); got 9"):
        check_ranks(larger, modules)


def test_a_rank_that_a_planner_may_choose_is_named_where_it_stands(tables: dict[str, Any]) -> None:
    rest = {key: value for key, value in tables.items() if key != "override"}
    planned = bind({**rest, "planner": {"name": "random", "ranks": [2, 32]}})
    with pytest.raises(ConfigError, match=r"planner\.ranks: expected at most 8"):
        check_ranks(planned, {"narrow": (8, 128)})


def test_settings_that_cut_this_base_are_taken() -> None:
    check_pruning(blueprint())
    check_pruning(blueprint(multiple=8, unit="kv_group", score="lora"))
    check_pruning(replace(blueprint(multiple=64), pruning=None))
    check_pruning(replace(blueprint(multiple=64), anatomy=None))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"multiple": 32}, r"pruning\.multiple: expected fewer than the 32 channels of x.*got 32; e\.g\. 4"),
        ({"unit": "even_q"}, r"pruning\.unit: expected kv_group .*got 'even_q'"),
    ],
)
def test_settings_that_would_cut_nothing_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_pruning(blueprint(**settings))


def test_scores_by_adapters_want_adapters_on_heads_and_channels() -> None:
    with pytest.raises(ConfigError, match=r"pruning\.score: expected adapters on layers of heads and of channels"):
        check_pruning(blueprint("attention.self.query", "attention.self.value", score="lora"))


def test_layers_that_are_cut_are_not_trained_in_full() -> None:
    name = "x.intermediate.dense"
    saved = {f"{name}.weight": np.zeros(MODULES[name], np.float32), f"{name}.bias": np.zeros(32, np.float32)}
    with pytest.raises(ConfigError, match=rf"adapter\.modules_to_save: expected no layers of blocks.*{name}.*got 1 of"):
        check_pruning(replace(blueprint(), saved=saved))


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_pruning(blueprint(multiple=64, unit="even_q"))
    assert [fault.path for fault in caught.value.faults] == ["pruning.multiple", "pruning.unit"]


def test_clients_that_adapt_other_layers_than_the_recipe_names_are_refused(recipe: Recipe) -> None:
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(4)]
    check_layers(recipe, names)  # without layers in the recipe the sites' files say them
    some = replace(recipe, adapter=replace(recipe.adapter, layers="0, 3"))
    check_layers(some, [names[0], names[3]])
    with pytest.raises(ConfigError, match=r"layers 0, 3 alone.*2 modules of others, such as model\.layers\.1.*sites"):
        check_layers(some, names)


def test_the_ends_are_those_of_the_servers_emulator_where_it_has_one(recipe: Recipe, tmp_path: Path) -> None:
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(4)]
    ends = replace(recipe, adapter=replace(recipe.adapter, layers="ends"), root=tmp_path)
    ends = replace(ends, model=replace(ends.model, base="emulator"))
    check_layers(ends, names)  # a server without the folder has nothing to hold them against
    (tmp_path / "emulator").mkdir()
    facts = EmulatorFacts(
        base="true",
        base_digest="",
        base_blocks=6,
        blocks="model.layers",
        front=1,
        back=1,
        layers=[0, 1, 4, 5],
        kind="drop",
        ratio=0.5,
        select="round",
        codes=None,
        dtype="float32",
        seed=0,
        distilled=None,
        digests={},
    )
    (tmp_path / "emulator" / NAME).write_bytes(encode(facts))
    check_layers(ends, [names[0], names[3]])
    with pytest.raises(ConfigError, match="layers 0, 3 alone"):
        check_layers(ends, names)
