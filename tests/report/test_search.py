from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.report.search import content_of, ranked_trials, spearman, values_text, write_search
from fedtune.search.settings import SearchSettings
from fedtune.search.steps import Cost, Result, Search, Step


def course(kind: Any = "asha", **keys: Any) -> Search:
    return Search(SearchSettings(kind=kind, trials=4, space={"client.steps": (1, 2)}, **keys), 9, 0)


def result(trial: int, until: int, score: float | None, *, since: int = 0, reason: str = "", **keys: Any) -> Result:
    step = Step(trial, until, {"client.steps": trial}, since=since, **keys)
    scores = {} if score is None else {until: score}
    return Result(step, score, reason=reason, cost=Cost(until - since, 10, 5, 0.5), scores=scores)


RESULTS = [
    result(0, 1, 3.0),
    result(1, 1, 1.0),
    result(2, 1, None, reason="<b>diverged</b>"),
    result(1, 3, 2.0, since=1),
    result(3, 1, 0.5),
]


def test_trials_that_ran_further_come_first_and_failed_ones_last() -> None:
    content = content_of(course(), RESULTS, name="x")
    assert [row["trial"] for row in content["trials"]] == [1, 3, 0, 2]
    assert [row["state"] for row in content["trials"]] == ["stopped", "stopped", "stopped", "failed"]
    # 0.5 after one round is another model's score than 2.0 after three.
    assert content["best"] == 1
    assert content["trials"][0]["client_rounds"] == 3
    assert [steps[-1].step.trial for steps in ranked_trials(course(metric="accuracy"), RESULTS)] == [1, 0, 3, 2]


def test_every_round_of_every_trial_is_spent_once() -> None:
    content = content_of(course(), RESULTS, name="x")
    assert content["spent"] == {
        "client_rounds": 1 + 1 + 1 + 2 + 1,
        "bytes_down": 50,
        "bytes_up": 25,
        "seconds": 2.5,
        "trials": 4,
        "failed": 1,
    }
    assert [point["best"] for point in content["curve"]] == [3.0, 1.0, 1.0, 1.0, 0.5]
    assert [point["client_rounds"] for point in content["curve"]] == [1, 2, 3, 5, 6]


def test_a_failed_member_that_took_another_model_has_recovered() -> None:
    copied = result(2, 4, 1.0, since=3, segment=1, source=0)
    content = content_of(course("pbt", interval=3), [result(0, 3, 1.0), result(2, 3, None), copied], name="x")
    assert content["spent"]["failed"] == 0
    assert content["trials"][0]["copied"] == [{"round": 3, "trial": 0, "values": {"client.steps": 2}}]


def test_early_scores_are_correlated_with_final_ones_by_rank() -> None:
    ends = [1.0, 2.0, 4.0, 3.0]
    results = [
        Result(Step(trial, 9, {}), end, scores={1: early, 9: end})
        for trial, (early, end) in enumerate(zip([10.0, 20.0, 30.0, 40.0], ends, strict=True))
    ]
    (first, second) = content_of(course("random", first_rung=1), results, name="x")["rank_correlation"]
    assert first == {"rung": 1, "trials": 4, "value": pytest.approx(0.8)}  # 1 - 6 * 2 / (4 * 15)
    assert second == {"rung": 3, "trials": 0, "value": None}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=12))
def test_rank_correlation_is_that_of_scipy(pairs: list[tuple[int, int]]) -> None:
    from scipy.stats import spearmanr

    first, second = zip(*pairs, strict=True)
    ours = spearman(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(spearmanr(first, second).statistic, abs=1e-9)


def test_values_are_short_where_their_last_words_differ() -> None:
    values = {"client.steps": 3, "descend.steps": 4, "adapter.targets": ("q_proj",), "client.learning_rate": 1e-5}
    expected = "client.steps 3, descend.steps 4, targets ('q_proj',), learning_rate 1e-05"
    assert values_text(values) == expected


def test_the_page_the_picture_and_the_numbers_are_written(tmp_path: Path) -> None:
    content = content_of(course(), RESULTS, name="x", ended="stopped: Ctrl-C")
    page = write_search(tmp_path, content)
    text = page.read_text()
    assert "stopped: Ctrl-C" in text
    assert "<svg" in text
    assert "<b>diverged</b>" not in text
    assert "&lt;b&gt;diverged" in text
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "search.json").read_text())["spent"]["client_rounds"] == 6
    before = (tmp_path / "search.png").read_bytes()
    write_search(tmp_path, content)
    assert (tmp_path / "search.png").read_bytes() == before


def test_a_search_in_which_all_failed_has_no_picture(tmp_path: Path) -> None:
    write_search(tmp_path, content_of(course(), [result(0, 1, None, reason="x")], name="x"))
    assert not (tmp_path / "search.png").exists()
