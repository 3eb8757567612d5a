"""The round loop: plan, assign, exchange, admit, aggregate, commit, and hand each round's result on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

from fedtune.errors import RoundError, StoreError
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Client,
    DescendResult,
    Failure,
    LoraResult,
    Outcome,
    PlannedClient,
    ProbeResult,
    Traffic,
    TrainLora,
    Weight,
)
from fedtune.methods import serialization as states
from fedtune.planning.planner import ClientObservation
from fedtune.rounds.aggregation import Aggregated, aggregate
from fedtune.rounds.clock import ClientTime, Clock
from fedtune.rounds.context import RoundContext
from fedtune.rounds.events import Note, RoundStarted
from fedtune.rounds.exchange import (
    Collector,
    RoundReplies,
    RoundRequest,
    apply_clock,
    filter_by_norm,
    without_refused,
)
from fedtune.rounds.influence import Bounds
from fedtune.rounds.journal import InterruptedRound, RoundJournal
from fedtune.rounds.probe import with_probes
from fedtune.rounds.schedule import rate_share, sample, with_scheduled_rate
from fedtune.rounds.transport import UnsolicitedReply
from fedtune.rounds.weights import cap_note, counted_examples, public_weights
from fedtune.wire.codec import blob_encoder, encode_assignment

Observations: TypeAlias = Sequence[ClientObservation]
"""What a planner learns from one round."""
Plans: TypeAlias = Mapping[str, PlannedClient | Failure]
"""What a planner asks of each client of a round, or why nothing fits it."""
NO_TIMES: Mapping[str, ClientTime] = {}


@dataclass(frozen=True)
class RoundResult:
    """The state after one round, and the outcome of each of its clients."""

    round: int
    state: Any
    """The method's state after the round."""
    digest: str
    """SHA-256 (hex) of that state, as `methods.serialization.encode` makes it."""
    planned: Mapping[str, PlannedClient]
    """By client with a feasible plan, in cohort order."""
    assignments: Mapping[str, Assignment]
    """By the same clients; without the blobs, which the state can make again."""
    examples: Mapping[str, int]
    """Training examples by client, as enrolled."""
    outcomes: Mapping[str, Outcome]
    """By client, in cohort order: an admitted update (without its tensors), or a failure."""
    norms: Mapping[str, float]
    """Frobenius norm of each admitted change."""
    traffic: Mapping[str, Traffic]
    unsolicited: Sequence[UnsolicitedReply]
    """What came during the round that it did not wait for."""
    seconds: float
    times: Mapping[str, ClientTime] = field(default_factory=dict)
    """Time by client, simulated or measured, where it is known."""
    clock_s: float = 0.0
    """Simulated or measured seconds of the run so far: a round lasts as long as its slowest client."""
    probes: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Seconds per 1e12 operations and per megabyte, by the clients that have measured them for this round."""
    counted: Mapping[str, float] = field(default_factory=dict)
    """As how many examples they count, by the clients that `rounds.weight_cap` makes count less."""
    rate_share: float = 1.0
    """Its learning rate as a share of `client.learning_rate`, by `rounds.schedule`."""
    staleness: Mapping[str, int] = field(default_factory=dict)
    """Of an asynchronous round: by client of the buffer, the versions that its update has missed."""
    discounts: Mapping[str, float] = field(default_factory=dict)
    """Of the same, the factor on the change of those that have missed any."""
    working: Sequence[str] = ()
    """Clients that were still at work when an asynchronous round ended."""

    @property
    def observations(self) -> Observations:
        """What a planner learns from the round."""
        return [self._observation(name) for name in self.outcomes]

    def _observation(self, name: str) -> ClientObservation:
        outcome, assignment, spent = self.outcomes[name], self.assignments.get(name), self.times.get(name)
        observation = ClientObservation(
            client=name,
            num_examples=self.examples[name],
            ratio=assignment.plan.ratio if assignment else 0.0,
            rank=assignment.plan.rank if assignment and isinstance(assignment.task, TrainLora) else 0,
            compute_s=spent.compute_s if spent else None,
            transfer_s=spent.transfer_s if spent else None,
            bytes_down=self.traffic[name].down,
            bytes_up=self.traffic[name].up,
            steps=steps_done(assignment, outcome) if assignment else None,
            **probe_fields(self.probes.get(name)),
        )
        if name in self.planned:
            observation = replace(observation, **arm_of(self.planned[name]))
        if isinstance(outcome, Failure):
            return replace(observation, status=outcome.kind, out_of_memory=outcome.out_of_memory)
        m = outcome.measured
        return replace(
            observation,
            loss_before=m.loss_before,
            loss_after=m.loss_after,
            importance=m.importance,
            whole_loss_before=m.whole_loss_before,
            whole_loss_after=m.whole_loss_after,
            peak_bytes=m.peak_bytes,
            module_importance=m.module_importance,
        )


def arm_of(planned: PlannedClient) -> Mapping[str, Any]:
    """Return what was planned for a client beside its rank, ratio and steps; see `record.ARM_FIELDS`."""
    plan = planned.plan
    return {
        "top": planned.top,
        "share": planned.share,
        "down_rank": planned.down_rank,
        # The share says it in a word: a list for every client and round would be most of a run's lines.
        "ranks": plan.ranks if planned.top == 1.0 else (),
        "back": plan.back,
        "base_dtype": plan.base_dtype,
        "view": plan.view,
        "batch": planned.batch,
        "arm": planned.arm,
        "arm_probability": planned.arm_probability,
    }


def steps_done(order: Assignment, outcome: Outcome) -> int | None:
    """Return the steps of an order: those of measuring, where a client has measured seeds in place of descending."""
    instead = order.probed_instead()
    measured = isinstance(outcome, AdmittedUpdate) and isinstance(outcome.update.result, ProbeResult)
    return (instead if instead and measured else order).plan.training.steps


def probe_fields(probe: tuple[float | None, float | None] | None) -> Mapping[str, Any]:
    """Return what a client has measured of its speed, by the fields of its record and of what a planner observes."""
    return {} if probe is None else dict(zip(("probed_s_per_tflop", "probed_s_per_mb"), probe, strict=True))


def has_probe(client: Client) -> bool:
    return (client.s_per_tflop, client.s_per_mb) != (None, None)


def run(
    context: RoundContext, *, start: Any | None = None, history: Sequence[Observations] = (), clock_s: float = 0.0
) -> Iterator[RoundResult]:
    """Yield the result of one round after the other.

    Args:
        context: what the rounds have in common.
        start: state to go on from; the method's first one without it.
        history: of the rounds before it, from which the planner learns again what it knew.
        clock_s: what the context's clock showed after those rounds.

    Raises:
        RoundError: if fewer than `min_clients` updates of a round could be used.
        StoreError: if the journal cannot be written, or holds a round that began otherwise than it would now.
    """
    journal, count = context.journal, context.schedule.count
    state = context.method.init(context.blueprint, context.settings) if start is None else start
    digest = states.digest(states.encode(state))
    learned = context.planner.start()
    for number, past in enumerate(history, 1):
        # A planner learns nothing of how clients train from a round in which none does.
        if context.at(number) is context:
            learned = context.planner.observe(learned, past)
    while state.round < count:
        # The journal decides, not a flag: a run that was killed goes on in the round where it was.
        began, interrupted = time.perf_counter(), journal.interrupted_round(state.round + 1)
        now = context.at(state.round + 1)
        cohort, plans, probing_s = planned_cohort(now, learned, state.round + 1, interrupted, clock_s)
        clock_s += probing_s
        context.watch(RoundStarted(state.round + 1, count, tuple(client.name for client in cohort)))
        request = make_request(now, state, plans, cohort, weights_of(now, cohort, interrupted))
        # Before the first assignment is sent: after a crash the same bytes must go out, or updates that were accepted
        # would answer an assignment that was never recorded.
        open_round(journal, request, cohort, digest, interrupted)
        replies = Collector(now, request).collect(interrupted)
        on_time, times = replies, NO_TIMES
        if context.clock is not None:
            on_time, times = apply_clock(now, context.clock, request, replies, clock_s)
            clock_s += context.clock.round_seconds(times)
        norms, outcomes = filter_by_norm(now, request, on_time)
        if interrupted is None or interrupted.failures is None:
            # As they were before the clock and the norms, which follow from them.
            failures = {name: why for name, why in replies.outcomes.items() if isinstance(why, Failure)}
            journal.close(request.round, failures, {name: replies.traffic[name].up for name in failures})
        # In cohort order, which `replies` keeps: sums of floats in order of arrival would differ from run to run.
        updates = [update for update in outcomes.values() if isinstance(update, AdmittedUpdate)]
        aggregated = aggregate(now, request, state, updates, norms)
        outcomes = without_refused(now, request, replies, outcomes, aggregated.refused)
        result = commit(now, request, replies, outcomes, norms, aggregated, began=began, times=times, clock_s=clock_s)
        result = replace(result, probes={c.name: (c.s_per_tflop, c.s_per_mb) for c in cohort if has_probe(c)})
        state, digest = result.state, result.digest
        if now is context:
            learned = context.planner.observe(learned, result.observations)
        yield result


def commit(
    context: RoundContext,
    request: RoundRequest,
    replies: RoundReplies,
    outcomes: Mapping[str, Outcome],
    norms: Mapping[str, float],
    aggregated: Aggregated,
    *,
    began: float,
    times: Mapping[str, ClientTime],
    clock_s: float,
) -> RoundResult:
    """Make the state after a round durable, and return the round's result.

    Args:
        context: of the round.
        request: what its clients were asked.
        replies: what they sent.
        outcomes: what became of that.
        norms: of the updates' changes.
        aggregated: the next state.
        began: when the round did, of `time.perf_counter`.
        times: by client, where they are known.
        clock_s: seconds of the run after the round.
    """
    # Durable before the result is handed on: what a caller has seen must survive a crash.
    digest = context.journal.commit(request.round, aggregated.encoded)
    for remark in context.method.remarks(aggregated.state):
        context.watch(Note(f"round {request.round}: {remark}"))
    return RoundResult(
        round=request.round,
        state=aggregated.state,
        digest=digest,
        planned=request.planned,
        assignments={name: without_blobs(assignment) for name, assignment in request.assignments.items()},
        examples=request.enrolled,
        counted=counted_examples(request.weights, request.enrolled),
        outcomes={name: without_tensors(outcome) for name, outcome in outcomes.items()},
        norms={name: size for name, size in norms.items() if isinstance(outcomes[name], AdmittedUpdate)},
        traffic=replies.traffic,
        unsolicited=replies.unsolicited,
        seconds=time.perf_counter() - began,
        times=times,
        clock_s=clock_s,
        rate_share=rate_share(context.schedule, request.round),
    )


def planned_cohort(
    context: RoundContext, learned: Any, round: int, interrupted: InterruptedRound | None, now_s: float
) -> tuple[Sequence[Client], Plans, float]:
    """Return the clients of a round, sorted by name, their plans, and the seconds in which they measured their speed.

    They are drawn from those that are there, or as recorded. Where no plan fits any of them, others are drawn beside
    them until one does.

    Raises:
        RoundError: if no client is there, or none of them has a feasible plan.
    """
    if interrupted is not None:
        cohort, spent = recorded_cohort(interrupted), 0.0
        if context.prober is not None and context.prober.repeatable:
            cohort, spent = with_probes(context.prober, round, now_s, cohort)
        return cohort, context.planner.plan(learned, round, cohort), spent
    # Transports list clients in any order, and a cohort is drawn by position.
    known = sorted(context.transport.clients(), key=lambda client: client.name)
    fleet = known if context.clock is None else reachable(known, round, context.clock)
    schedule, seed = context.schedule, context.blueprint.seed
    cohort = sample(fleet, schedule.cohort, seed=seed, round=round, over_select=schedule.over_select)
    number, spent = len(cohort), 0.0
    cohort, probing_s = with_probes(context.prober, round, now_s, cohort)
    while True:
        spent = max(spent, probing_s)
        # Planned as a whole after every draw, as a resumed round plans them: plans depend on the whole cohort.
        plans = context.planner.plan(learned, round, cohort)
        asked = {client.name for client in cohort}
        others = [client for client in fleet if client.name not in asked]
        if not others or any(isinstance(plan, PlannedClient) for plan in plans.values()):
            return cohort, plans, spent
        more = sample(others, min(number, len(others)), seed=seed, round=round)
        more, probing_s = with_probes(context.prober, round, now_s, more)
        cohort = sorted([*cohort, *more], key=lambda client: client.name)


def recorded_cohort(interrupted: InterruptedRound) -> Sequence[Client]:
    memory, probes = interrupted.memory, interrupted.probes
    # Not drawn again: the fleet may have changed since, and updates of the old cohort are in the journal.
    return [
        Client(name, examples, memory.get(name, 0), "", *probes.get(name, (None, None)))
        for name, examples in sorted(interrupted.cohort.items())
    ]


def reachable(clients: Sequence[Client], round: int, clock: Clock) -> Sequence[Client]:
    """Return the clients that can be asked in a round.

    Raises:
        RoundError: if none can.
    """
    fleet = [client for client in clients if clock.reachable(round, client.name)]
    if clients and not fleet:
        expected = f"one of {len(clients)} clients to be there"
        raise RoundError(f"round {round}: expected {expected}; got none; raise availability of [[device]]", final=True)
    return fleet


def weights_of(
    context: RoundContext, cohort: Sequence[Client], interrupted: InterruptedRound | None
) -> Mapping[str, Weight]:
    """Return what each client of a round counts: from what they have enrolled, or as recorded when it began."""
    if interrupted is not None:
        # Not computed again: the roster or the cap may have changed since, and clients have been promised these.
        return {client.name: interrupted.weights.get(client.name) or plain_weight(client) for client in cohort}
    cap = context.schedule.weight_cap
    weights = public_weights(cohort, cap)
    if note := cap_note(weights, {client.name: client.num_examples for client in cohort}, cap):
        context.watch(Note(note))
    return weights


def plain_weight(client: Client) -> Weight:
    return Weight(client.num_examples, 1)


def make_request(
    context: RoundContext, state: Any, plans: Plans, cohort: Sequence[Client], weights: Mapping[str, Weight]
) -> RoundRequest:
    """Return what a cohort is asked to do in the coming round; blobs that clients share are encoded once.

    Raises:
        RoundError: if no client has a feasible plan.
    """
    method, seed, round = context.method, context.blueprint.seed, state.round + 1
    planned, unfit = split_unfit(round, plans, cohort)
    # The base's digest and the round's rate are added here, so that no method and no planner can forget them.
    rated = partial(with_scheduled_rate, schedule=context.schedule)
    assignments = {
        name: replace(
            rated(method.assign(state, seed, client)), base=context.base, labels=context.labels, date=context.date
        )
        for name, client in planned.items()
    }
    # One encoder for the cohort: a state of gigabytes is serialised and hashed once, not once per client.
    encode = blob_encoder()
    return RoundRequest(
        round=round,
        enrolled={client.name: client.num_examples for client in cohort},
        planned=planned,
        assignments=assignments,
        encoded={name: encode_assignment(assignment, encode=encode) for name, assignment in assignments.items()},
        blueprint=context.blueprint,
        refuse=partial(method.refuse, state),
        assign_whole=partial(whole_assignment, context, state),
        weights=weights,
        bound=Bounds(method, state, context.blueprint, context.schedule.norm_cap).bound,
        unfit=unfit,
    )


def whole_assignment(context: RoundContext, state: Any, planned: PlannedClient) -> Assignment | None:
    """Return an assignment that refers to no earlier state, as `make_request` does; None if there is no other."""
    whole = context.method.assign_whole(state, context.blueprint.seed, planned)
    if whole is None:
        return None
    return replace(with_scheduled_rate(whole, context.schedule), labels=context.labels, date=context.date)


def split_unfit(
    round: int, planned: Plans, cohort: Sequence[Client]
) -> tuple[Mapping[str, PlannedClient], Mapping[str, Failure]]:
    """Return the clients with a feasible plan, and why the others have none, both in cohort order.

    Raises:
        RoundError: if no client has one.
    """
    # By the cohort's order, whatever order the planner returned: assignments and digests follow it.
    feasible = {c.name: plan for c in cohort if isinstance(plan := planned[c.name], PlannedClient)}
    unfit = {c.name: why for c in cohort if isinstance(why := planned[c.name], Failure)}
    if not feasible:
        raise nothing_fits(round, unfit)
    return feasible, unfit


def nothing_fits(round: int, unfit: Mapping[str, Failure]) -> RoundError:
    nearest = "; ".join(f"{name}: {why.reason}" for name, why in list(unfit.items())[:2])
    nearest += f"; and {len(unfit) - 2} more" if len(unfit) > 2 else ""
    return RoundError(f"round {round}: expected a client that can do something; got none: {nearest}", final=True)


def open_round(
    journal: RoundJournal, request: RoundRequest, cohort: Sequence[Client], state: str, earlier: InterruptedRound | None
) -> None:
    """Record the beginning of a round before its first assignment is sent, or hold it against what is recorded.

    Raises:
        StoreError: if an assignment is not the recorded one.
    """
    digests = request.digests
    if earlier is None:
        memory = {client.name: client.memory_bytes for client in cohort if client.memory_bytes}
        plain = {client.name: plain_weight(client) for client in cohort}
        weights = {name: weight for name, weight in request.weights.items() if weight != plain[name]}
        probes = {c.name: (c.s_per_tflop, c.s_per_mb) for c in cohort if has_probe(c)}
        journal.open(
            request.round,
            state=state,
            cohort=request.enrolled,
            digests=digests,
            memory=memory,
            weights=weights,
            probes=probes,
        )
    elif earlier.digests != digests:
        raise changed_assignments(request.round, earlier.digests, digests)


def changed_assignments(round: int, recorded: Mapping[str, str], now: Mapping[str, str]) -> StoreError:
    name = next(name for name in sorted(recorded.keys() | now.keys()) if recorded.get(name) != now.get(name))
    return StoreError(
        f"round {round}: expected to send {name} what the journal notes (digest {recorded.get(name, 'none')[:12]}); "
        f"got {now.get(name, 'none')[:12]}; resume with the versions the run was started with"
    )


def without_blobs(assignment: Assignment) -> Assignment:
    # A result that is kept for a report must not keep a cohort's tensors in memory.
    if isinstance(assignment.task, TrainLora):
        return replace(assignment, task=replace(assignment.task, blobs={}))
    return assignment


def without_tensors(outcome: Outcome) -> Outcome:
    if isinstance(outcome, Failure):
        return outcome
    result = outcome.update.result
    # What kind it is says what the client did. A copy, or the empty part would hold all that came.
    match result:
        case ProbeResult():
            few: Any = replace(result, scalars=result.scalars[:0].copy())
        case DescendResult():
            few = replace(result, numbers=result.numbers[:0].copy())
        case LoraResult():
            few = LoraResult({}, personal=result.personal)
        case _:
            few = LoraResult({})
    return replace(outcome, update=replace(outcome.update, result=few), origin=None)
