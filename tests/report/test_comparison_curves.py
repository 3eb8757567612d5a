from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedtune.report.compare import compare
from fedtune.report.comparison_curves import curves, deployed_loss, numbers, shared_loss
from tests.report.conftest import WriteRun


def test_a_recipes_curve_is_the_mean_of_its_seeds_where_all_were_measured(write_run: WriteRun) -> None:
    paths = [write_run(f"a{seed}", name="a", seed=seed, clients=2, rounds=2 + seed) for seed in (0, 1)]
    title, (line,) = shared_loss(compare(paths).groups)
    assert title == "global test loss"
    assert line.rounds.tolist() == [0, 1, 2]  # the second seed's round 3 has no partner
    # Mean of 3.0 and 3.1 before; the second seed is 0.01 higher.
    assert (line.low[0], line.mean[0], line.high[0]) == pytest.approx((3.05, 3.055, 3.06))
    assert line.bytes.tolist() == [0, 6000, 12000]
    rows = numbers(title, [line]).rows
    assert [row[:3] for row in rows] == [["a", "0", "3.055"], ["a", "1", "2.855"], ["a", "2", "2.695"]]
    assert len(curves(title, [line]).axes) == 3


def test_without_test_data_the_clients_losses_are_compared(write_run: WriteRun) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for line in lines:
            line["test"] = None

    title, _ = shared_loss(compare([write_run(edit=edit)]).groups)
    assert title == "clients' mean held-out loss"


def test_a_deployed_loss_is_drawn_only_if_every_run_has_it(write_run: WriteRun) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        lines[-1]["deployed"] = {"loss": 2.0}

    paths = [write_run("a", name="a", edit=edit), write_run("b", name="b")]
    assert deployed_loss(compare(paths).groups) == ("", [])
    title, (line,) = deployed_loss(compare(paths[:1]).groups)
    assert title.startswith("deployed")
    assert np.array_equal(line.mean, [2.0])
