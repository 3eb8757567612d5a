"""The interface of the journal that makes each round durable, and its record of a round that was interrupted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from fedtune.messages import Client, Failure, Weight
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


@dataclass(frozen=True)
class Ask:
    """Orders of an asynchronous round that are sent together."""

    round: int
    """Number of the round in which they are; their clients start from the state before it."""
    now_s: float
    """Seconds of the run until then."""
    clients: tuple[Client, ...] = ()
    """Sorted by name; with the examples, memory and organisation that their plans and weights are made of."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of the assignment of each of them; `UNFIT` without a feasible plan."""


@dataclass(frozen=True)
class OpenOrders:
    """The orders of an asynchronous run that no round before this one has settled, as the journal recorded them."""

    earlier: Sequence[Ask] = ()
    """Of earlier rounds: the clients that had not been settled when this round began."""
    asks: Sequence[Ask] = ()
    """Of this round so far; none if it has not begun."""
    updates: Mapping[str, bytes] = field(default_factory=dict)
    """Updates of these clients that are accepted, in the order in which they came."""
    used: Sequence[str] | None = None
    """Clients of the round's buffer; None while it is not full."""
    failures: Mapping[str, Failure] = field(default_factory=dict)
    """Clients that were settled beside them, and why."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes that came from these."""


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


class AsyncJournal(RoundJournal, Protocol):
    """A journal of rounds that overlap; `ask` and `settle` take the places of `open` and `close`."""

    def open_orders(self, round: int) -> OpenOrders:
        """Return what is known of a round's orders, and of those that earlier rounds have left."""
        ...

    def ask(self, ask: Ask, *, state: str) -> None:
        """Record orders before they are sent; the first of a round, which may have no clients, begins it.

        Args:
            ask: the orders.
            state: digest of the state that they start from.
        """
        ...

    def settle(
        self, round: int, used: Sequence[str], failures: Mapping[str, Failure], sizes: Mapping[str, int]
    ) -> None:
        """Record the clients of a round's buffer, and those that are not waited for any more, before it is aggregated.

        Every client is one whose order no round has settled.
        """
        ...

    def version(self, round: int) -> bytes:
        """Return the encoded state after a round, while an order that no round has settled starts from it."""
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

    def open_orders(self, round: int) -> OpenOrders:
        return OpenOrders()

    def ask(self, ask: Ask, *, state: str) -> None: ...

    def settle(
        self, round: int, used: Sequence[str], failures: Mapping[str, Failure], sizes: Mapping[str, int]
    ) -> None: ...

    def version(self, round: int) -> bytes:
        return b""
