from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.config import Recipe, bind, render
from fedtune.errors import ConfigError
from fedtune.methods.method import GlobalModel
from fedtune.runs.context import ModelScores, bind_recorded, bind_to_score, first_state, no_scores, versions
from fedtune.runs.local import Experiment, run_context


def test_versions_name_python_and_the_packages_that_compute() -> None:
    assert {"python", "fedtune", "numpy", "torch"} <= versions().keys()


def test_a_run_notes_what_its_result_follows_from(prepared: Experiment) -> None:
    context = run_context(prepared)
    inputs = context.inputs
    assert inputs.keys() == {"recipe", "recipe_digest", "base", "data", "partition", "door", "versions", "platform"}
    assert inputs["base"] == prepared.base.digest
    assert (inputs["data"], inputs["door"]) == (context.data, "simulate")
    assert "steps = 3" in inputs["recipe"]


def test_a_first_state_is_before_any_round(prepared: Experiment) -> None:
    assert first_state(prepared.recipe, prepared.blueprint).round == 0


def test_without_a_model_nothing_is_scored() -> None:
    assert no_scores(GlobalModel(), round=0, test=True, clients=True) == ModelScores()


@pytest.mark.parametrize("table", ["method", "planner"])
def test_a_recorded_recipe_of_what_is_not_installed_is_refused_by_one_sentence(
    prepared: Experiment, table: str
) -> None:
    name = getattr(prepared.recipe, table).name
    text = render(prepared.recipe)
    begin = text.index(f"[{table}]")
    text = text[:begin] + text[begin:].replace(f'name = "{name}"', 'name = "gone"', 1)
    with pytest.raises(ConfigError) as error:
        bind_recorded(text)
    assert str(error.value) == (
        f"{table}: expected the {table} that the run was started with; got only its name, gone; install the package "
        "that brings it; or, if it was a Python object, pass it again with "
        f"fedtune.simulate(resume=..., {table}=...), which alone takes Python objects"
    )


def test_a_recorded_recipe_is_the_one_that_was_bound(prepared: Experiment, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(render(prepared.recipe))
    recorded: Recipe = bind(tmp_path / "recipe.toml")
    assert bind_recorded(render(prepared.recipe)) == bind_to_score(tmp_path) == recorded
