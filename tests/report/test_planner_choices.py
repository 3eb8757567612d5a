from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtune.report.planner_choices import choices, choices_table, classes, devices_table, floor_line, has_choices, idle
from fedtune.report.reader import read_run
from tests.report.conftest import WriteRun


def only(**client: Any) -> Any:
    """Return an edit that leaves two clients with these fields in every round."""

    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for line in lines[1:]:
            line["clients"] = {
                name: {"status": "ok", "rank": 4} | {key: values[index] for key, values in client.items()}
                for index, name in enumerate(("client-0", "client-1"))
            }

    return edit


def test_every_choice_is_a_dot_in_the_colour_of_its_device(write_run: WriteRun) -> None:
    run = read_run(write_run(clients=4, edit=only(ratio=[0.5, 0.25], top=[1.0, 0.6], share=[1.0, 1.0])))
    assert classes(run) == {"agx": ["client-1"], "tx2": ["client-0"]}
    figure = choices(run)
    assert figure is not None
    # Of equal shares there is nothing to see.
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert titles == ["pruning ratio", "rank", "blocks trained"]
    ratios = {
        line.get_label(): np.asarray(line.get_ydata()).tolist()
        for line in figure.axes[0].lines
        if not str(line.get_label()).startswith("_")
    }
    assert ratios == {"agx (1)": [0.25] * 3, "tx2 (1)": [0.5] * 3}
    # Side by side within their round, so that equal choices can be counted.
    first = {str(line.get_label()): np.asarray(line.get_xdata())[0] for line in figure.axes[0].lines}
    assert first["agx (1)"] < 1 < first["tx2 (1)"]


def test_the_floor_binds_in_the_last_fifth_of_the_rounds_or_along_the_ramp(write_run: WriteRun) -> None:
    run = read_run(write_run(clients=4))

    def floor(pruning: str, planner: str = 'name = "bandit"') -> Any:
        line = floor_line(replace(run, recipe=f"[rounds]\ncount = 10\n[planner]\n{planner}\n{pruning}"))
        return None if line is None else line[1].tolist()

    assert floor("[pruning]\ntarget = 0.5") == 8 * [0.0] + 2 * [0.5]
    ramp = floor('[pruning]\ntarget = 0.5\nfloor = "ramp"\nramp = 0.2')
    assert ramp == [pytest.approx(0.5 * (1 - 0.5**3)), *9 * [0.5]]
    assert floor("[pruning]\ntarget = 0.0") is None
    assert floor("") is None
    assert floor("[pruning]", 'name = "fixed"') is None
    assert floor("[pruning]", 'name = "bandit"\ngoal = "whole"') is None


def test_the_fleet_is_idle_while_it_waits_for_the_slowest(write_run: WriteRun) -> None:
    run = read_run(write_run(clients=4, edit=only(ratio=[0, 0], compute_s=[1.0, 3.0], transfer_s=[0.0, 0.0])))
    assert idle(run) == pytest.approx(1 - 2 / 3)
    assert idle(read_run(write_run("untimed", clients=4, edit=only(ratio=[0, 0])))) is None


def test_a_run_without_a_planner_or_devices_shows_nothing_of_them(write_run: WriteRun) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        only(rank=[4, 4])(lines, summary)
        del summary["devices"]

    run = read_run(write_run(clients=4, edit=edit))
    assert not has_choices(run)
    assert choices(run) is None
    assert devices_table(run) is None


def test_every_choice_and_every_number_of_a_device_can_be_read(write_run: WriteRun) -> None:
    run = read_run(write_run(clients=4))
    assert {row[-1] for row in choices_table(run).rows} >= {"fits the deadline of 12 s"}
    devices = devices_table(run)
    assert devices is not None
    assert ["tx2", "2", "memory_gb", "5.2", "assumed"] in devices.rows
    assert ["agx", "2", "memory_gb", "27.2", "datasheet"] in devices.rows
