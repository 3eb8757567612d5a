"""Which round's state a run keeps, and when it ends early: both follow from the records of its rounds alone."""

from __future__ import annotations

from collections.abc import Sequence

from fedtune.rounds.record import RoundRecord
from fedtune.rounds.schedule import Metric, Schedule
from fedtune.rounds.scores import is_better, median_score, pooled_scores


def score_of(record: RoundRecord, metric: Metric) -> float | None:
    """Return a round's score on the test data, or without such over the clients' held-out rows; None for none.

    Of three or more clients it is the median of their scores: what clients state of rows that only they see must not
    let one of them choose the round that is kept, or end the run.
    """
    pooled = pooled_scores(record.held_out)
    # A server without test data records the clients' scores as those of its test.
    scores = pooled if record.test is None else record.test
    if scores == pooled and (middle := median_score(record.held_out, metric)) is not None:
        return middle
    value = scores.get(metric)
    return None if value is None else float(value)


def best_record(records: Sequence[RoundRecord], metric: Metric) -> RoundRecord | None:
    """Return the first round, from 1 on, that no other one is better than; None before one has been scored."""
    best: RoundRecord | None = None
    for record in records:
        if record.round and is_better(metric, score_of(record, metric), score_of(best, metric) if best else None):
            best = record
    return best


def kept_record(schedule: Schedule, records: Sequence[RoundRecord]) -> RoundRecord:
    """Return the round whose model is the run's result: the last one, or the best one where the recipe keeps that."""
    best = best_record(records, schedule.metric) if schedule.keep == "best" else None
    return best or records[-1]


def ends_early(schedule: Schedule, records: Sequence[RoundRecord]) -> str:
    """Return why a run ends after these rounds, before `rounds.count`; empty if it goes on.

    It follows from the records, so a run that is resumed ends in the round where it would have ended.
    """
    best, patience = best_record(records, schedule.metric), schedule.patience
    if patience is None or best is None or records[-1].round >= schedule.count:
        return ""
    later = [score_of(record, schedule.metric) for record in records if record.round > best.round]
    evaluations = sum(score is not None for score in later)
    if evaluations < patience:
        return ""
    return f"no better {schedule.metric} in {evaluations} evaluations after round {best.round} (rounds.patience)"
