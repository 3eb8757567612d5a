"""The speed that clients measure before a round, for that round alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from fedtune.messages import Client

PROBE_TFLOP = 0.05
"""1e12 operations of the matrix products that a client computes, unless the time is over before."""
PROBE_MB = 1.0
"""Megabytes that it receives, likewise."""
LIMIT_S = 1.0
"""Seconds after which either part ends at the latest, and what was done by then counts."""
FIRST_LIMIT_S = 0.25
"""The same before the first round, when it is not known how long rounds take."""
SHARE = 0.025
"""Of a mean round, that either part may take: where rounds last two seconds, one for a probe is not worth it."""


@dataclass(frozen=True)
class SpeedProbe:
    """What a client has measured of itself, and how long that took it."""

    s_per_tflop: float | None = None
    """Seconds for 1e12 operations; None where it did not say."""
    s_per_mb: float | None = None
    """Seconds for a megabyte, down and up alike."""
    seconds: float = 0.0


Measure: TypeAlias = Callable[[int, float, Sequence[Client], float], Mapping[str, SpeedProbe]]
"""(round, what the clock shows, cohort, seconds that either part may take) -> what each client says, by name; nothing
of a client that says nothing"""


@dataclass(frozen=True)
class Prober:
    """Asks clients for their speed."""

    measure: Measure
    repeatable: bool = False
    """Whether it gives the same answers when it is asked again, as a simulated clock does."""


def limit_s(round: int, now_s: float) -> float:
    """Return how long either part of a probe may take, from what rounds took so far.

    >>> limit_s(1, 0.0), limit_s(5, 80.0), limit_s(5, 400.0)
    (0.25, 0.5, 1.0)
    """
    return min(LIMIT_S, SHARE * now_s / (round - 1)) if round > 1 and now_s > 0 else FIRST_LIMIT_S


def with_probes(
    prober: Prober | None, round: int, now_s: float, cohort: Sequence[Client]
) -> tuple[Sequence[Client], float]:
    """Return the clients with their speed as they have measured it for a round, and the seconds of the slowest.

    Without a prober what they said before, as when they checked in, counts for nothing: it is of another time.
    """
    if prober is None:
        return [replace(client, s_per_tflop=None, s_per_mb=None) for client in cohort], 0.0
    said = prober.measure(round, now_s, cohort, limit_s(round, now_s))
    silent = SpeedProbe()
    answers = {client.name: said.get(client.name, silent) for client in cohort}
    clients = [
        replace(client, s_per_tflop=answers[client.name].s_per_tflop, s_per_mb=answers[client.name].s_per_mb)
        for client in cohort
    ]
    # The round begins when all have answered.
    return clients, max((answer.seconds for answer in answers.values()), default=0.0)


class CheckIns:
    """Hands on what clients have said of their speed when they checked in, each time for one round alone."""

    def __init__(self) -> None:
        self._used = dict[str, tuple[float | None, float | None]]()

    def __call__(self, round: int, now_s: float, cohort: Sequence[Client], limit_s: float) -> Mapping[str, SpeedProbe]:
        """Return what clients have said since they were last asked; nothing of those that have not checked in since."""
        said = {client.name: (client.s_per_tflop, client.s_per_mb) for client in cohort}
        fresh = {name: speed for name, speed in said.items() if self._used.get(name) != speed}
        self._used.update(fresh)
        return {name: SpeedProbe(*speed) for name, speed in fresh.items()}
