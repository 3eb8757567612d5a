"""How long clients took: what a clock is told, what it says, and the one that says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fedtune.messages import Measured, Plan, Traffic


@dataclass(frozen=True)
class ClientTime:
    """How long one client took in one round."""

    compute_s: float
    transfer_s: float
    """Both ways."""
    overhead_s: float = 0.0
    """What no choice of a planner changes."""

    @property
    def seconds(self) -> float:
        return self.compute_s + self.transfer_s + self.overhead_s

    @classmethod
    def given_up(cls, after_s: float) -> ClientTime:
        """Return the time of a client that was given up: nobody can know how it would have been divided."""
        return cls(after_s, 0.0)


@dataclass(frozen=True)
class CompletedWork:
    """What one client did, as a clock weighs it."""

    plan: Plan
    measured: Measured
    traffic: Traffic
    arrived_s: float | None
    """Seconds from the round's first order to this client's answer, on this machine's clock; None of an answer that
    came before the run was resumed."""


class Clock(Protocol):
    """Says how long clients took: simulated from their devices, or as it was measured."""

    def timed(
        self, round: int, now_s: float, done: Mapping[str, CompletedWork], late: Mapping[str, float]
    ) -> Mapping[str, ClientTime]:
        """Return the times of a round that began at `now_s`; of no client where none are known.

        Args:
            round: its number.
            now_s: what this clock showed when it began.
            done: what clients did.
            late: seconds after which others were given up by whoever waited for their answers.
        """
        ...

    def cut(self, deadlines_s: Mapping[str, float], spent: Mapping[str, ClientTime]) -> Mapping[str, float]:
        """Return the clients that were given up, with the seconds after which that was.

        Args:
            deadlines_s: of the planner, by client; none for those that it gave none.
            spent: how long each client took.
        """
        ...

    def lasted(self, spent: Mapping[str, ClientTime]) -> float:
        """Return how long a round lasted in which clients took so long: as long as the slowest, and the server."""
        ...

    def reachable(self, round: int, client: str) -> bool:
        """Return whether a client can be asked in a round."""
        ...


class NullClock:
    """The clock of clients that share one machine: how long one took says nothing of its device."""

    def timed(
        self, round: int, now_s: float, done: Mapping[str, CompletedWork], late: Mapping[str, float]
    ) -> Mapping[str, ClientTime]:
        return {}

    def cut(self, deadlines_s: Mapping[str, float], spent: Mapping[str, ClientTime]) -> Mapping[str, float]:
        return {}

    def lasted(self, spent: Mapping[str, ClientTime]) -> float:
        return 0.0

    def reachable(self, round: int, client: str) -> bool:
        return True
