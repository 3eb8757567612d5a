from __future__ import annotations

import io
import json

from fedtune.cli.event_log import EVENT_TEXTS, FAULTS_ONLY, event_writer, format_event


def test_sizes_times_and_digests_are_for_people() -> None:
    line = format_event(
        "committed", {"round": 2, "updates": 3, "asked": 4, "up": 61_100, "down": 10**6, "ms": 1500, "state": "ab" * 32}
    )
    assert line == "round 2: 3 of 4 updates, up 61.1 kB, down 1.0 MB, 1.5 s; state abababababababab"


def test_what_others_say_is_not_obeyed_by_the_terminal() -> None:
    assert format_event("refused", {"client": "a\x1b[2J", "reason": "b\rc"}) == "a\\x1b[2J refused: b\\rc"


def test_what_went_well_is_written_for_log_collectors_alone() -> None:
    assert EVENT_TEXTS.keys() >= FAULTS_ONLY
    assert format_event("receipt", {"client": "anna", "round": 1, "verdict": "ACCEPTED"}) == ""
    assert format_event("receipt", {"client": "anna", "round": 1, "verdict": "LATE"}) == "round 1: anna LATE"
    assert format_event("asked", {"client": "anna"}) == ""


def test_a_site_speaks_of_itself() -> None:
    assert (
        format_event("declined", {"round": 1, "veto": "OPERATOR", "reason": "no"})
        == "round 1: this site declines: OPERATOR, no"
    )


def test_each_event_is_one_line() -> None:
    for form, expected in (("text", "00:00:01 server stopped\n"), ("json", None)):
        out = io.StringIO()
        tell = event_writer(form, out, now=lambda: 1.0)  # type: ignore[arg-type]
        tell("asked", client="anna", bytes=3)
        tell("stopped")
        if expected is not None:
            assert out.getvalue() == expected
            continue
        lines = [json.loads(line) for line in out.getvalue().splitlines()]
        assert lines == [
            {"time": "1970-01-01T00:00:01Z", "event": "asked", "client": "anna", "bytes": 3},
            {"time": "1970-01-01T00:00:01Z", "event": "stopped"},
        ]


def test_a_decline_is_one_line_where_the_server_says_what_follows_from_it() -> None:
    declined: dict[str, int | str] = {"round": 1, "veto": "OPERATOR", "reason": "no"}
    assert format_event("declined", {**declined, "client": "anna", "task": "train"}) == ""
    assert format_event("declined", {**declined, "client": "anna", "task": "result"}) != ""
    assert format_event("declined", {**declined, "veto": "SCORES_NOT_ALLOWED"}) == ""
