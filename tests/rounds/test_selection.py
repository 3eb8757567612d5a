from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.rounds.record import RoundRecord
from fedtune.rounds.schedule import Metric, Schedule
from fedtune.rounds.scores import HIGHER_IS_BETTER, LOWER_IS_BETTER, SIGNED, pooled_scores
from fedtune.rounds.selection import best_record, ends_early, kept_record, score_of


def rounds(*losses: float | None, metric: str = "loss") -> list[RoundRecord]:
    """Return rounds 0, 1, ... with these scores; None was not scored."""
    return [
        RoundRecord(number, 1.0, test=None if loss is None else {metric: loss}) for number, loss in enumerate(losses)
    ]


def test_every_metric_of_a_recipe_has_a_direction() -> None:
    assert set(get_args(Metric)) == LOWER_IS_BETTER | HIGHER_IS_BETTER | SIGNED


def test_the_best_round_is_the_first_that_no_other_beats_and_never_the_base() -> None:
    assert best_record(rounds(1.0, 3.0, 2.0, None, 2.0, 2.5), "loss").round == 2  # type: ignore[union-attr]
    assert best_record(rounds(0.9, 0.3, 0.5, 0.4, metric="accuracy"), "accuracy").round == 2  # type: ignore[union-attr]
    assert best_record(rounds(1.0, None, None), "loss") is None
    assert best_record(rounds(1.0, float("nan"), 4.0), "loss").round == 2  # type: ignore[union-attr]


def test_without_test_data_clients_held_out_rows_decide_together() -> None:
    record = RoundRecord(1, 1.0, held_out={"a": {"loss": 1.0, "tokens": 1}, "b": {"loss": 2.0, "tokens": 3}})
    assert score_of(record, "loss") == 1.75
    assert score_of(RoundRecord(1, 1.0), "loss") is None


FALLING = (4.0, 3.0, 2.0, 1.0, 0.5)


def stated(metric: str, liar: tuple[float, ...] | None, *, as_test: bool) -> list[RoundRecord]:
    """Return rounds in which four honest clients get better and better, and a fifth says what it likes."""
    better = metric in LOWER_IS_BETTER
    records = []
    for number, loss in enumerate(FALLING):
        value = loss if better else 1 / (1 + loss)
        scores = {f"site-{i}": {metric: value * (1 + 0.05 * i), "examples": 10 + i, "tokens": 100} for i in range(4)}
        if liar is not None:
            scores["liar"] = {metric: liar[number % len(liar)], "examples": 10**9, "tokens": 10**15}
        test = pooled_scores(scores) if as_test else None
        records.append(RoundRecord(number, 1.0, test=test, held_out=scores))
    return records


LIES = ((0.0, 1e12), (1e12, 0.0), (0.0, 0.0, 1e12, 1e12, 1e12), (1e12, 1.0, 0.0, 1.0, 1e12))


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("as_test", [False, True])
@pytest.mark.parametrize("lies", LIES)
@pytest.mark.parametrize("metric", get_args(Metric))
def test_one_liar_of_five_chooses_no_round_and_ends_no_run(
    metric: Metric, lies: tuple[float, ...], as_test: bool
) -> None:
    liar = lies if metric in LOWER_IS_BETTER else tuple(1 / (1 + value) for value in lies)
    records = stated(metric, liar, as_test=as_test)
    for schedule in (Schedule(9, keep="best", metric=metric, patience=1), Schedule(9, keep="best", metric=metric)):
        for count in range(2, len(records) + 1):
            assert kept_record(schedule, records[:count]).round == count - 1
            assert not ends_early(schedule, records[:count])


def test_the_servers_own_test_data_decide_alone() -> None:
    records = stated("loss", None, as_test=False)
    own = [replace(record, test={"loss": float(record.round)}) for record in records]
    assert kept_record(Schedule(9, keep="best"), own).round == 1


def test_what_is_kept_is_the_last_round_unless_the_recipe_keeps_the_best() -> None:
    records = rounds(4.0, 3.0, 2.0, 2.5)
    assert kept_record(Schedule(3), records).round == 3
    assert kept_record(Schedule(3, keep="best"), records).round == 2
    assert kept_record(Schedule(3, keep="best"), rounds(4.0, None, None)).round == 2


def test_a_run_ends_after_so_many_evaluations_without_a_better_score() -> None:
    patient = Schedule(9, patience=2)
    assert not ends_early(Schedule(9), rounds(4, 3, 4, 4, 4, 4))
    assert not ends_early(patient, rounds(4, 3, 2, None, 3))
    assert ends_early(patient, rounds(4, 3, 2, None, 3, 2)) == (
        "no better loss in 2 evaluations after round 2 (rounds.patience)"
    )
    assert not ends_early(Schedule(5, patience=2), rounds(4, 3, 2, None, 3, 2))  # it was the last round all the same
    assert not ends_early(patient, rounds(4))


@given(st.lists(st.none() | st.floats(0, 9), min_size=1, max_size=9), st.integers(1, 4))
def test_a_run_that_ends_does_so_the_first_time_that_its_patience_is_over(
    scores: list[float | None], patience: int
) -> None:
    schedule, records = Schedule(99, patience=patience), rounds(9.0, *scores)
    ended = [bool(ends_early(schedule, records[: count + 1])) for count in range(1, len(records))]
    if True in ended:
        count = ended.index(True) + 1
        assert records[count].test is not None
        since = [record for record in records[1 : count + 1] if record.test is not None]
        best = best_record(records[: count + 1], "loss")
        assert best is not None
        assert sum(record.round > best.round for record in since) == patience


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_choice_depends_on_the_rounds_so_far_alone(keep: str) -> None:
    records = rounds(4.0, 3.0, 2.0, 2.5, 1.0)
    chosen = [kept_record(Schedule(4, keep=keep), records[:count]).round for count in range(2, 6)]  # type: ignore[arg-type]
    assert chosen == ([1, 2, 2, 4] if keep == "best" else [1, 2, 3, 4])
