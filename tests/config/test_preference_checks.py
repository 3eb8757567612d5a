from __future__ import annotations

import pytest

from fedtune.config import Recipe, bind, digest
from fedtune.config.preference_checks import rows_faults
from fedtune.messages import Preference
from tests.config.conftest import SHORTEST, Faulty

DPO = "client.objective=dpo"


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["method=fedkseed", "adapter={}"], "client.objective", "'fedkseed' only measures losses"),
        (["model.task=classification"], "model.task", "'causal' with client.objective"),
        (["client.packing=true"], "client.packing", "each pair is compared by itself"),
        (["data.packing=true"], "data.packing", "each pair is compared by itself"),
        (["data.loss_on=all"], "data.loss_on", "both answers have the same prompt"),
        (["pruning={}"], "pruning", "answers are compared in whole models"),
        (["adapter.start=runs/x"], "adapter.start", "fedtune export RUN --form merged"),
        (["rounds.metric=perplexity"], "rounds.metric", "reward_accuracy"),
        (["client.dpo_beta=0"], "client.dpo_beta", "above 0"),
        (["engine.batch_clients=4"], "engine.batch_clients", "one after the other"),
    ],
)
def test_what_pairs_of_answers_exclude_is_refused_by_name(
    overrides: list[str], path: str, words: str, faulty: Faulty
) -> None:
    assert words in faulty(DPO, *overrides)[path]


def test_one_objective_and_one_beta_are_of_all_clients(faulty: Faulty) -> None:
    more = '\n[[override]]\nclients = "client-1"\nobjective = "dpo"\ndpo_beta = 0.2\n'
    faults = faulty(more=more)
    assert "the same for all" in faults["override.0.objective"]
    assert "the same for all" in faults["override.0.dpo_beta"]


def test_a_beta_without_its_objective_is_refused(faulty: Faulty) -> None:
    assert "set client.objective = 'dpo'" in faulty("client.dpo_beta=0.2")["client.dpo_beta"]


def test_the_objective_is_part_of_the_digest_and_its_default_of_none(recipe: Recipe) -> None:
    assert digest(bind(SHORTEST, overrides=[DPO])) != digest(recipe)
    assert digest(bind(SHORTEST, overrides=["client.objective=likelihood"])) == digest(recipe)
    assert bind(SHORTEST, overrides=[DPO, "client.dpo_beta=0.3"]).client.preference == Preference(0.3)
    assert recipe.client.preference is None


def test_rows_and_objective_must_be_of_one_kind(recipe: Recipe) -> None:
    compares = bind(SHORTEST, overrides=[DPO])
    assert rows_faults(recipe, compared=False) == rows_faults(compares, compared=True) == []
    assert "rows without a rejected answer" in str(rows_faults(compares, compared=False)[0])
    assert 'fields = { output = "chosen" }' in str(rows_faults(recipe, compared=True)[0])
