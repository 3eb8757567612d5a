from __future__ import annotations

import pytest

from fedtune.search.settings import Range, SearchSettings, interval, rungs


@pytest.mark.parametrize(
    ("kind", "first", "reduction", "rounds", "expected"),
    [
        ("sha", None, 3, 9, (1, 3, 9)),
        ("asha", 2, 2, 13, (2, 4, 8, 13)),
        ("asha", 5, 3, 6, (5, 6)),
        ("random", None, 3, 9, (9,)),
        ("grid", 3, 3, 9, (3, 9)),
        ("tpe", 9, 3, 9, (9,)),
    ],
)
def test_rungs_grow_by_the_reduction_up_to_all_rounds(
    kind: str, first: int | None, reduction: int, rounds: int, expected: tuple[int, ...]
) -> None:
    assert rungs(SearchSettings(kind=kind, first_rung=first, reduction=reduction), rounds) == expected  # type: ignore[arg-type]


def test_a_population_is_compared_after_every_interval() -> None:
    assert rungs(SearchSettings(kind="pbt", interval=4), 10) == (4, 8, 10)
    assert rungs(SearchSettings(kind="pbt"), 10) == (2, 4, 6, 8, 10)
    assert interval(SearchSettings(kind="pbt"), 3) == 1


def test_a_range_is_whole_where_both_ends_are() -> None:
    assert Range(1, 4).whole
    assert not Range(1, 4.0).whole
