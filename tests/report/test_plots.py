from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedtune.report.drawing import png
from fedtune.report.plots import PLOTS
from fedtune.report.reader import read_run
from tests.report.conftest import WriteRun


def test_the_loss_plot_holds_the_numbers_of_the_run(write_run: WriteRun) -> None:
    run = read_run(write_run(clients=2, rounds=2))
    figure = PLOTS["loss-by-round"](run)
    assert figure is not None
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in figure.axes[0].lines}
    np.testing.assert_allclose(lines["global test"], [3.05, 2.85, 2.69])
    np.testing.assert_allclose(lines["clients after their steps"], [2.39, 2.38])


def test_a_client_that_got_worse_has_its_own_mark(write_run: WriteRun) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        summary["after"]["held_out"]["client-1"]["loss"] = 9.0

    figure = PLOTS["before-after"](read_run(write_run(clients=3, edit=edit)))
    assert figure is not None
    assert "tuned, worse than the base" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_bytes_are_drawn_in_their_unit(write_run: WriteRun) -> None:
    figure = PLOTS["traffic"](read_run(write_run(clients=4, rounds=3)))
    assert figure is not None
    up, down = (np.asarray(line.get_ydata()) for line in figure.axes[1].lines)
    np.testing.assert_allclose(up, [4, 8, 12])
    np.testing.assert_allclose(down, [8, 16, 24])
    assert figure.axes[1].get_ylabel() == "kB"


def test_an_empty_run_draws_nothing(write_run: WriteRun) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        del lines[1:]
        lines[0] |= {"test": None, "held_out": {}}
        summary["before"] = summary["after"] = {}

    run = read_run(write_run(edit=edit))
    assert {name for name, draw in PLOTS.items() if draw(run) is not None} == set()


@pytest.mark.parametrize(("clients", "rounds"), [(1, 1), (16, 20)])
def test_every_figure_is_drawn_small_and_large(write_run: WriteRun, clients: int, rounds: int) -> None:
    run = read_run(write_run(clients=clients, rounds=rounds))
    for name, draw in PLOTS.items():
        figure = draw(run)
        assert figure is not None, name
        assert png(figure).startswith(b"\x89PNG\r\n\x1a\n")


def test_modules_whose_change_is_zero_have_no_spectrum(write_run: WriteRun) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for line in lines:
            for module in line["modules"].values():
                module["singular_values"] = [0.0, 0.0]
                del module["energy_kept"]

    run = read_run(write_run(edit=edit))
    assert PLOTS["spectrum"](run) is None
    assert PLOTS["ranks"](run) is not None


def test_the_energy_drawn_is_what_cuts_at_the_server_and_on_the_way_down_leave(write_run: WriteRun) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for line in lines:
            for module in line["modules"].values():
                module |= {"energy_kept": 1.0, "state_energy_kept": 0.75}

    figure = PLOTS["ranks"](read_run(write_run(edit=edit)))
    assert figure is not None
    drawn = {float(y) for line in figure.axes[1].get_lines() for y in np.asarray(line.get_ydata())}
    assert drawn == {0.75}
