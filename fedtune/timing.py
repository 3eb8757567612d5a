"""How long clients took: what a clock is told, what it says, and the one that says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fedtune.round import Measured, Plan, Traffic


@dataclass(frozen=True)
class Spent:
    """How long one client took in one round."""

    compute_s: float
    transfer_s: float
    """Both ways."""
    overhead_s: float = 0.0
    """What no choice of a planner changes."""

    @property
    def seconds(self) -> float:
        return self.compute_s + self.transfer_s + self.overhead_s


@dataclass(frozen=True)
class Done:
    """What one client did, as a clock weighs it."""

    plan: Plan
    measured: Measured
    traffic: Traffic
    arrived_s: float
    """Seconds from the round's first order to this client's answer, on this machine's clock."""


class Clock(Protocol):
    """Says how long clients took: simulated from their devices, or as it was measured."""

    def timed(self, round: int, now_s: float, done: Mapping[str, Done]) -> Mapping[str, Spent]:
        """Return the times of a round that began at `now_s`; of no client where none are known."""
        ...

    def cut(self, plans: Mapping[str, Plan], spent: Mapping[str, Spent]) -> Mapping[str, float]:
        """Return the clients that were given up, with the seconds after which that was."""
        ...


class Timeless:
    """The clock of clients that share one machine: how long one took says nothing of its device."""

    def timed(self, round: int, now_s: float, done: Mapping[str, Done]) -> Mapping[str, Spent]:
        return {}

    def cut(self, plans: Mapping[str, Plan], spent: Mapping[str, Spent]) -> Mapping[str, float]:
        return {}
