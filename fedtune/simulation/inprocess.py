"""The engine of one process: every message is encoded and decoded as on a network; clients work one after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedtune.messages import Client
from fedtune.rounds.failures import debug_traceback, failure_of
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
            # Whatever it is: a run of hours must not end because one client's row or plug-in has a fault.
            except (Exception, SystemExit) as error:
                debug_traceback(error)
                yield failure_of(name, error)
