"""Asynchronous rounds over a network: orders outlast rounds, and updates count in the order in which they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from fedtune.messages import AdmittedUpdate, Client, Failure
from fedtune.rounds.context import RoundContext
from fedtune.rounds.events import Note
from fedtune.rounds.exchange import completed_work
from fedtune.rounds.journal import OpenOrders
from fedtune.rounds.pending import Pending, reply_bytes, stray_of, with_outcome
from fedtune.rounds.transport import Answer, LiveTransport, Reply, UnsolicitedReply

LIMIT_S = 24 * 3600.0
"""Of an order, where `rounds.deadline_s` says nothing: a client that vanishes holds its place no longer."""


class LiveCourier:
    """Orders and answers of a `LiveTransport`.

    What the journal holds came before the process was restarted, and comes again first, in the same order: so a round
    that was interrupted ends with the buffer that it would have had.
    """

    def __init__(
        self,
        context: RoundContext,
        transport: LiveTransport,
        *,
        began_s: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin, or go on after a restart.

        Args:
            context: of the run.
            transport: that reaches the clients.
            began_s: seconds of the run so far.
            clock: seconds from any start.
        """
        self._context, self._transport, self._clock = context, transport, clock
        self._epoch_s = clock() - began_s
        self._limit_s = context.schedule.deadline_s or LIMIT_S
        self._sent_s = dict[str, float]()
        """By client at work, when this process has sent its order."""
        self._known = dict[str, Pending]()
        """Clients whose answers the journal holds, in the order in which they came."""
        self._failed = list[Failure]()
        """Of clients that orders did not reach."""
        self._strays = list[UnsolicitedReply]()

    @property
    def live(self) -> bool:
        return True

    def now_s(self, known_s: float) -> float:
        return max(known_s, self._clock() - self._epoch_s)

    def fleet(self, pending: Mapping[str, Pending]) -> Sequence[Client]:
        """Return the clients that are free, and those at work; without any of these, wait for the first."""
        if not pending:
            return self._transport.clients()
        idle = [client for client in self._transport.idle() if client.name not in pending]
        return [*idle, *(worker.client for worker in pending.values())]

    def give_up(self, client: str) -> None:
        self._known.pop(client, None)
        if self._sent_s.pop(client, None) is not None:
            self._transport.withdraw(client)

    def deliver(self, round: int, batch: Sequence[Pending], known: OpenOrders) -> Sequence[Pending]:
        """Send the orders of clients whose answers the journal does not hold."""
        workers = {worker.name: worker for worker in batch}
        for name in workers.keys() & {*known.updates, *known.failures}:
            update = known.updates.get(name)
            answer = known.failures[name] if update is None else Reply(name, update)
            num_bytes = known.sizes.get(name, 0) if update is None else len(update)
            workers[name] = with_outcome(workers[name], answer, num_bytes)
        settled = [*(known.used or known.updates), *known.failures]
        self._known |= {name: workers[name] for name in settled if name in workers}
        orders = {name: worker.request.encoded[name] for name, worker in workers.items() if worker.outcome is None}
        if orders:
            self._failed += self._transport.send(orders, self._limit_s)
            self._sent_s |= dict.fromkeys(orders, self._clock())
        return list(workers.values())

    def arrive(self, round: int, pending: Mapping[str, Pending], until_s: float | None) -> Pending | None:
        """Return the client whose answer comes next, with its outcome; None if none comes until then.

        A client that has not answered within its time is given up: then its failure is what comes.
        """
        while True:
            for name, worker in self._known.items():
                if name in pending:
                    del self._known[name]
                    return replace(worker, arrives_s=self.now_s(0.0))
            if overdue := self._overdue(pending):
                return overdue
            now_s = self.now_s(0.0)
            if until_s is not None and now_s >= until_s:
                return None
            first = min((sent_s for name, sent_s in self._sent_s.items() if name in pending), default=self._clock())
            left_s = first + self._limit_s - self._clock()
            answer = self._next(left_s if until_s is None else min(left_s, until_s - now_s))
            if answer is None:
                continue
            if isinstance(answer, UnsolicitedReply) or answer.client not in pending.keys() & self._sent_s.keys():
                self._strays.append(stray_of(answer))
                self._context.watch(Note(f"{answer.client}: {self._strays[-1].reason}"))
                continue
            return self._take(round, pending[answer.client], answer)

    def _next(self, seconds: float) -> Answer | None:
        return self._failed.pop(0) if self._failed else self._transport.receive(max(0.0, seconds))

    def _overdue(self, pending: Mapping[str, Pending]) -> Pending | None:
        for name, sent_s in sorted(self._sent_s.items()):
            if name in pending and (waited_s := self._clock() - sent_s) >= self._limit_s:
                self.give_up(name)
                failure = Failure(name, got=f"no answer in {waited_s:.0f} s", kind="late")
                return replace(pending[name], outcome=failure, arrives_s=self.now_s(0.0))
        return None

    def _take(self, round: int, worker: Pending, answer: Reply | Failure) -> Pending:
        arrived_s = self._clock() - self._sent_s.pop(worker.name)
        worker = replace(with_outcome(worker, answer, reply_bytes(answer)), arrives_s=self.now_s(0.0))
        if not isinstance(worker.outcome, AdmittedUpdate):
            return worker
        if isinstance(answer, Reply):
            # Before anything follows from it: after a crash the same update must fill the same buffer.
            self._context.journal.accept(round, worker.name, answer.update)
        if self._context.clock is None:
            return worker
        work = {worker.name: completed_work(worker.planned, worker.outcome, worker.traffic, arrived_s)}
        times = self._context.clock.client_times(worker.round, worker.sent_s, work, {})
        return replace(worker, time=times.get(worker.name))

    def strays(self) -> Iterator[UnsolicitedReply]:
        while self._strays:
            yield self._strays.pop(0)
