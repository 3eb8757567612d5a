from __future__ import annotations

from typing import Any

import pytest

from fedtune.config import bind
from fedtune.rounds.record import ClientRecord, RoundRecord
from fedtune.runs.search_trial import loaded_by, result_of, trial_folder, validation_score
from fedtune.search.settings import SearchSettings
from fedtune.search.steps import Search, Step
from tests.runs.conftest import Tables

COURSE = Search(SearchSettings(kind="sha", trials=4, space={"client.steps": (1, 2)}), 9, 0)


def record(round: int, *losses: float | None) -> RoundRecord:
    held_out: Any = {f"c{n}": {"loss": loss, "tokens": 10 * (n + 1), "examples": 1} for n, loss in enumerate(losses)}
    cohort = ("c0", "c1") if round else ()
    clients = dict.fromkeys(cohort, ClientRecord("ok"))
    return RoundRecord(
        round, 2.0, state_digest=f"{round}", cohort=cohort, clients=clients, held_out=held_out, bytes_down=7, bytes_up=3
    )


def test_a_score_is_the_pooled_one_of_all_clients_and_none_where_one_diverged() -> None:
    assert validation_score(record(1, 1.0, 4.0), "loss") == 3.0  # (10 * 1 + 20 * 4) / 30
    assert validation_score(record(1, 1.0, None), "loss") is None
    assert validation_score(record(1, 1.0, float("nan")), "loss") is None
    assert validation_score(record(1), "loss") is None
    assert validation_score(record(1, 1.0), "accuracy") is None


def test_a_result_counts_the_rounds_of_its_own_step() -> None:
    records = [record(0, 9.0), record(1, 4.0), record(2), record(3, 2.0)]
    first = result_of(COURSE, Step(0, 1, {}), records[:2], "")
    assert (first.score, first.scores, first.state) == (4.0, {0: 9.0, 1: 4.0}, "1")
    assert (first.cost.client_rounds, first.cost.bytes_down, first.cost.bytes_up, first.cost.seconds) == (2, 14, 6, 4.0)
    later = result_of(COURSE, Step(0, 3, {}, since=1), records, "")
    assert (later.score, later.scores) == (2.0, {3: 2.0})
    assert (later.cost.client_rounds, later.cost.seconds) == (4, 4.0)


@pytest.mark.parametrize(
    ("records", "reason", "words"),
    [
        ([], "client.steps: too many", "client.steps: too many"),
        ([record(0, 1.0), record(1, 1.0)], "round 2: too few", "round 2: too few"),
        ([record(0, 1.0), record(3, None)], "", "the clients' held-out loss after round 3 is not finite"),
    ],
)
def test_a_failed_step_has_no_score_and_says_why(records: list[RoundRecord], reason: str, words: str) -> None:
    result = result_of(COURSE, Step(0, 3, {}), records, reason)
    assert (result.score, result.reason) == (None, words)
    assert result.cost.client_rounds == 2 * sum(one.round > 0 for one in records)


def test_data_and_base_are_loaded_again_only_for_what_they_depend_on(tables: Tables) -> None:
    recipe = bind(tables)
    assert loaded_by(recipe) == loaded_by(bind(tables, overrides=["client.learning_rate=0.5", "rounds.count=7"]))
    for change in ("adapter.targets=['q_proj']", "data.max_tokens=16", "seed=9"):
        assert loaded_by(recipe) != loaded_by(bind(tables, overrides=[change])), change


def test_a_trial_has_a_folder_for_each_model_that_it_has_had(tmp_path: Any) -> None:
    assert trial_folder(tmp_path, 7) == tmp_path / "trials" / "007"
    assert trial_folder(tmp_path, 7, 2) == tmp_path / "trials" / "007-2"
