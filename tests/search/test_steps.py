"""Which trial runs next, against results that a table of scores gives: no model is trained here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.search.settings import Range, SearchSettings
from fedtune.search.steps import Cost, Result, Search, Step, best_result, next_step
from fedtune.seeds import derive, generator

SPACE = {"client.learning_rate": Range(1e-4, 1e-1, log=True)}


def search(kind: Any, rounds: int = 9, **keys: Any) -> Search:
    return Search(SearchSettings(kind=kind, **{"trials": 9, "space": SPACE, **keys}), rounds, 0)


def conduct(course: Search, score: Callable[[Step], float | None]) -> list[Result]:
    """Run a search whose steps score what a function says."""
    results: list[Result] = []
    while (step := next_step(course, results)) is not None:
        results.append(Result(step, score(step), cost=Cost(client_rounds=step.until - step.since)))
        assert len(results) < 1000
    return results


def by_trial(step: Step) -> float:
    return float((step.trial * 5) % 9)


def spent(results: list[Result]) -> int:
    return sum(result.cost.client_rounds for result in results)


def test_sha_has_nine_three_and_one_trials_and_exact_budgets() -> None:
    results = conduct(search("sha"), by_trial)
    steps = [(result.step.trial, result.step.since, result.step.until) for result in results]
    assert steps[:9] == [(trial, 0, 1) for trial in range(9)]
    # Scores 0, 5, 1, 6, 2, 7, 3, 8, 4: the best three are 0, 2 and 4, the best one is 0.
    assert steps[9:] == [(0, 1, 3), (2, 1, 3), (4, 1, 3), (0, 3, 9)]
    assert spent(results) == 9 * 1 + 3 * 2 + 1 * 6
    best = best_result(search("sha"), results)
    assert best is not None
    assert (best.step.trial, best.step.until) == (0, 9)


@pytest.mark.parametrize(("trials", "reduction", "sizes"), [(10, 3, (10, 4, 2)), (4, 2, (4, 2, 1, 1)), (2, 4, (2, 1))])
def test_sha_keeps_a_rounded_up_share(trials: int, reduction: int, sizes: tuple[int, ...]) -> None:
    rounds = reduction ** (len(sizes) - 1)
    course = search("sha", rounds, trials=trials, reduction=reduction)
    reached = [result.step.until for result in conduct(course, by_trial)]
    assert tuple(reached.count(rung) for rung in course.rungs) == sizes


def test_a_failed_trial_never_goes_on_and_is_never_best() -> None:
    def score(step: Step) -> float | None:
        return None if step.trial in (0, 2) or (step.trial == 4 and step.until == 9) else by_trial(step)

    for kind in ("sha", "asha", "random"):
        results = conduct(search(kind), score)
        assert {result.step.until for result in results if result.step.trial in (0, 2)} == {search(kind).rungs[0]}
        best = best_result(search(kind), results)
        assert best is not None
        assert best.score is not None
        assert best.step.trial not in (0, 2)
    # Of one that fails late nothing is left, and the best of those that were stopped early is the result.
    results = conduct(search("sha"), lambda step: None if step.until == 9 else by_trial(step))
    best = best_result(search("sha"), results)
    assert best is not None
    assert (best.step.trial, best.step.until) == (0, 3)
    assert best_result(search("sha"), conduct(search("sha"), lambda step: None)) is None
    assert len(conduct(search("sha"), lambda step: None)) == 9


def test_asha_goes_on_without_waiting_and_from_the_highest_rung_down() -> None:
    results = conduct(search("asha"), by_trial)
    steps = [(result.step.trial, result.step.since, result.step.until) for result in results]
    # After three trials (scores 0, 5, 1) the best of them goes on; no barrier waits for the other six.
    assert steps[:4] == [(0, 0, 1), (1, 0, 1), (2, 0, 1), (0, 1, 3)]
    for place, (_, since, until) in enumerate(steps):
        if since:
            before = [result for result in results[:place] if result.step.until == since]
            better = sorted(result.score for result in before if result.score is not None)
            own = next(result.score for result in before if result.step.trial == steps[place][0])
            assert own in better[: len(before) // 3]
            assert until in (3, 9)
    assert spent(results) <= 9 + 3 * 2 + 6


def test_a_higher_score_is_better_where_the_metric_is_accuracy() -> None:
    course = search("sha", metric="accuracy")
    best = best_result(course, conduct(course, by_trial))
    assert best is not None
    assert best.score == 8.0


def test_of_equal_scores_the_lower_trial_goes_on() -> None:
    results = conduct(search("sha"), lambda step: 1.0)
    assert [result.step.trial for result in results[9:]] == [0, 1, 2, 0]


@pytest.mark.parametrize("kind", ["random", "grid"])
def test_independent_trials_run_all_rounds_each(kind: str) -> None:
    space = {"adapter.rank": (2, 4, 8), "client.steps": (1, 2)}
    results = conduct(search(kind, space=space, trials=None if kind == "grid" else 6), by_trial)
    assert [(result.step.trial, result.step.since, result.step.until) for result in results] == [
        (trial, 0, 9) for trial in range(6)
    ]
    assert len({tuple(result.step.values.items()) for result in results}) == 6


def test_a_population_copies_better_trials_and_changes_their_numbers() -> None:
    course = search("pbt", trials=8, interval=3)
    results = conduct(course, lambda step: abs(step.values["client.learning_rate"] - 0.01))
    assert [result.step.until for result in results] == [3] * 8 + [6] * 8 + [9] * 8
    for until in (6, 9):
        before = {result.step.trial: result for result in results if result.step.until == until - 3}
        ranked = [result.step.trial for result in course.order(list(before.values()))]
        copying = [result.step for result in results if result.step.until == until and result.step.source is not None]
        # Those that copy run first: the models that they take have not gone on yet.
        assert [result.step for result in results if result.step.until == until][:2] == copying
        assert {step.trial for step in copying} == set(ranked[-2:])
        for step in copying:
            assert step.source in ranked[:2]
            assert step.source is not None
            better = before[step.source].step
            factor = step.values["client.learning_rate"] / better.values["client.learning_rate"]
            assert factor == pytest.approx(0.8, rel=1e-3) or factor == pytest.approx(1.2, rel=1e-3)
            assert step.segment == before[step.trial].step.segment + 1
            assert (step.since, step.source_segment) == (until - 3, better.segment)


def test_failed_members_of_a_population_are_replaced() -> None:
    course = search("pbt", trials=4, interval=3)
    results = conduct(course, lambda step: None if step.trial == 1 and step.until == 3 else by_trial(step))
    copying = {result.step.trial for result in results if result.step.until == 6 and result.step.source is not None}
    assert 1 in copying
    assert [result.step.until for result in results].count(9) == 4
    assert conduct(course, lambda step: None)[-1].step.until == 3


KINDS = st.sampled_from(["random", "sha", "asha", "pbt"])


@settings(max_examples=60, deadline=None)
@given(KINDS, st.integers(2, 12), st.integers(2, 4), st.integers(2, 20), st.integers(0, 999))
def test_whatever_the_scores_a_search_ends_and_each_trial_goes_on_from_where_it_was(
    kind: str, trials: int, reduction: int, rounds: int, seed: int
) -> None:
    course = search(kind, rounds, trials=trials, reduction=reduction)

    def score(step: Step) -> float | None:
        drawn = float(generator(derive(seed, "score", step.until, str(step.trial))).random())
        return None if drawn < 0.2 else drawn

    results = conduct(course, score)
    reached: dict[tuple[int, int], int] = {}
    for place, result in enumerate(results):
        step = result.step
        # A search that is resumed after any of its steps runs the same next one.
        assert next_step(course, results[:place]) == step
        key = (step.trial, step.segment) if step.source is None else (step.source, step.source_segment)
        assert reached.get(key, 0) == step.since < step.until <= rounds
        reached[step.trial, step.segment] = step.until
    assert {result.step.trial for result in results} == set(range(trials))
    failed = [result for result in results if result.score is None]
    for result in failed:
        later = [r.step for r in results[results.index(result) + 1 :] if r.step.trial == result.step.trial]
        assert all(step.source is not None for step in later[:1])
