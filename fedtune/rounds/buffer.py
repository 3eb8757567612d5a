"""Asynchronous rounds: clients work on versions of their own, and a round ends with a buffer of updates (FedBuff)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from fedtune.errors import ConfigError, Fault, StoreError
from fedtune.messages import AdmittedUpdate, Client, Failure, Outcome, PlannedClient, Traffic
from fedtune.methods import serialization as states
from fedtune.rounds.aggregation import Aggregated, aggregate
from fedtune.rounds.asynchronous import AsyncSettings
from fedtune.rounds.context import RoundContext
from fedtune.rounds.events import ClientFinished, Note, RoundStarted
from fedtune.rounds.exchange import RoundReplies, RoundRequest, filter_by_norm, too_few, without_refused
from fedtune.rounds.journal import UNFIT, Ask, OpenOrders
from fedtune.rounds.live_courier import LiveCourier
from fedtune.rounds.loop import (
    RoundResult,
    changed_assignments,
    commit,
    make_request,
    nothing_fits,
    reachable,
)
from fedtune.rounds.pending import Courier, Pending, SimulatedCourier, pending_of
from fedtune.rounds.schedule import sample
from fedtune.rounds.transport import LiveTransport
from fedtune.rounds.weights import cap_note, public_weights


def run(context: RoundContext, *, start: Any | None = None, clock_s: float = 0.0) -> Iterator[RoundResult]:
    """Yield the result of one round after the other, each of which ends with a buffer of updates.

    Args:
        context: what the rounds have in common.
        start: state to go on from; the method's first one without it.
        clock_s: what the context's clock showed after the rounds before.

    Raises:
        RoundError: if fewer than `min_clients` updates of a round could be used.
        StoreError: if the journal cannot be written, or holds orders that would be others now.
        ConfigError: if nothing says in which order updates come.
    """
    state = context.method.init(context.blueprint, context.settings) if start is None else start
    digest = states.digest(states.encode(state))
    known, courier = context.journal.open_orders(state.round + 1), courier_of(context, clock_s)
    pending = restore_pending(context, state, known, courier)
    while state.round < context.schedule.count:
        began = time.perf_counter()
        buffer = Buffer(context.at(state.round + 1), state, digest, pending, known, courier, clock_s)
        buffer.collect()
        result = buffer.finish(began)
        state, digest, clock_s = result.state, result.digest, result.clock_s
        pending, known = buffer.pending, OpenOrders()
        yield result
    for name in sorted(pending):
        courier.give_up(name)
    if pending:
        names = ", ".join(sorted(pending)[:5]) + ", ..." * (len(pending) > 5)
        context.watch(Note(f"still at work when the last round ended, their updates are not used: {names}"))


def courier_of(context: RoundContext, clock_s: float) -> Courier:
    """Return what brings orders and answers of a run; `clock_s`: its seconds so far.

    Raises:
        ConfigError: if clients share this machine and no clock says when their updates come.
    """
    if context.live and isinstance(context.transport, LiveTransport):
        return LiveCourier(context, context.transport, began_s=clock_s)
    if context.clock is None:
        raise no_clock()
    return SimulatedCourier(context, context.clock)


def no_clock() -> ConfigError:
    """Return why clients that share a machine cannot be asynchronous without devices."""
    expected = "a table fleet in a simulation: its clock says in which order updates come"
    return ConfigError(Fault("asynchronous", expected, "none", 'write, say, fleet = { name = "phones" }'))


def restore_pending(context: RoundContext, state: Any, known: OpenOrders, courier: Courier) -> dict[str, Pending]:
    """Return the clients that earlier rounds have left at work, with the orders that they were sent.

    Raises:
        StoreError: if a state is missing, or an order would be another one now.
    """
    pending = dict[str, Pending]()
    for number, asks in groupby(known.earlier, key=lambda ask: ask.round):
        encoded = context.journal.version(number - 1) if number > 1 else b""
        first = context.method.init(context.blueprint, context.settings)
        version = states.decode(encoded, first) if number > 1 else first
        for ask in asks:
            plans = context.planner.plan(context.planner.start(), number, ask.clients)
            request = make_request(context, version, plans, ask.clients, {})
            check_digests(request, ask)
            batch = pending_of(request, ask.clients, version, ask.now_s)
            pending |= {worker.name: worker for worker in courier.deliver(state.round + 1, batch, known)}
    return pending


def check_digests(request: RoundRequest, ask: Ask) -> None:
    """Raise a StoreError if an order is not the recorded one."""
    if request.digests != ask.digests:
        raise changed_assignments(ask.round, ask.digests, request.digests)


ALL = 2**31
"""A buffer that ends when no client is left to ask."""


class Buffer:
    """One round: updates of clients that work are taken as they come, until they are enough."""

    def __init__(
        self,
        context: RoundContext,
        state: Any,
        digest: str,
        pending: Mapping[str, Pending],
        known: OpenOrders,
        courier: Courier,
        now_s: float,
    ) -> None:
        """Begin a round.

        Args:
            context: of the round.
            state: that its new orders start from.
            digest: of that state.
            pending: clients that work since earlier rounds.
            known: what the journal holds of this round; nothing of one that has not begun.
            courier: of the run.
            now_s: seconds of the run so far.
        """
        self._context, self._state, self._digest = context, state, digest
        # What a first round prepares it must have of all clients.
        self._settings = context.asynchronous or AsyncSettings(buffer=ALL)
        self.pending = dict(pending)
        self._known, self._asked = known, 0
        self._courier, self._began_s, self._now_s = courier, now_s, now_s
        self._settled = dict[str, tuple[Pending, Outcome]]()
        self._unfit = dict[str, tuple[Client, Failure]]()

    @property
    def _number(self) -> int:
        return int(self._state.round) + 1

    @property
    def _used(self) -> int:
        return sum(isinstance(outcome, AdmittedUpdate) for _, outcome in self._settled.values())

    @property
    def _goal(self) -> int:
        return self._settings.goal(self._context.schedule.min_clients)

    def collect(self) -> None:
        """Give free places to clients, and take answers until the round may end."""
        self._give_up_stale()
        fleet = self._fleet()
        self._ask(fleet, self._places(fleet) - len(self.pending))
        while self._courier.live and self._asked < len(self._known.asks):
            self._ask(fleet, 0)
        if self._courier.live and self._known.used is not None:
            self._settle_as_recorded()
            return
        timed = self._settings.trigger == "time"
        while timed or self._used < self._goal:
            if not self.pending and not self._refill():
                break
            until_s = self._began_s + (self._settings.budget_s or 0.0) if timed and self._used >= self._goal else None
            arrived = self._courier.arrive(self._number, self.pending, until_s)
            if arrived is None:
                self._now_s = max(self._now_s, until_s or 0.0)
                break
            self._now_s = max(self._now_s, arrived.arrives_s)
            self._settle(arrived)
            if timed or self._used < self._goal:
                self._refill()

    def _settle_as_recorded(self) -> None:
        """Settle the clients that the journal names, of a round whose buffer was full when the process ended."""
        for name in sorted({*(self._known.used or ()), *self._known.failures} & self.pending.keys()):
            worker = self.pending[name]
            self._courier.give_up(name)
            if worker.outcome is None:
                raise StoreError(f"round {self._number}: expected an update of {name}, as its buffer says; got none")
            self._settle(worker)

    def _give_up_stale(self) -> None:
        """Settle the clients whose updates would have missed too many versions."""
        most = self._settings.max_staleness
        for name, worker in sorted(self.pending.items()):
            if self._number - worker.round > most:
                missed = self._number - worker.round
                expected = f"an update within {most} versions (asynchronous.max_staleness)"
                got = f"none: its order of round {worker.round} has missed {missed}"
                failure = Failure(name, expected=expected, got=got, kind="late")
                self._courier.give_up(name)
                # What it would have sent never came.
                self._settle(replace(worker, outcome=failure, traffic=Traffic(down=worker.traffic.down), time=None))

    def _settle(self, worker: Pending) -> None:
        assert worker.outcome is not None
        del self.pending[worker.name]
        self._settled[worker.name] = worker, worker.outcome
        self._context.watch(ClientFinished(worker.round, worker.outcome, worker.traffic))

    def _fleet(self) -> Sequence[Client]:
        # Transports list clients in any order, and they are drawn by position.
        known = sorted(self._courier.fleet(self.pending), key=lambda client: client.name)
        clock, number = self._context.clock, self._number
        here = [client for client in known if clock is None or clock.reachable(number, client.name)]
        if not here and not self.pending and clock is not None:
            return reachable(known, number, clock)  # says that none is there
        return here

    def _places(self, fleet: Sequence[Client]) -> int:
        return self._settings.working(len(fleet), self._context.schedule)

    def _refill(self) -> bool:
        """Give free places away as the settings say, and return whether a client was asked."""
        fleet = self._fleet()
        free = self._places(fleet) - len(self.pending)
        if self._settings.send == "after-aggregating":
            # Those that are left at work may be too few to fill the buffer, after others have failed.
            free = min(free, self._goal - self._used - len(self.pending))
        return free > 0 and self._ask(fleet, free)

    def _ask(self, fleet: Sequence[Client], free: int) -> bool:
        """Ask as many clients as there are free places, and return whether there was one.

        None works on two orders, or enters a round twice: an organisation then has one voice for each client, and an
        update that comes a second time is one that nothing waits for.
        """
        ask, recorded = self._next_ask(fleet, free)
        if not ask.clients and self._asked:
            return False
        if not self._asked:
            # Before the first order leaves: who watches may tell clients of the round.
            at_work = sorted({*self.pending, *self._settled, *(client.name for client in ask.clients)})
            started = RoundStarted(self._number, self._context.schedule.count, tuple(at_work), overlaps=True)
            self._context.watch(started)
        plans = self._context.planner.plan(self._context.planner.start(), self._number, ask.clients)
        fit = [client for client in ask.clients if isinstance(plans[client.name], PlannedClient)]
        unfit = {client.name: plans[client.name] for client in ask.clients if client not in fit}
        batch: Sequence[Pending] = ()
        digests: Mapping[str, str] = dict.fromkeys(unfit, UNFIT)
        if fit:
            request = make_request(self._context, self._state, plans, fit, {})
            batch, digests = pending_of(request, fit, self._state, ask.now_s), {**request.digests, **digests}
        if not recorded:
            # Before the first order is sent: after a crash the same bytes must go out.
            self._context.journal.ask(replace(ask, digests=digests), state=self._digest)
        elif digests != ask.digests:
            raise changed_assignments(self._number, ask.digests, digests)
        self._asked += 1
        for client in ask.clients:
            if isinstance(why := unfit.get(client.name), Failure):
                self._unfit[client.name] = client, why
                self._context.watch(ClientFinished(self._number, why, Traffic()))
        self.pending |= {worker.name: worker for worker in self._courier.deliver(self._number, batch, self._known)}
        return bool(ask.clients)

    def _next_ask(self, fleet: Sequence[Client], free: int) -> tuple[Ask, bool]:
        """Return the clients that are asked next, and whether the journal holds that already."""
        if self._asked < len(self._known.asks):
            # Not drawn again: the fleet may have changed since, and the journal holds updates of these.
            return self._known.asks[self._asked], True
        busy = self.pending.keys() | self._settled.keys() | self._unfit.keys()
        idle = [client for client in fleet if client.name not in busy]
        seed, count = self._context.blueprint.seed, max(0, min(free, len(idle)))
        drawn = sample(idle, count, seed=seed, round=self._number, draw=self._asked) if count else ()
        self._now_s = self._courier.now_s(self._now_s)
        return Ask(self._number, self._now_s, tuple(drawn)), False

    def finish(self, began: float) -> RoundResult:
        """Aggregate the buffer and return the round's result; `began`: when it did, of `time.perf_counter`.

        Raises:
            RoundError: if too few updates can be used.
        """
        context, number = self._context, self._number
        request, replies = self._request(), self._replies()
        if self._used < context.schedule.min_clients:
            if self._unfit and not self._settled:
                raise nothing_fits(number, {name: why for name, (_, why) in self._unfit.items()})
            raise too_few(number, context.schedule.min_clients, replies.outcomes, replies)
        if self._settings.trigger == "goal" and self._used < (self._settings.buffer or 0) < ALL:
            context.watch(Note(f"round {number}: {self._used} updates: no other client was there to fill the buffer"))
        norms, outcomes = filter_by_norm(context, request, replies)
        if self._known.used is None:
            failures = {name: why for name, why in replies.outcomes.items() if isinstance(why, Failure)}
            used = [name for name in replies.outcomes if name not in failures]
            context.journal.settle(number, used, failures, {name: replies.traffic[name].up for name in failures})
        aggregated, outcomes, staleness = self._aggregate(request, replies, outcomes, norms)
        times = {name: worker.time for name, (worker, _) in sorted(self._settled.items()) if worker.time is not None}
        clock_s = self._now_s + (context.clock.round_seconds({}) if context.clock else 0.0)
        result = commit(
            context, request, replies, outcomes, norms, aggregated, began=began, times=times, clock_s=clock_s
        )
        return replace(
            result,
            staleness=staleness,
            discounts={name: self._settings.discount(missed) for name, missed in staleness.items() if missed},
            working=tuple(sorted(self.pending)),
        )

    def _aggregate(
        self,
        request: RoundRequest,
        replies: RoundReplies,
        outcomes: Mapping[str, Outcome],
        norms: Mapping[str, float],
    ) -> tuple[Aggregated, Mapping[str, Outcome], Mapping[str, int]]:
        """Return the next state, the outcomes without what it could not take, and the versions that each has missed."""
        updates = []
        for name, outcome in outcomes.items():
            if isinstance(outcome, AdmittedUpdate):
                worker = self._settled[name][0]
                missed = self._number - worker.round
                origin, discount = worker.state if missed else None, self._settings.discount(missed)
                updates.append(replace(outcome, weight=request.weights[name], origin=origin, discount=discount))
        aggregated = aggregate(self._context, request, self._state, updates, norms)
        outcomes = without_refused(self._context, request, replies, outcomes, aggregated.refused)
        used = [name for name, outcome in outcomes.items() if isinstance(outcome, AdmittedUpdate)]
        return aggregated, outcomes, {name: self._number - self._settled[name][0].round for name in used}

    def _request(self) -> RoundRequest:
        """Return the orders that the round has settled as one request, with the weights of its buffer."""
        settled = {name: self._settled[name][0] for name in sorted(self._settled)}
        clients = {
            **{name: worker.client for name, worker in settled.items()},
            **{n: c for n, (c, _) in self._unfit.items()},
        }
        used = [worker.client for name, worker in settled.items() if isinstance(self._settled[name][1], AdmittedUpdate)]
        cap = self._context.schedule.weight_cap
        # Of the buffer's clients: which these are is known only now, and none of them says what it counts.
        weights = public_weights(used, cap)
        if note := cap_note(weights, {client.name: client.num_examples for client in used}, cap):
            self._context.watch(Note(note))
        some = next(iter(settled.values()), None)
        common = some.request if some else make_nothing(self._context, self._number)
        return replace(
            common,
            round=self._number,
            enrolled={name: clients[name].num_examples for name in sorted(clients)},
            planned={name: worker.planned for name, worker in settled.items()},
            assignments={name: worker.assignment for name, worker in settled.items()},
            encoded={name: worker.request.encoded[name] for name, worker in settled.items()},
            weights=weights,
            unfit={name: why for name, (_, why) in self._unfit.items()},
        )

    def _replies(self) -> RoundReplies:
        known: dict[str, Outcome] = {name: outcome for name, (_, outcome) in self._settled.items()}
        known |= {name: why for name, (_, why) in self._unfit.items()}
        # By name, not by arrival: sums of floats depend on their order, and so would the state's digest.
        return RoundReplies(
            outcomes={name: known[name] for name in sorted(known)},
            traffic={name: self._settled[name][0].traffic if name in self._settled else Traffic() for name in known},
            unsolicited=list(self._courier.strays()),
        )


def make_nothing(context: RoundContext, number: int) -> RoundRequest:
    """Return a request of no clients."""
    return RoundRequest(
        round=number,
        enrolled={},
        planned={},
        assignments={},
        encoded={},
        blueprint=context.blueprint,
        refuse=lambda update: "",
        assign_whole=lambda planned: None,
        bound=lambda update, assignment: update,
    )
