from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedtune.search.settings import Dimension, Range, SearchSettings
from fedtune.search.space import count_of, draw, draw_values, grid, perturb, points_of, size, within

Space = dict[str, Dimension]
RATE: Range = Range(1e-4, 1e-2, log=True)


def settings(**space: Any) -> SearchSettings:
    return SearchSettings(space=space)


def test_a_grid_has_every_combination_and_the_last_setting_changes_fastest() -> None:
    space: Space = {"rate": Range(0.001, 0.1, log=True, points=3), "rank": (2, 4)}
    assert grid(space) == [{"rate": rate, "rank": rank} for rate in (0.001, 0.01, 0.1) for rank in (2, 4)]
    counted: Space = {"rank": (2, 4), "steps": Range(1, 5)}
    assert size(counted) == 10
    assert size(space) is None
    assert points_of(Range(0.0, 1.0, points=5)) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert count_of(Range(3, 3 + 4)) == 5


def test_a_draw_depends_on_seed_trial_and_name_alone() -> None:
    one = draw_values(settings(rate=RATE, rank=(2, 4, 8)), 7, 3, [])
    assert one == draw_values(settings(rank=(2, 4, 8), rate=RATE), 7, 3, [])
    # A setting more changes no other one's draw.
    assert draw_values(settings(rate=RATE, rank=(2, 4, 8), steps=Range(1, 9)), 7, 3, []).items() >= one.items()
    others = [draw_values(settings(rate=RATE), seed, trial, [])["rate"] for seed, trial in ((8, 3), (7, 4))]
    assert len({one["rate"], *others}) == 3


def test_values_that_another_trial_has_are_drawn_again() -> None:
    space = settings(rank=(2, 4), head=("a", "b"))
    trials: list[Any] = []
    for trial in range(4):
        trials.append(draw_values(space, 0, trial, trials))
    assert len({tuple(values.items()) for values in trials}) == 4
    assert draw_values(space, 0, 4, trials) in trials  # there is no fifth


def test_draws_are_spread_evenly() -> None:
    ranks = Counter(draw((2, 4, 8), key) for key in range(3000))
    assert all(900 < count < 1100 for count in ranks.values())
    steps = Counter(draw(Range(1, 3), key) for key in range(3000))
    assert sorted(steps) == [1, 2, 3]
    assert all(900 < count < 1100 for count in steps.values())
    below = sum(draw(RATE, key) < 1e-3 for key in range(2000))
    assert 900 < below < 1100  # half of the logarithms


@given(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9), st.booleans(), st.integers(0, 2**64 - 1))
def test_no_draw_leaves_its_range(low: float, high: float, log: bool, key: int) -> None:
    low, high = sorted((low, high))
    assert low <= draw(Range(low, high, log=log), key) <= high


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 50), st.integers(0, 99))
def test_perturbed_whole_numbers_move_unless_they_are_at_the_end(low: int, width: int, value: int, trial: int) -> None:
    numbers = Range(low, low + width)
    value = int(within(numbers, value))
    changed = perturb({"n": value}, {"n": numbers}, 0, trial, 5)["n"]
    assert isinstance(changed, int)
    assert low <= changed <= low + width
    assert changed != value or value in (low, low + width)


def test_copied_numbers_are_multiplied_and_listed_values_stay() -> None:
    space: Space = {"rate": Range(0.001, 1.0, log=True), "rank": (2, 4)}
    changed = {perturb({"rate": 0.1, "rank": 4}, space, 0, trial, 5)["rate"] for trial in range(20)}
    assert changed == {0.08, 0.12}
    assert all(perturb({"rate": 0.1, "rank": 4}, space, 0, trial, 5)["rank"] == 4 for trial in range(20))
    assert {perturb({"rate": 1.0, "rank": 4}, space, 0, trial, 5)["rate"] for trial in range(20)} == {0.8, 1.0}


def test_four_digits_are_drawn() -> None:
    value = draw(RATE, 5)
    assert value == float(f"{value:.4g}")
    assert within(Range(0.12348, 0.2), 0.12341) == 0.12348  # rounded below the end
