"""The interface of the journal that makes each round durable, and its record of a round that was interrupted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from fedtune.messages import Failure, Weight
from fedtune.methods import serialization as states

UNFIT = "unfit"
"""Recorded in place of the assignment's digest of a client without a feasible plan."""

Probed: TypeAlias = tuple[float | None, float | None]
"""Seconds for 1e12 operations, and for a megabyte, as a client has measured them; None: not measured."""


@dataclass(frozen=True)
class InterruptedRound:
    """A round that had begun when its run was killed, as the journal recorded it."""

    cohort: Mapping[str, int]
    """Clients by name, with the examples they had enrolled."""
    digests: Mapping[str, str]
    """Of the assignment of each of them."""
    updates: Mapping[str, bytes]
    """Updates accepted so far."""
    failures: Mapping[str, Failure] | None = None
    """Why the others are not used; None while the round still waits for them."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes that came from those of them that sent something."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Bytes of main memory of those of them that stated it."""
    weights: Mapping[str, Weight] = field(default_factory=dict)
    """What those of them count that do not count as their examples alone."""
    probes: Mapping[str, Probed] = field(default_factory=dict)
    """How fast those of them are that measured it for this round."""


class RoundJournal(Protocol):
    """Makes each step of a round durable before it takes effect, so that a run goes on where it was killed."""

    def interrupted_round(self, round: int) -> InterruptedRound | None:
        """Return what is known of a round that had begun already."""
        ...

    def open(
        self,
        round: int,
        *,
        state: str,
        cohort: Mapping[str, int],
        digests: Mapping[str, str],
        memory: Mapping[str, int] | None = None,
        weights: Mapping[str, Weight] | None = None,
        probes: Mapping[str, Probed] | None = None,
    ) -> None:
        """Record the digest of the state, the clients, what they count, and the digests of their assignments.

        That is before the first assignment is sent. Weights are of those whose weight is not their examples alone,
        probes of those that measured their speed.

        Clients without a feasible plan are recorded with the assignment digest `UNFIT`.
        """
        ...

    def accept(self, round: int, client: str, update: bytes) -> None:
        """Keep an update that will be used."""
        ...

    def close(self, round: int, failures: Mapping[str, Failure], sizes: Mapping[str, int]) -> None:
        """Record that the round waits for no further client; before it is aggregated. Sizes: bytes by failed client."""
        ...

    def commit(self, round: int, state: Sequence[bytes | memoryview]) -> str:
        """Keep the state after the round, as `methods.serialization.encode` makes it, and return its digest."""
        ...


class NullJournal:
    """The journal that keeps nothing: its runs cannot be resumed."""

    def interrupted_round(self, round: int) -> InterruptedRound | None:
        return None

    def open(
        self,
        round: int,
        *,
        state: str,
        cohort: Mapping[str, int],
        digests: Mapping[str, str],
        memory: Mapping[str, int] | None = None,
        weights: Mapping[str, Weight] | None = None,
        probes: Mapping[str, Probed] | None = None,
    ) -> None: ...

    def accept(self, round: int, client: str, update: bytes) -> None: ...

    def close(self, round: int, failures: Mapping[str, Failure], sizes: Mapping[str, int]) -> None: ...

    def commit(self, round: int, state: Sequence[bytes | memoryview]) -> str:
        return states.digest(state)
