"""The engine of one process: every message is encoded and decoded as on a network; clients work one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fedtune.messages import Assignment, Client, ClientUpdate, Failure
from fedtune.rounds.failures import debug_traceback, failure_of
from fedtune.rounds.transport import Answer, Reply, Rule, Work
from fedtune.wire.codec import EncodedAssignment, blob_decoder, decode_assignment, encode_update

Together: TypeAlias = Callable[[Sequence[Assignment]], Mapping[str, ClientUpdate]]
"""Does the work of several clients at once; returns the updates, by name, of those whose work can be done so."""


def none_together(assignments: Sequence[Assignment]) -> Mapping[str, ClientUpdate]:
    """Leave every client to work alone."""
    return {}


@dataclass(frozen=True)
class InProcess:
    """Runs each client's work in turn over the very bytes that a network would carry, so casts and counts are real."""

    fleet: Sequence[Client]
    work: Mapping[str, Work]
    """By client name."""
    together: Together = none_together
    """Tried first; a client whose update it does not return works alone."""
    at_once: int = 1
    """Clients whose work is handed to `together` at a time."""

    def clients(self) -> Sequence[Client]:
        """Return the fleet."""
        return self.fleet

    def exchange(self, assignments: Mapping[str, EncodedAssignment], rule: Rule) -> Iterator[Answer]:
        """Yield one answer per client, in the order of the assignments; a client's error costs its update alone."""
        decode, names = blob_decoder(), list(assignments)
        for begin in range(0, len(names), self.at_once):
            orders = dict[str, Assignment | Failure]()
            for name in names[begin : begin + self.at_once]:
                encoded = assignments[name]
                try:
                    orders[name] = decode_assignment(encoded.header, encoded.blobs, decode=decode)
                except (Exception, SystemExit) as error:
                    orders[name] = report_failure(name, error)
            updates = self.together([order for order in orders.values() if isinstance(order, Assignment)])
            for name, order in orders.items():
                yield order if isinstance(order, Failure) else self._answer(name, order, updates.get(name))

    def _answer(self, name: str, order: Assignment, update: ClientUpdate | None) -> Answer:
        # Whatever it is: a run of hours must not end because one client's row or plug-in has a fault.
        try:
            return Reply(name, encode_update(update or self.work[name](order)))
        except (Exception, SystemExit) as error:
            return report_failure(name, error)


def report_failure(name: str, error: BaseException) -> Failure:
    """Return the failure of a client whose work raised an error, and print where, if that is asked for."""
    debug_traceback(error)
    return failure_of(name, error)
