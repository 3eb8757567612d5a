"""The interface of a transport between round loop and clients: encoded assignments out, encoded updates back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from fedtune.messages import Assignment, Client, ClientUpdate, Failure
from fedtune.wire.codec import EncodedAssignment

Work: TypeAlias = Callable[[Assignment], ClientUpdate]
"""`client.perform` bound to one client's base and examples."""


@dataclass(frozen=True)
class Rule:
    """When a round stops waiting for its clients."""

    quorum: int
    """Updates with which the round may end at its deadline."""
    deadline_s: float | None = None
    """Seconds after which the round ends if the quorum is in; none waits for every client."""
    grace_s: float = 60.0
    """Seconds beyond the deadline after which the round ends without a quorum too."""

    def remaining(self, updates: int, seconds: float) -> Rule:
        """Return what is left of the rule after so many updates and so much time."""
        deadline = None if self.deadline_s is None else max(0.0, self.deadline_s - seconds)
        return replace(self, quorum=max(0, self.quorum - updates), deadline_s=deadline)


@dataclass(frozen=True)
class Reply:
    """An update as it arrived, from a client that the transport knows by name; not decoded yet."""

    client: str
    update: bytes
    """As `wire.codec.encode_update` makes it."""


@dataclass(frozen=True)
class UnsolicitedReply:
    """What came from a client that the round does not wait for: counted, named and dropped."""

    client: str
    reason: str
    num_bytes: int = 0
    kind: Literal["late", "refused"] = "late"
    """late: an answer to a round that had ended; refused: a client that cannot take part."""


Answer: TypeAlias = Reply | Failure | UnsolicitedReply


class Transport(Protocol):
    """How messages travel; its creator closes it."""

    def clients(self) -> Sequence[Client]:
        """Return the clients that can take part in the next round, in any order; waits until one can."""
        ...

    def exchange(self, orders: Mapping[str, EncodedAssignment], rule: Rule) -> Iterable[Answer]:
        """Deliver assignments and yield one `Reply` or `Failure` per client, in any order, and what came unsolicited.

        A client that does not reply in this round is a `Failure` of the kind `late`; nothing that one client does
        raises. Engines on one machine have no deadline: there every client is waited for.
        """
        ...


@runtime_checkable
class LiveTransport(Transport, Protocol):
    """A transport whose orders may outlast rounds: what was sent is answered when it is done, whatever came between."""

    def idle(self) -> Sequence[Client]:
        """Return the clients that could be asked now; does not wait for any."""
        ...

    def send(self, orders: Mapping[str, EncodedAssignment], seconds: float) -> Sequence[Failure]:
        """Send orders whose answers `receive` gives, and return the failures of clients that they do not reach.

        Args:
            orders: by client.
            seconds: until which they are waited for.
        """
        ...

    def receive(self, seconds: float) -> Answer | None:
        """Return the next answer to an order that was sent, or what came unasked; None if none comes in so long."""
        ...

    def withdraw(self, client: str) -> None:
        """Wait no more for the answer of a client: one that comes later is unasked."""
        ...
