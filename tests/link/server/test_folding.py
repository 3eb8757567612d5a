"""Folding by hand: floods of one cause, of many causes, and what honest members see of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from fedtune.link.server.folding import IN_FULL, MAX_CAUSES, OTHERS, FoldedEvents
from tests.link.harness import Clock


@dataclass
class Log:
    clock: Clock = field(default_factory=Clock)
    events: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folded = FoldedEvents(lambda kind, **fields: self.events.append((kind, fields)), clock=self.clock)

    def refuse(self, client: str = "anna", code: str = "PROTOCOL", reason: str = "old") -> None:
        self.folded.record("refused", client=client, reason=reason, code=code)

    def num_bytes(self) -> int:
        return sum(len(json.dumps([kind, fields])) for kind, fields in self.events)


@pytest.mark.guarantee("G14")
def test_the_first_refusal_of_a_cause_is_in_full_and_the_others_are_one_line() -> None:
    log = Log()
    for place in range(1000):
        log.refuse(reason=f"old {place}")
    assert log.events == [("refused", {"client": "anna", "reason": "old 0", "code": "PROTOCOL"})]
    log.clock.now += 60
    log.folded.record("round", round=1)
    text = "999 more of the same within 60 s; the last: old 999"
    assert log.events[1:] == [
        ("refused", {"client": "anna", "code": "PROTOCOL", "count": 999, "reason": text}),
        ("round", {"round": 1}),
    ]
    log.refuse()  # the next minute begins with one in full
    log.folded.flush()
    assert log.events[3:] == [("refused", {"client": "anna", "reason": "old", "code": "PROTOCOL"})]


def test_causes_are_told_apart_by_client_and_code() -> None:
    log = Log()
    for client, code in (("anna", "PROTOCOL"), ("anna", "SIGNATURE"), ("bert", "PROTOCOL")) * 2:
        log.refuse(client, code)
    assert [(fields["client"], fields["code"]) for _, fields in log.events] == [
        ("anna", "PROTOCOL"),
        ("anna", "SIGNATURE"),
        ("bert", "PROTOCOL"),
    ]


@pytest.mark.guarantee("G14")
def test_a_day_of_refusals_at_full_speed_is_less_than_a_mebibyte() -> None:
    """It was 8.8 GiB."""
    log = Log()
    for _ in range(24 * 60):
        for _ in range(40):  # two hundred a second would be no other bytes, and a slow test
            log.refuse(reason="x" * 256)
            log.clock.now += 1.5
    log.folded.flush()
    assert log.num_bytes() < 2**20
    assert len(log.events) == 2 * 24 * 60


@pytest.mark.guarantee("G14")
def test_made_up_causes_take_bounded_memory_and_lines() -> None:
    log = Log()
    for place in range(3 * MAX_CAUSES):
        log.refuse(f"name-{place}")
    assert len(log.events) == MAX_CAUSES + 1
    log.folded.flush()
    assert log.events[-1][1]["count"] == 2 * MAX_CAUSES - 1
    assert OTHERS not in [fields["client"] for _, fields in log.events]


def test_downloads_beyond_those_in_full_have_their_bytes_added_up() -> None:
    log = Log()
    for _ in range(IN_FULL["fetched"] + 3):
        log.folded.record("fetched", client="anna", part="ab", bytes=5)
    log.folded.flush()
    assert len(log.events) == IN_FULL["fetched"] + 1
    assert log.events[-1][1]["bytes"] == 15
    assert log.events[-1][1]["count"] == 3


def test_what_only_the_server_causes_is_never_folded() -> None:
    log = Log()
    for _ in range(1000):
        log.folded.record("asked", client="anna", round=1)
    assert len(log.events) == 1000
