from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedtune.report import tables
from fedtune.report.curves import (
    client_names,
    evaluations,
    gains,
    kinds,
    loss_curve,
    loss_unit,
    natural,
    paired_losses,
    stall_text,
)
from fedtune.report.reader import read_run, scores_of
from tests.report.conftest import WriteRun


def test_mean_best_and_worst_are_over_clients_and_traffic_and_time_add_up(write_run: WriteRun) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        lines[1]["held_out"] = {"a": {"loss": 1.0}, "b": {"loss": 4.0}, "c": {"loss": math.nan}, "d": {}}
        lines[2]["held_out"] = {}
        lines[2]["test"] = None

    curve = loss_curve(read_run(write_run(clients=2, rounds=2, edit=edit)))
    assert (curve.mean[1], curve.best[1], curve.worst[1]) == (2.5, 1.0, 4.0)
    assert np.isnan([curve.mean[2], curve.test[2], curve.training[0]]).all()
    np.testing.assert_array_equal(curve.bytes, [0, 6000, 12000])
    np.testing.assert_array_equal(curve.seconds, [0.5, 2.5, 4.5])


def test_a_gain_is_loss_before_minus_after_and_nan_without_an_update(write_run: WriteRun) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        ok = {"status": "ok", "loss_before": 3.0, "loss_after": 2.5}
        lines[1]["clients"] = {"client-0": ok, "client-1": {**ok, "status": "refused"}}

    run = read_run(write_run(clients=3, rounds=1, edit=edit))
    table = gains(run, client_names(run))
    assert table.shape == (3, 1)
    assert table[0, 0] == 0.5
    assert np.isnan(table[1:, 0]).all()


def test_without_a_summary_the_first_and_last_evaluated_rounds_are_before_and_after(write_run: WriteRun) -> None:
    path = write_run(clients=2, rounds=3)
    (path / "summary.json").unlink()
    run = read_run(path)
    before, after = evaluations(run)
    for scores, record in ((before, run.rounds[0]), (after, run.rounds[3])):
        assert scores.held_out == {name: scores_of(metrics) for name, metrics in record.held_out.items()}
    assert after.worst is not None
    assert after.worst.client == "client-1"


def test_losses_are_of_pairs_where_every_run_compares_answers(write_run: WriteRun) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for evaluation in (summary["before"], summary["after"]):
            evaluation["test"] = {"loss": 0.5, "reward_accuracy": 0.75, "examples": 4}

    compares, other = read_run(write_run("pairs", edit=edit)), read_run(write_run())
    assert loss_unit([compares]) == "nats per pair"
    assert loss_unit([other]) == loss_unit([compares, other]) == loss_unit([]) == "nats per token"
    table = tables.scores(compares)
    assert table is not None
    rows = {row[1] for row in table.rows}
    assert {"loss (nats per pair)", "reward accuracy"} <= rows


def test_pairs_are_sorted_by_the_loss_after(write_run: WriteRun) -> None:
    pairs = paired_losses(read_run(write_run(clients=3)))
    assert [name for name, *_ in pairs] == ["client-2", "client-1", "client-0"]
    assert pairs[0][1] == 3.2


def test_names_are_in_natural_order() -> None:
    assert sorted(["c10", "c2", "7", "c2b", ""], key=natural) == ["", "7", "c2", "c2b", "c10"]


def test_modules_are_grouped_by_their_last_part_once_each() -> None:
    assert kinds(["l.10.q", "l.2.q", "l.2.q", "l.2.v"]) == {"q": ["l.2.q", "l.10.q"], "v": ["l.2.v"]}


def test_a_model_that_was_best_long_ago_is_named_with_what_was_learned_since(write_run: WriteRun) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for line in lines:
            round = line["round"]
            line["test"] = {"loss": 3.0 + abs(round - 2) / 10}
            line["deployed"] = {"loss": 5.0 - round / 10}

    assert stall_text(read_run(write_run(rounds=8, edit=edit))) == (
        "The whole model has not improved since round 2: its loss was 3.000 there, and is 3.600 after round 8. "
        "What was learned since serves the pruned model alone (5.000 to 4.200)."
    )
    # It was best in the last round but one, which says nothing yet.
    assert stall_text(read_run(write_run("short", rounds=3, edit=edit))) == ""
    assert stall_text(read_run(write_run("falling", rounds=8))) == ""
