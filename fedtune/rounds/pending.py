"""Clients that work in asynchronous rounds: what each was asked, from which state, and when its update is there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fedtune.messages import AdmittedUpdate, Assignment, Client, Failure, Outcome, PlannedClient, Traffic
from fedtune.rounds.clock import ClientTime, Clock
from fedtune.rounds.context import RoundContext
from fedtune.rounds.events import Note
from fedtune.rounds.exchange import RoundRequest, completed_work, decode_and_admit, encoded_bytes
from fedtune.rounds.journal import OpenOrders
from fedtune.rounds.transport import Answer, Reply, UnsolicitedReply


@dataclass(frozen=True)
class Pending:
    """A client that works, or whose update waits for its turn by the clock."""

    client: Client
    request: RoundRequest
    """All that was asked with it; its bounds are those of the state that these clients start from."""
    state: Any
    """That state."""
    sent_s: float
    """Seconds of the run when its order was sent."""
    traffic: Traffic = field(default_factory=Traffic)
    outcome: Outcome | None = None
    """None while it works."""
    arrives_s: float = math.inf
    """Seconds of the run when its answer is there; infinite while that is not known."""
    time: ClientTime | None = None

    @property
    def name(self) -> str:
        return self.client.name

    @property
    def round(self) -> int:
        """The round in which it was asked."""
        return self.request.round

    @property
    def planned(self) -> PlannedClient:
        return self.request.planned[self.name]

    @property
    def assignment(self) -> Assignment:
        return self.request.assignments[self.name]


class Courier(Protocol):
    """Brings orders to clients, and their answers back in the order in which they come."""

    @property
    def live(self) -> bool:
        """Whether answers come when they come, and not as a clock says: then the journal knows their order."""
        ...

    def now_s(self, known_s: float) -> float:
        """Return the seconds of the run so far; `known_s`: those at the last event."""
        ...

    def fleet(self, pending: Mapping[str, Pending]) -> Sequence[Client]:
        """Return the clients that could be asked, and those at work, in any order; waits for one where none works."""
        ...

    def give_up(self, client: str) -> None:
        """Wait no more for a client."""
        ...

    def deliver(self, round: int, batch: Sequence[Pending], known: OpenOrders) -> Sequence[Pending]:
        """Send the orders of clients, but for those whose answers the journal holds, and return the clients.

        Args:
            round: the one that is open.
            batch: clients that were asked.
            known: what the journal holds of them.
        """
        ...

    def arrive(self, round: int, pending: Mapping[str, Pending], until_s: float | None) -> Pending | None:
        """Return the client whose answer comes next, with its outcome; None if none comes until then.

        Args:
            round: the one that is open.
            pending: clients that work, at least one.
            until_s: seconds of the run until which it is waited; None: as long as it takes.
        """
        ...

    def strays(self) -> Iterator[UnsolicitedReply]:
        """Yield, each once, the answers that no order waited for."""
        ...


def pending_of(request: RoundRequest, clients: Sequence[Client], state: Any, now_s: float) -> Sequence[Pending]:
    """Return the clients of a request that have an assignment."""
    return [
        Pending(client, request, state, now_s, Traffic(down=encoded_bytes(request.encoded[client.name])))
        for client in clients
        if client.name in request.encoded
    ]


def with_outcome(worker: Pending, answer: Reply | Failure, num_bytes: int) -> Pending:
    """Return a client with the outcome of its answer: an admitted update, or why it is none."""
    traffic = Traffic(down=worker.traffic.down, up=num_bytes)
    return replace(worker, outcome=decode_and_admit(answer, worker.request), traffic=traffic)


class SimulatedCourier:
    """Clients on simulated devices: they train when they are asked, and their updates come when the clock says so.

    So the order of arrival is a function of the recipe, whatever engine does the work and how long that takes.
    """

    def __init__(self, context: RoundContext, clock: Clock) -> None:
        self._context, self._clock = context, clock
        self._strays = list[UnsolicitedReply]()

    @property
    def live(self) -> bool:
        return False

    def now_s(self, known_s: float) -> float:
        return known_s

    def fleet(self, pending: Mapping[str, Pending]) -> Sequence[Client]:
        return self._context.transport.clients()

    def give_up(self, client: str) -> None:
        """Do nothing: its work is done, and its update is dropped."""

    def deliver(self, round: int, batch: Sequence[Pending], known: OpenOrders) -> Sequence[Pending]:
        """Have every client do its work, and return them with outcomes and times."""
        done = dict[str, Pending]()
        for worker in batch:
            if worker.name in known.updates:
                update = known.updates[worker.name]
                done[worker.name] = with_outcome(worker, Reply(worker.name, update), len(update))
            elif worker.name in known.failures:
                done[worker.name] = with_outcome(worker, known.failures[worker.name], known.sizes.get(worker.name, 0))
        waiting = {worker.name: worker for worker in batch if worker.name not in done}
        orders = {name: worker.request.encoded[name] for name, worker in waiting.items()}
        for answer in self._context.transport.exchange(orders, self._context.schedule.rule) if orders else ():
            if isinstance(answer, UnsolicitedReply) or answer.client not in waiting:
                self._drop(answer)
                continue
            worker = with_outcome(waiting.pop(answer.client), answer, reply_bytes(answer))
            if isinstance(worker.outcome, AdmittedUpdate) and isinstance(answer, Reply):
                self._context.journal.accept(round, worker.name, answer.update)
            done[worker.name] = worker
        for name, worker in waiting.items():
            done[name] = with_outcome(worker, Failure(name, expected="an answer", hint="none came"), 0)
        return [self._with_time(done[worker.name]) for worker in batch]

    def _with_time(self, worker: Pending) -> Pending:
        if not isinstance(worker.outcome, AdmittedUpdate):
            # How long a client took that failed is not known: its place is free at once.
            return replace(worker, arrives_s=worker.sent_s)
        work = {worker.name: completed_work(worker.planned, worker.outcome, worker.traffic, None)}
        time = self._clock.client_times(worker.round, worker.sent_s, work, {})[worker.name]
        return replace(worker, time=time, arrives_s=worker.sent_s + time.seconds)

    def _drop(self, answer: Answer) -> None:
        self._strays.append(stray_of(answer))
        self._context.watch(Note(f"{answer.client}: {self._strays[-1].reason}"))

    def arrive(self, round: int, pending: Mapping[str, Pending], until_s: float | None) -> Pending | None:
        """Return the client whose answer is there first; of two at the same time the first one by name."""
        first = min(pending.values(), key=lambda worker: (worker.arrives_s, worker.name))
        return None if until_s is not None and first.arrives_s > until_s else first

    def strays(self) -> Iterator[UnsolicitedReply]:
        while self._strays:
            yield self._strays.pop(0)


def stray_of(answer: Answer) -> UnsolicitedReply:
    """Return an answer as one that nothing waits for."""
    if isinstance(answer, UnsolicitedReply):
        return answer
    return UnsolicitedReply(answer.client, "answered unasked; dropped", reply_bytes(answer))


def reply_bytes(answer: Reply | Failure) -> int:
    return len(answer.update) if isinstance(answer, Reply) else 0
