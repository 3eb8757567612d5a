"""The engine of one process: every message is encoded and decoded as on a network; clients work one after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedtune.errors import FedtuneError
from fedtune.messages import Client, Failure
from fedtune.rounds.transport import Answer, Reply, Rule, Work
from fedtune.wire.codec import EncodedAssignment, blob_decoder, decode_assignment, encode_update


@dataclass(frozen=True)
class InProcess:
    """Runs each client's work in turn over the very bytes that a network would carry, so casts and counts are real."""

    fleet: Sequence[Client]
    work: Mapping[str, Work]
    """By client name."""

    def clients(self) -> Sequence[Client]:
        """Return the fleet."""
        return self.fleet

    def exchange(self, assignments: Mapping[str, EncodedAssignment], rule: Rule) -> Iterator[Answer]:
        """Yield one answer per client, in the order of the assignments; a client's error costs its update alone."""
        decode = blob_decoder()
        for name, assignment in assignments.items():
            try:
                decoded = decode_assignment(assignment.header, assignment.blobs, decode=decode)
                yield Reply(name, encode_update(self.work[name](decoded)))
            except FedtuneError as error:
                yield Failure.from_text(name, str(error))
