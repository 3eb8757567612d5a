from __future__ import annotations

from typing import Any

import pytest
from matplotlib.patches import Rectangle

from fedtune.report.device_times import device_times, mean_times, planned_table, times_table
from fedtune.report.reader import read_run
from tests.report.conftest import WriteRun


def timed(**client: Any) -> Any:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for line in lines[1:]:
            line["clients"] = {
                name: {"status": "ok", "rank": 4} | {key: values[index] for key, values in client.items()}
                for index, name in enumerate(("client-0", "client-1"))
            }

    return edit


def test_the_time_of_each_kind_of_device_is_divided(write_run: WriteRun) -> None:
    times: dict[str, Any] = {"compute_s": [4.0, 1.0], "transfer_s": [3.0, 3.0], "overhead_s": [0.5, 0.5]}
    run = read_run(write_run(clients=4, edit=timed(**times, down_s=[2.0, 2.5])))
    assert mean_times(run) == {
        "agx": {"down": 2.5, "compute": 1.0, "up": 0.5, "rest": 0.5},
        "tx2": {"down": 2.0, "compute": 4.0, "up": 1.0, "rest": 0.5},
    }
    figure = device_times(run)
    assert figure is not None
    widths = [bar.get_width() for bar in figure.axes[0].patches if isinstance(bar, Rectangle)]
    assert widths == pytest.approx([2.5, 2.0, 1.0, 4.0, 0.5, 1.0, 0.5, 0.5])
    table = times_table(run)
    assert table is not None
    assert table.rows[0][-1] == "67 %"


def test_where_the_two_ways_are_not_known_apart_they_are_one_part(write_run: WriteRun) -> None:
    run = read_run(write_run("link", clients=4, edit=timed(compute_s=[4.0, 1.0], transfer_s=[3.0, 3.0])))
    assert mean_times(run)["tx2"] == {"compute": 4.0, "transfer": 3.0, "rest": 0.0}
    untimed = read_run(write_run("untimed", clients=4, edit=timed(ratio=[0, 0])))
    assert (device_times(untimed), times_table(untimed)) == (None, None)


def test_what_was_planned_stands_beside_what_was_measured(write_run: WriteRun) -> None:
    measured: dict[str, Any] = {
        "compute_s": [4.0, 1.0],
        "transfer_s": [2.0, 2.0],
        "peak_bytes": [3_000_000_000, 1_000_000_000],
    }
    run = read_run(write_run(clients=4, edit=timed(**measured, planned_s=[3.0, 3.0], planned_bytes=[2e9, 2e9])))
    table = planned_table(run)
    assert table is not None
    assert [[*row[:2], *row[-2:]] for row in table.rows] == [
        ["agx", "memory", "0.50", "0.50"],
        ["agx", "time", "1.00", "1.00"],
        ["tx2", "memory", "1.50", "1.50"],
        ["tx2", "time", "2.00", "2.00"],
    ]
    assert planned_table(read_run(write_run("unplanned", clients=4, edit=timed(**measured)))) is None
