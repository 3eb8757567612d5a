from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fedtune.report.compare import compare
from fedtune.report.reader import read_run
from fedtune.report.robustness import lost_updates, robustness_of, worst_tenth
from tests.report.conftest import WriteRun, metrics


def ended(*, before: float, after: float, held_out: list[float] | None = None, lost: int = 0) -> Any:
    """A run of two rounds of five clients, in each of which the first `lost` are not used."""

    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        summary["before"]["test"]["loss"], summary["after"]["test"]["loss"] = before, after
        scores = {f"client-{i}": metrics(loss) for i, loss in enumerate(held_out or [])}
        summary["after"]["held_out"] = scores
        for line in lines[1:]:
            line["clients"] = {
                f"client-{i}": {"status": ("late", "failed")[i % 2], "reason": "x"} if i < lost else {"status": "ok"}
                for i in range(5)
            }
            line["clients"]["client-9"] = {"status": "unfit", "reason": "too large"}

    return edit


def with_recipe(path: Path, text: str) -> Path:
    recipe = path / "recipe.toml"
    recipe.write_text(recipe.read_text() + text)
    return path


def test_by_hand_lost_updates_are_those_asked_for_and_not_used(write_run: WriteRun) -> None:
    run = read_run(write_run("a", clients=5, rounds=2, edit=ended(before=4.0, after=3.0, lost=2)))
    assert lost_updates(run) == pytest.approx(2 / 5)  # a client that was not asked is none of the five


def test_by_hand_the_worst_tenth(write_run: WriteRun) -> None:
    losses = [float(loss) for loss in range(20)]
    run = read_run(write_run("a", clients=20, rounds=1, edit=ended(before=4.0, after=3.0, held_out=losses)))
    assert worst_tenth(run) == 18.5  # of 20 the two worst: 18 and 19
    few = read_run(
        write_run("b", clients=3, rounds=1, edit=ended(before=4.0, after=3.0, held_out=[1.0, math.nan, 2.0]))
    )
    assert worst_tenth(few) == 2.0
    one = read_run(write_run("c", clients=1, rounds=1, edit=ended(before=4.0, after=3.0, held_out=[1.0])))
    assert math.isnan(worst_tenth(one))  # of one client it is the mean


def test_the_gain_that_is_left_on_other_devices(write_run: WriteRun) -> None:
    calm, weak = (
        '[fleet]\nname = "phones"\n',
        '[fleet]\nname = "phones"\n[[device]]\nclients = "*"\navailability = 0.5\n',
    )
    paths = [
        with_recipe(write_run("a0", name="calm", seed=0, clients=2, edit=ended(before=4.0, after=3.0)), calm),
        with_recipe(write_run("a1", name="calm", seed=1, clients=2, edit=ended(before=4.0, after=3.2)), calm),
        with_recipe(write_run("b0", name="weak", seed=0, clients=2, edit=ended(before=4.0, after=3.5)), weak),
        with_recipe(write_run("b1", name="weak", seed=1, clients=2, edit=ended(before=4.0, after=3.4)), weak),
    ]
    groups = compare(paths).groups
    first, second = (robustness_of(groups, index) for index in range(2))
    assert (first.calm, math.isnan(first.gain_kept.mean)) == ("", True)
    assert second.calm == "calm"
    assert second.gain_kept.mean == pytest.approx((0.5 / 1.0 + 0.6 / 0.8) / 2)


@pytest.mark.parametrize("other", ['[client]\nsteps = 9\n[fleet]\nname = "phones"\n', ""])
def test_recipes_that_differ_in_more_than_devices_or_in_nothing_are_no_such_pair(
    write_run: WriteRun, other: str
) -> None:
    paths = [
        write_run("a", name="calm", clients=2, edit=ended(before=4.0, after=3.0)),
        with_recipe(write_run("b", name="b", clients=2, edit=ended(before=4.0, after=3.5)), other),
    ]
    assert robustness_of(compare(paths).groups, 1).calm == ""


def test_a_recipe_that_gained_nothing_keeps_no_share_of_it(write_run: WriteRun) -> None:
    paths = [
        write_run("a", name="calm", clients=2, edit=ended(before=4.0, after=4.0)),
        with_recipe(write_run("b", name="b", clients=2, edit=ended(before=4.0, after=3.5)), '[fleet]\nname = "x"\n'),
    ]
    found = robustness_of(compare(paths).groups, 1)
    assert found.calm == "calm"
    assert math.isnan(found.gain_kept.mean)
