from __future__ import annotations

import importlib.util
import sys

import pytest

from fedtune.errors import ExtraError
from fedtune.search.settings import Dimension, Range, SearchSettings
from fedtune.search.steps import Result, Search, next_step
from fedtune.search.tpe import draw_by_tpe

SPACE: dict[str, Dimension] = {
    "client.learning_rate": Range(1e-4, 1e-1, log=True),
    "adapter.rank": (2, 4, 8),
    "client.steps": Range(1, 9),
}
installed = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs the extra search (optuna)")


def conduct(seed: int, trials: int) -> list[Result]:
    """Search where a rate near 0.01 and a rank of 4 are best."""
    course, results = Search(SearchSettings(kind="tpe", trials=trials, space=SPACE), 9, seed), list[Result]()
    while (step := next_step(course, results)) is not None:
        rate, rank = step.values["client.learning_rate"], step.values["adapter.rank"]
        failed = len(results) == 4
        results.append(Result(step, None if failed else abs(rate - 0.01) * 100 + abs(rank - 4)))
    return results


@installed
def test_a_study_that_is_built_anew_draws_alike() -> None:
    results = conduct(3, 16)
    assert results == conduct(3, 16)
    assert results != conduct(4, 16)
    for result in results:
        assert 1e-4 <= result.step.values["client.learning_rate"] <= 1e-1
        assert result.step.values["adapter.rank"] in (2, 4, 8)
        assert isinstance(result.step.values["client.steps"], int)
    course = Search(SearchSettings(kind="tpe", trials=16, space=SPACE), 9, 3)
    assert next_step(course, results[:12]) == results[12].step


@installed
def test_it_learns_from_scores_and_from_their_direction() -> None:
    values = [{"client.learning_rate": 10.0 ** (-1 - k % 4), "adapter.rank": 4, "client.steps": 3} for k in range(24)]
    earlier = [(each, each["client.learning_rate"]) for each in values]
    low = [draw_by_tpe(SPACE, 0, k, earlier, lower_is_better=True)["client.learning_rate"] for k in range(30, 36)]
    high = [draw_by_tpe(SPACE, 0, k, earlier, lower_is_better=False)["client.learning_rate"] for k in range(30, 36)]
    assert sorted(low)[3] < sorted(high)[3]


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ExtraError, match=r"expected the package optuna.*pip install 'fedtune\[search\]'"):
        draw_by_tpe(SPACE, 0, 0, [], lower_is_better=True)
