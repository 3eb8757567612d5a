from __future__ import annotations

import math

import pytest

from fedtune.runs.summary import client_totals, evaluation, failures
from tests.runs.test_recording import record


def test_failures_come_before_unsolicited_replies() -> None:
    assert failures([record()]) == [
        {"round": 1, "client": "cyd", "kind": "failed", "reason": "no memory"},
        {"round": 1, "client": "dan", "kind": "late", "reason": "answered round 0 after its end; dropped"},
    ]


def test_a_loss_that_was_read_back_as_null_counts_as_the_nan_it_was() -> None:
    fresh, resumed = (evaluation(None, {"ann": {"loss": loss}, "bob": {"loss": 1.0}}) for loss in (math.nan, None))
    assert math.isnan(fresh["mean"]["loss"])
    assert math.isnan(resumed["mean"]["loss"])
    assert fresh["worst"]["client"] == resumed["worst"]["client"]


def test_mean_and_worst_client_by_hand() -> None:
    held_out = {
        "ann": {"loss": 1.0, "accuracy": 0.5, "examples": 3},
        "bob": {"loss": 3.0, "accuracy": 0.7, "examples": 4},
    }
    scores = evaluation({"loss": 2.0}, held_out)
    assert scores["mean"] == {"loss": 2.0, "accuracy": pytest.approx(0.6)}
    assert scores["worst"] == {"client": "bob", "loss": 3.0, "accuracy": 0.7, "examples": 4}
    assert evaluation(None, {}) == {"test": None, "held_out": {}, "mean": {}, "worst": {}}


def test_totals_add_up_over_rounds_and_absent_clients_have_none() -> None:
    totals = client_totals([record(), record()], {"ann": 30, "bob": 10, "cyd": 5, "dan": 7})
    assert totals["ann"] == {
        "examples": 30,
        "rank": 2,
        "bytes_down": 200,
        "bytes_up": 20,
        "seconds": 3.0,
        "failures": 0,
    }
    assert totals["cyd"]["failures"] == 2
    assert totals["dan"]["rank"] is None


def test_of_more_than_ten_clients_the_worst_tenth_has_a_mean_of_its_own() -> None:
    scores = {f"client-{number}": {"loss": float(number), "examples": 3} for number in range(11)}
    assert evaluation(None, scores)["worst_tenth"] == {"loss": 9.5, "clients": 2, "examples": 6}
    few = {name: scores[name] for name in list(scores)[:10]}
    assert "worst_tenth" not in evaluation(None, few)  # it is the worst client, of which there is a row
