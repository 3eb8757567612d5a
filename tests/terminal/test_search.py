from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from fedtune.terminal.search import settings_lines, show_plan, show_search


def content(trials: int) -> dict[str, Any]:
    row = {"rounds": 9, "score": 3.25, "client_rounds": 27, "bytes_down": 10**6, "bytes_up": 10**5, "reason": ""}
    rows = [
        {"trial": n, "values": {"client.learning_rate": 0.001 * n, "adapter.rank": 4}, "state": "finished", **row}
        for n in range(trials)
    ]
    rows[-1] |= {"state": "failed", "score": None, "reason": "the loss \x1b[2J is not finite " + "x" * 300}
    return {
        "kind": "asha",
        "metric": "loss",
        "trials": rows,
        "best": 0,
        "rungs": [1, 3, 9],
        "spent": {"trials": trials, "failed": 1, "client_rounds": 99, "bytes_down": 5, "bytes_up": 6, "seconds": 70.0},
        "rank_correlation": [{"rung": 1, "trials": 3, "value": 0.5}, {"rung": 3, "trials": 1, "value": None}],
    }


def shown(call: Any, value: Any, width: int = 80) -> str:
    out = io.StringIO()
    call(Console(file=out, width=width), value)
    return out.getvalue()


def test_a_result_fits_eighty_columns_and_obeys_no_escape() -> None:
    text = shown(show_search, content(4), 200)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "0 *" in text
    assert "failed: the loss" in text
    assert "4 trials, 1 of them failed, 99 client-rounds" in text
    assert "correlation +0.50" in text
    assert "and 3 more" not in text


def test_of_many_trials_the_best_are_shown() -> None:
    assert "and 3 more trials, in search.json" in shown(show_search, content(23))


def test_a_plan_says_the_rounds_of_all_and_what_each_trial_sends() -> None:
    rows = [
        {"trial": n, "values": {"adapter.rank": 2 + n}, "first_bytes": 1000, "bytes": None if n else 9000}
        for n in range(25)
    ]
    plan = {"kind": "sha", "trials": 25, "rungs": [1, 9], "rounds": 30, "client_rounds": 90, "rows": rows}
    plan["bytes_are"] = "at most"
    text = shown(show_plan, plan)
    assert "25 trials, compared after round 1, 9; about 30 rounds and 90" in text
    assert "9.0 kB" in text
    assert "bytes are at most" in text
    assert shown(show_plan, {**plan, "rungs": [9]}).count("bytes to") == 1
    assert "and 5 more trials; --json lists all" in text
    assert "bytes to" not in shown(show_plan, {**plan, "rows": []})


def test_settings_of_one_name_keep_their_tables() -> None:
    assert settings_lines({"client.steps": 1, "descend.steps": 2}) == "client.steps 1\ndescend.steps 2"
