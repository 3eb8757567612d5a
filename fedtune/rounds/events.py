"""The events of a run: a round starts, a client is done, a round is over, another step begins, a remark is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from fedtune.messages import Outcome, Traffic
from fedtune.rounds.record import RoundRecord


@dataclass(frozen=True)
class RoundStarted:
    round: int
    rounds: int
    cohort: tuple[str, ...]
    overlaps: bool = False
    """Whether it is asynchronous: then these are the clients at work, and which of them it ends with is not known."""


@dataclass(frozen=True)
class ClientFinished:
    round: int
    outcome: Outcome
    traffic: Traffic


@dataclass(frozen=True)
class RoundFinished:
    record: RoundRecord
    """The round's line of rounds.jsonl."""


@dataclass(frozen=True)
class Note:
    """A remark worth a line, such as examples that were dropped."""

    text: str


@dataclass(frozen=True)
class Phase:
    """A step before, between or after the rounds that takes a while, such as loading the base, begins."""

    text: str


Event: TypeAlias = RoundStarted | ClientFinished | RoundFinished | Note | Phase
Watch: TypeAlias = Callable[[Event], None]


def watch_all(*watches: Watch) -> Watch:
    """Return an observer that passes each event on to all of these, in this order."""

    def observe(event: Event) -> None:
        for watch in watches:
            watch(event)

    return observe
