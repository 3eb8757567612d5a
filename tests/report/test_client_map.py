from __future__ import annotations

from typing import Any

import numpy as np

from fedtune.report.plots import PLOTS
from fedtune.report.reader import read_run
from tests.report.conftest import WriteRun


def test_the_map_marks_failed_refused_and_late_cells_in_their_place(write_run: WriteRun) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for line in lines:
            line["clients"] = {}
        lines[1]["clients"] = {"client-1": {"status": "failed"}}
        lines[2]["clients"] = {"client-0": {"status": "refused"}, "client-1": {"status": "late"}}

    figure = PLOTS["clients"](read_run(write_run(clients=2, rounds=2, edit=edit)))
    assert figure is not None
    failed, refused, late = figure.axes[0].collections
    assert np.asarray(failed.get_offsets()).tolist() == [[0, 1]]
    assert np.asarray(refused.get_offsets()).tolist() == [[1, 0]]
    assert np.asarray(late.get_offsets()).tolist() == [[1, 1]]
    assert "late" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_client_that_keeps_its_losses_is_not_absent(write_run: WriteRun) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for line in lines:
            line["clients"] = {}
        told = {"status": "ok", "loss_before": 2.0, "loss_after": 1.5}
        lines[1]["clients"] = {"client-0": told, "client-1": {"status": "ok"}}

    figure = PLOTS["clients"](read_run(write_run(clients=2, rounds=1, edit=edit)))
    assert figure is not None
    *_, unknown = figure.axes[0].collections
    assert np.asarray(unknown.get_offsets()).tolist() == [[0, 1]]
    assert "used, loss unknown" in [text.get_text() for text in figure.legends[0].get_texts()]
