"""The interface of a clock, which says how long each client took in a round: its inputs and its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fedtune.messages import Measured, Plan, Traffic, Verb


@dataclass(frozen=True)
class ClientTime:
    """How long one client took in one round."""

    compute_s: float
    transfer_s: float
    """Both ways."""
    overhead_s: float = 0.0
    """What no choice of a planner changes."""
    down_s: float | None = None
    """Of the transfer, that down; None where the two ways are not known apart."""
    joules: float | None = None
    """Energy of all this; None where it is not known."""

    @property
    def seconds(self) -> float:
        return self.compute_s + self.transfer_s + self.overhead_s

    def cut(self, after_s: float) -> ClientTime:
        """Return the time of a client that is given up after so many seconds: its energy until then was spent."""
        spent = None if self.joules is None or not self.seconds else self.joules * min(1.0, after_s / self.seconds)
        return ClientTime(after_s, 0.0, joules=spent)

    @classmethod
    def until_deadline(cls, after_s: float) -> ClientTime:
        """Return the time of a client that was waited for until a deadline, of which no division is known."""
        return cls(after_s, 0.0)


@dataclass(frozen=True)
class CompletedWork:
    """The work of one client, as a clock reads it."""

    plan: Plan
    measured: Measured
    traffic: Traffic
    arrived_s: float | None
    """Seconds from the round's first assignment to this client's reply, on this machine's clock; None for a reply that
    came before the run was resumed."""
    down_rank: int | None = None
    """Largest rank that it was sent, where the planner chose one."""
    verb: Verb | None = None
    """What it did, where clients of one method may differ in it; the plan's training is that of it."""


class Clock(Protocol):
    """Says how long clients took: simulated from their devices, or as it was measured."""

    def client_times(
        self, round: int, now_s: float, done: Mapping[str, CompletedWork], late: Mapping[str, float]
    ) -> Mapping[str, ClientTime]:
        """Return the times of a round that began at `now_s`; of no client where none are known.

        Args:
            round: its number.
            now_s: what this clock showed when it began.
            done: the work of the clients that replied.
            late: seconds after which the transport gave up others.
        """
        ...

    def overdue(self, deadlines_s: Mapping[str, float], spent: Mapping[str, ClientTime]) -> Mapping[str, float]:
        """Return the clients that missed their deadline, with the seconds after which they are given up.

        Args:
            deadlines_s: by client, of those that the planner gave one.
            spent: how long each client took.
        """
        ...

    def round_seconds(self, spent: Mapping[str, ClientTime]) -> float:
        """Return the seconds of a round from its clients' times: those of the slowest, then the server's."""
        ...

    def reachable(self, round: int, client: str) -> bool:
        """Return whether a client can be asked in a round."""
        ...
