"""The transport of one process: every message is encoded, counted and decoded; clients work one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fedtune.errors import FedtuneError
from fedtune.round import Assignment, Client, ClientUpdate, Failure, Outcome, Traffic
from fedtune.wire.messages import (
    blob_decoder,
    blob_encoder,
    decode_assignment,
    decode_update,
    encode_assignment,
    encode_update,
)

Work: TypeAlias = Callable[[Assignment], ClientUpdate]
"""What a client does: `client.perform` bound to its base and its examples."""

LIMIT_BYTES = 1 << 40
"""Of one update: what arrives here was made in this very process."""


@dataclass(frozen=True)
class InProcess:
    """Runs each client's work in turn over the very bytes that a network would carry, so casts and counts are real."""

    fleet: Sequence[Client]
    work: Mapping[str, Work]
    """By client name."""

    def clients(self) -> Sequence[Client]:
        """Return the fleet."""
        return self.fleet

    def exchange(self, assignments: Mapping[str, Assignment]) -> Iterator[tuple[Outcome, Traffic]]:
        """Yield one outcome per client, in the order of the assignments; a client's error costs its update alone."""
        encode, decode = blob_encoder(), blob_decoder()
        for name, assignment in assignments.items():
            sent = encode_assignment(assignment, encode=encode)
            down = len(sent.header) + sum(len(body) for body in sent.blobs.values())
            try:
                reply = encode_update(self.work[name](decode_assignment(sent.header, sent.blobs, decode=decode)))
                yield decode_update(reply, client=name, limit_bytes=LIMIT_BYTES), Traffic(down=down, up=len(reply))
            except FedtuneError as error:
                yield Failure(client=name, reason=str(error)), Traffic(down=down)
