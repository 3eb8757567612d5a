"""The one seam between the round loop and the clients: encoded assignments out, encoded updates back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from fedtune.messages import Assignment, Client, ClientUpdate, Failure
from fedtune.wire.codec import EncodedAssignment

Work: TypeAlias = Callable[[Assignment], ClientUpdate]
"""What a client does: `client.perform` bound to its base and its examples."""


@dataclass(frozen=True)
class Rule:
    """When a round stops waiting for its clients."""

    quorum: int
    """Updates with which the round may end at its deadline."""
    deadline_s: float | None = None
    """Seconds after which the round ends if the quorum is in; none waits for every client."""
    grace_s: float = 60.0
    """Seconds beyond the deadline after which the round ends without a quorum too."""


@dataclass(frozen=True)
class Reply:
    """An update as it arrived, from a client that the transport knows by name; nobody has looked into it yet."""

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
    """How messages travel; whoever makes one also closes it."""

    def clients(self) -> Sequence[Client]:
        """Return who can take part in the next round, in any order; waits until somebody can."""
        ...

    def exchange(self, orders: Mapping[str, EncodedAssignment], rule: Rule) -> Iterable[Answer]:
        """Deliver the orders and yield one `Reply` or `Failure` per client, in any order, and whatever came aside.

        A client that answers no more in this round is a `Failure` of the kind `late`; nothing that one client does
        raises. Engines on one machine have no deadline: there every client is waited for.
        """
        ...
