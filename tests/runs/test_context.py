from __future__ import annotations

from fedtune.methods.method import GlobalModel
from fedtune.runs.context import ModelScores, first_state, no_scores, versions
from fedtune.runs.local import Experiment, run_context


def test_versions_name_python_and_the_packages_that_compute() -> None:
    assert {"python", "fedtune", "numpy", "torch"} <= versions().keys()


def test_a_run_notes_what_its_result_follows_from(prepared: Experiment) -> None:
    context = run_context(prepared)
    inputs = context.inputs
    assert inputs.keys() == {"recipe", "recipe_digest", "base", "data", "door", "versions", "platform"}
    assert inputs["base"] == prepared.base.digest
    assert (inputs["data"], inputs["door"]) == (context.data, "simulate")
    assert "steps = 3" in inputs["recipe"]


def test_a_first_state_is_before_any_round(prepared: Experiment) -> None:
    assert first_state(prepared.recipe, prepared.blueprint).round == 0


def test_without_a_model_nothing_is_scored() -> None:
    assert no_scores(GlobalModel(), test=True, clients=True) == ModelScores()
