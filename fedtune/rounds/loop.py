"""The one loop: plan, assign, exchange, admit, aggregate, commit, and hand each round's result on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeAlias

from fedtune.errors import RoundError, StoreError, WireError
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    Client,
    Failure,
    LoraResult,
    Outcome,
    PlannedClient,
    ProbeResult,
    Traffic,
    TrainLora,
)
from fedtune.methods import serialization as states
from fedtune.methods.method import Method
from fedtune.planning.planner import ClientObservation, Planner
from fedtune.rounds.admission import admit, admit_norms, largest_update
from fedtune.rounds.clock import ClientTime, Clock, CompletedWork, NullClock
from fedtune.rounds.record import RoundRecord
from fedtune.rounds.schedule import Schedule, enough, sample
from fedtune.rounds.transport import Reply, Transport, UnsolicitedReply
from fedtune.wire.codec import EncodedAssignment, blob_encoder, decode_update, encode_assignment


@dataclass(frozen=True)
class InterruptedRound:
    """A round that had begun when its run was killed, as the ledger holds it."""

    cohort: Mapping[str, int]
    """Clients by name, with the examples they had enrolled."""
    orders: Mapping[str, str]
    """Digest of what each of them was told."""
    updates: Mapping[str, bytes]
    """Updates accepted so far."""
    failures: Mapping[str, Failure] | None = None
    """Why the others are not used; None while the round still waits for them."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes that came from those of them that sent something."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Bytes of main memory of those of them that said so."""


class RoundJournal(Protocol):
    """Makes each step of a round durable before it takes effect, so that a run goes on where it was killed."""

    def opened(self, round: int) -> InterruptedRound | None:
        """Return what is known of a round that had begun already."""
        ...

    def open(
        self,
        round: int,
        *,
        state: str,
        cohort: Mapping[str, int],
        orders: Mapping[str, str],
        memory: Mapping[str, int] | None = None,
    ) -> None:
        """Note the digest of the state, the clients and what they are told; before the first order leaves.

        A client that is told nothing, since nothing fits it, has the order `UNFIT`.
        """
        ...

    def accept(self, round: int, client: str, update: bytes) -> None:
        """Keep an update that will be used."""
        ...

    def close(self, round: int, failures: Mapping[str, Failure], sizes: Mapping[str, int]) -> None:
        """Note that the round waits for nobody any more; before it is aggregated. Sizes: bytes by failed client."""
        ...

    def commit(self, round: int, state: Sequence[bytes | memoryview]) -> str:
        """Keep the state after the round, as `methods.state.encode` makes it, and return its digest."""
        ...


class NullJournal:
    """The ledger that keeps nothing: its runs cannot be resumed."""

    def opened(self, round: int) -> InterruptedRound | None:
        return None

    def open(
        self,
        round: int,
        *,
        state: str,
        cohort: Mapping[str, int],
        orders: Mapping[str, str],
        memory: Mapping[str, int] | None = None,
    ) -> None: ...

    def accept(self, round: int, client: str, update: bytes) -> None: ...

    def close(self, round: int, failures: Mapping[str, Failure], sizes: Mapping[str, int]) -> None: ...

    def commit(self, round: int, state: Sequence[bytes | memoryview]) -> str:
        return states.digest(state)


UNFIT = "unfit"
"""Stands in the ledger for the order of a client that nothing fits."""


@dataclass(frozen=True)
class RoundStarted:
    round: int
    rounds: int
    cohort: tuple[str, ...]


@dataclass(frozen=True)
class ClientFinished:
    round: int
    outcome: Outcome
    traffic: Traffic


@dataclass(frozen=True)
class RoundFinished:
    record: RoundRecord


@dataclass(frozen=True)
class Note:
    """A remark worth a line, such as examples that were dropped."""

    text: str


Event: TypeAlias = RoundStarted | ClientFinished | RoundFinished | Note
Watch: TypeAlias = Callable[[Event], None]


@dataclass(frozen=True)
class RoundResult:
    """What one round came to."""

    round: int
    state: Any
    """The method's state after the round."""
    digest: str
    """SHA-256 (hex) of that state, as `methods.state.encode` makes it."""
    planned: Mapping[str, PlannedClient]
    """By client, in cohort order."""
    assignments: Mapping[str, Assignment]
    """By client, in cohort order; without the blobs, which the state can make again."""
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
    spent: Mapping[str, ClientTime] = field(default_factory=dict)
    """Time by client, simulated or measured, where it is known."""
    clock_s: float = 0.0
    """Simulated or measured seconds of the run so far: a round lasts as long as its slowest client."""

    @property
    def seen(self) -> Sequence[ClientObservation]:
        """What a planner learns from the round."""
        return [self._seen(name) for name in self.outcomes]

    def _seen(self, name: str) -> ClientObservation:
        outcome, assignment, spent = self.outcomes[name], self.assignments.get(name), self.spent.get(name)
        known = ClientObservation(
            client=name,
            num_examples=self.examples[name],
            ratio=assignment.plan.ratio if assignment else 0.0,
            rank=assignment.plan.rank if assignment and isinstance(assignment.task, TrainLora) else 0,
            compute_s=spent.compute_s if spent else None,
            transfer_s=spent.transfer_s if spent else None,
            bytes_down=self.traffic[name].down,
            bytes_up=self.traffic[name].up,
        )
        if isinstance(outcome, Failure):
            return replace(known, status=outcome.kind, out_of_memory=outcome.out_of_memory)
        return replace(
            known,
            loss_before=outcome.measured.loss_before,
            loss_after=outcome.measured.loss_after,
            importance=outcome.measured.importance,
        )


def run(
    *,
    method: Method[Any],
    settings: Any,
    planner: Planner,
    transport: Transport,
    schedule: Schedule,
    blueprint: Blueprint,
    base: str,
    ledger: RoundJournal | None = None,
    start: Any | None = None,
    history: Sequence[Sequence[ClientObservation]] = (),
    clock: Clock | None = None,
    clock_s: float = 0.0,
    watch: Watch = lambda event: None,
) -> Iterator[RoundResult]:
    """Yield the result of one round after the other.

    Args:
        method: what is sent, and how it is combined.
        settings: the method's own.
        planner: what each client is asked to do.
        transport: how messages travel.
        schedule: how many rounds, and who takes part.
        blueprint: of the base model.
        base: digest of the base model, which every client must hold.
        ledger: makes every step durable; none keeps nothing.
        start: state to go on from; the method's first one without it.
        history: of the rounds before it, from which the planner learns again what it knew.
        clock: says how long clients took; none says nothing of it.
        clock_s: what that clock showed after those rounds.
        watch: told when a round starts and when a client is done.

    Raises:
        RoundError: if fewer than `min_clients` updates of a round could be used.
        StoreError: if the ledger cannot be written, or holds a round that began otherwise than it would now.
    """
    state = method.init(blueprint, settings) if start is None else start
    digest = states.digest(states.encode(state))
    ledger, clock = ledger or NullJournal(), clock or NullClock()
    learned = planner.start()
    for past in history:
        learned = planner.observe(learned, past)
    while state.round < schedule.count:
        began, number = time.perf_counter(), state.round + 1
        opened = ledger.opened(number)
        cohort = (
            restore_cohort(opened)
            if opened
            else sample_cohort(transport, schedule, clock, seed=blueprint.seed, round=number)
        )
        watch(RoundStarted(number, schedule.count, tuple(client.name for client in cohort)))
        planned, unfit = split_unfit(number, planner.plan(learned, number, cohort), cohort)
        assignments = {
            name: replace(method.assign(state, blueprint.seed, client), base=base) for name, client in planned.items()
        }
        asked = encode_request(
            number,
            planned,
            assignments,
            cohort,
            blueprint,
            partial(method.refuse, state),
            partial(method.assign_whole, state, blueprint.seed),
            unfit=unfit,
        )
        orders = {**assignment_digests(asked.orders), **dict.fromkeys(unfit, UNFIT)}
        if opened is None:
            memory = {client.name: client.memory_bytes for client in cohort if client.memory_bytes}
            ledger.open(number, state=digest, cohort=asked.enrolled, orders=orders, memory=memory)
        elif opened.orders != orders:
            raise StoreError(changed_assignments(number, opened.orders, orders))
        answers = collect_updates(asked, transport, schedule, opened, ledger, watch)
        answers, spent = apply_clock(answers, asked, schedule, clock, clock_s, watch)
        norms, outcomes = filter_by_norm(answers, asked, schedule, watch)
        if opened is None or opened.failures is None:
            failures = {n: outcome for n, outcome in answers.closing.items() if isinstance(outcome, Failure)}
            ledger.close(number, failures, {name: answers.traffic[name].up for name in failures})
        state = method.aggregate(state, [each for each in outcomes.values() if isinstance(each, AdmittedUpdate)])
        digest = ledger.commit(number, states.encode(state))
        clock_s += clock.lasted(spent)
        result = RoundResult(
            round=number,
            state=state,
            digest=digest,
            planned=planned,
            assignments={name: without_blobs(assignment) for name, assignment in assignments.items()},
            examples=asked.enrolled,
            outcomes={name: without_tensors(outcome) for name, outcome in outcomes.items()},
            norms=norms,
            traffic=answers.traffic,
            unsolicited=answers.unsolicited,
            seconds=time.perf_counter() - began,
            spent=spent,
            clock_s=clock_s,
        )
        learned = planner.observe(learned, result.seen)
        yield result


def without_blobs(assignment: Assignment) -> Assignment:
    match assignment.task:
        case TrainLora() as task:
            return replace(assignment, task=replace(task, blobs={}))
        case _:
            return assignment


def without_tensors(outcome: Outcome) -> Outcome:
    if isinstance(outcome, Failure):
        return outcome
    return replace(outcome, update=replace(outcome.update, result=LoraResult({})))


def split_unfit(
    round: int, planned: Mapping[str, PlannedClient | Failure], cohort: Sequence[Client]
) -> tuple[Mapping[str, PlannedClient], Mapping[str, Failure]]:
    """Return the plans of those that can be asked, and who cannot, both in cohort order.

    Raises:
        RoundError: if nothing fits anybody.
    """
    plans = {client.name: plan for client in cohort if isinstance(plan := planned[client.name], PlannedClient)}
    unfit = {client.name: why for client in cohort if isinstance(why := planned[client.name], Failure)}
    if not plans:
        nearest = "; ".join(f"{name}: {why.reason}" for name, why in list(unfit.items())[:2])
        nearest += f"; and {len(unfit) - 2} more" if len(unfit) > 2 else ""
        raise RoundError(f"round {round}: expected a client that can do something; got none: {nearest}", final=True)
    return plans, unfit


def sample_cohort(transport: Transport, schedule: Schedule, clock: Clock, *, seed: int, round: int) -> Sequence[Client]:
    """Return the cohort of a new round, sorted by name, drawn from the clients that are there.

    Raises:
        RoundError: if none is.
    """
    known = sorted(transport.clients(), key=lambda client: client.name)
    fleet = [client for client in known if clock.reachable(round, client.name)]
    if known and not fleet:
        expected = f"one of {len(known)} clients to be there"
        raise RoundError(f"round {round}: expected {expected}; got none; raise availability of [[device]]", final=True)
    return sample(fleet, schedule.cohort, seed=seed, round=round, over_select=schedule.over_select)


def restore_cohort(opened: InterruptedRound) -> Sequence[Client]:
    """Return the cohort of a round that goes on: who is in it was settled when it began."""
    return [Client(name, examples, opened.memory.get(name, 0)) for name, examples in sorted(opened.cohort.items())]


@dataclass(frozen=True)
class RoundRequest:
    """What a cohort was told in one round."""

    round: int
    planned: Mapping[str, PlannedClient]
    """By client, in cohort order."""
    assignments: Mapping[str, Assignment]
    """What they are asked to do."""
    orders: Mapping[str, EncodedAssignment]
    """The same, as they travel."""
    enrolled: Mapping[str, int]
    """Examples by client."""
    blueprint: Blueprint
    refuse: Callable[[AdmittedUpdate], str]
    """`Method.refuse` over the state that the round starts from."""
    assign_whole: Callable[[PlannedClient], Assignment | None]
    """`Method.assign_whole` over that state."""
    unfit: Mapping[str, Failure] = field(default_factory=dict)
    """Who is not asked, and why."""


def encode_request(
    round: int,
    planned: Mapping[str, PlannedClient],
    assignments: Mapping[str, Assignment],
    cohort: Sequence[Client],
    blueprint: Blueprint,
    refuse: Callable[[AdmittedUpdate], str],
    assign_whole: Callable[[PlannedClient], Assignment | None],
    *,
    unfit: Mapping[str, Failure] | None = None,
) -> RoundRequest:
    """Return a cohort's assignments with what travels; blobs that clients share are encoded once."""
    encode = blob_encoder()
    return RoundRequest(
        round=round,
        planned=planned,
        assignments=assignments,
        orders={name: encode_assignment(assignment, encode=encode) for name, assignment in assignments.items()},
        enrolled={client.name: client.num_examples for client in cohort},
        blueprint=blueprint,
        refuse=refuse,
        assign_whole=assign_whole,
        unfit=unfit or {},
    )


@dataclass(frozen=True)
class RoundReplies:
    """What came of it, in cohort order whatever the arrival."""

    outcomes: Mapping[str, Outcome]
    traffic: Mapping[str, Traffic]
    unsolicited: Sequence[UnsolicitedReply] = ()
    arrived: Mapping[str, float] = field(default_factory=dict)
    """Seconds from the first order to each client's answer."""
    closing: Mapping[str, Outcome] = field(default_factory=dict)
    """The outcomes as the ledger notes them: before a clock gives anybody up, which follows from them."""


def collect_updates(
    asked: RoundRequest,
    transport: Transport,
    schedule: Schedule,
    opened: InterruptedRound | None,
    ledger: RoundJournal,
    watch: Watch,
) -> RoundReplies:
    """Return every client's admitted update or failure; what the ledger held already is not asked for again.

    A client that does not hold what a short order refers to says so, and is asked once more, with the whole. Where too
    few have answered in time, those who have not are waited for again, `attempts` times in all.
    """
    rule, outcomes, unsolicited = schedule.rule, dict[str, Outcome](), list[UnsolicitedReply]()
    goal = enough(len(asked.enrolled), schedule)
    sizes, sent = dict[str, int](), {name: encoded_bytes(order) for name, order in asked.orders.items()}
    lost, first, arrived = dict[str, Assignment](), time.perf_counter(), dict[str, float]()

    def used() -> int:
        return sum(isinstance(outcome, AdmittedUpdate) for outcome in outcomes.values())

    def take(answer: Reply | Failure, num_bytes: int = 0, *, new: bool = False) -> None:
        name, outcome = answer.client, decode_and_admit(answer, asked)
        sizes[name] = sizes.get(name, 0) + (len(answer.update) if isinstance(answer, Reply) else num_bytes)
        if needs_whole_state(outcome):
            if name not in lost and (whole := asked.assign_whole(asked.planned[name])) is not None:
                lost[name] = whole
                return
            outcome = Failure(name, expected="it to work on the whole state", hint="it asked for that again")
        outcomes[name] = outcome
        if new:  # when the others came stands nowhere
            arrived[name] = time.perf_counter() - first
        if new and isinstance(answer, Reply) and isinstance(outcome, AdmittedUpdate):
            ledger.accept(asked.round, name, answer.update)
        # After that: whoever tells the client that its update is used must not have to take it back.
        watch(ClientFinished(asked.round, outcome, Traffic(down=sent[name], up=sizes[name])))

    def exchanged(orders: Mapping[str, EncodedAssignment], began: float) -> None:
        # Who has been accepted already counts towards the quorum.
        gone, quorum = time.perf_counter() - began, max(0, rule.quorum - used())
        left = None if rule.deadline_s is None else max(0.0, rule.deadline_s - gone)
        for answer in transport.exchange(orders, replace(rule, quorum=quorum, deadline_s=left)):
            if isinstance(answer, UnsolicitedReply) or answer.client not in orders or answer.client in outcomes:
                dropped = UnsolicitedReply(answer.client, "answered unasked; dropped")
                stray = answer if isinstance(answer, UnsolicitedReply) else dropped
                unsolicited.append(stray)
                watch(Note(f"{stray.client}: {stray.reason}"))
                continue
            take(answer, new=True)
            if used() >= goal:
                return

    if opened is not None:
        for name, update in opened.updates.items():
            take(Reply(name, update))
        for name, failure in (opened.failures or {}).items():
            if name not in asked.unfit:
                take(failure, opened.sizes.get(name, 0))
    if opened is None or opened.failures is None:
        for _ in range(schedule.attempts):
            began = time.perf_counter()
            for name in [name for name, outcome in outcomes.items() if is_late(outcome)]:
                del outcomes[name]
            # Whoever has lost the state is asked with the whole of it from then on.
            short = asked.orders.keys() - outcomes.keys() - set(lost)
            exchanged({name: order for name, order in asked.orders.items() if name in short}, began)
            if lost and used() < goal:
                whole = {name: encode_assignment(order) for name, order in lost.items() if name not in outcomes}
                sent |= {name: sent[name] + encoded_bytes(order) for name, order in whole.items()}
                exchanged(whole, began)
            if used() >= schedule.min_clients or not any(map(is_late, outcomes.values())):
                break
    missing = [name for name in asked.orders if name not in outcomes]
    why = Failure("", expected="an answer", hint="none came")
    if used() >= goal:
        why = Failure("", got=f"the round had its {goal} updates", kind="late")
    silent = {name: replace(why, client=name) for name in missing}
    for failure in asked.unfit.values():
        watch(ClientFinished(asked.round, failure, Traffic()))
    found = {name: {**outcomes, **silent, **asked.unfit}[name] for name in asked.enrolled}
    return RoundReplies(
        outcomes=found,
        traffic={name: Traffic(down=sent.get(name, 0), up=sizes.get(name, 0)) for name in asked.enrolled},
        unsolicited=unsolicited,
        arrived=arrived,
        closing=found,
    )


def apply_clock(
    answers: RoundReplies, asked: RoundRequest, schedule: Schedule, clock: Clock, now_s: float, watch: Watch
) -> tuple[RoundReplies, Mapping[str, ClientTime]]:
    """Return the answers, without those that the clock gave up, and how long each client took.

    Nobody is given up whom `min_clients` needs, the quickest of the late ones first: the round waits for them.
    """
    updates = {name: each for name, each in answers.outcomes.items() if isinstance(each, AdmittedUpdate)}
    deadlines = {name: asked.planned[name].deadline_s for name in updates}
    done = {
        name: CompletedWork(asked.planned[name].plan, each.measured, answers.traffic[name], answers.arrived.get(name))
        for name, each in updates.items()
    }
    missed = {
        name: answers.arrived[name]
        for name, outcome in answers.outcomes.items()
        if is_late(outcome) and name in answers.arrived
    }
    spent = dict(clock.timed(asked.round, now_s, done, missed))
    outcomes = dict(answers.outcomes)
    cut = clock.cut({name: at for name, at in deadlines.items() if at is not None}, spent)
    needed = max(0, schedule.min_clients - (len(updates) - len(cut)))
    waited = sorted(cut, key=lambda name: (spent[name].seconds, name))[:needed]
    for name, bound in cut.items():
        if name in waited:
            continue
        expected, came = f"an update within {bound:.3g} s", f"it would have come after {spent[name].seconds:.3g} s"
        outcomes[name] = failure = Failure(name, expected=expected, hint=came, kind="late")
        spent[name] = ClientTime.given_up(bound)
        watch(ClientFinished(asked.round, failure, answers.traffic[name]))
    return replace(answers, outcomes=outcomes), spent


def filter_by_norm(
    answers: RoundReplies, asked: RoundRequest, schedule: Schedule, watch: Watch
) -> tuple[Mapping[str, float], Mapping[str, Outcome]]:
    """Return the norms of the changes, and the outcomes after updates far above the others are refused.

    Raises:
        RoundError: if too few updates are left.
    """
    updates = [outcome for outcome in answers.outcomes.values() if isinstance(outcome, AdmittedUpdate)]
    norms, refused = admit_norms(updates, schedule.max_norm, assignments=asked.assignments)
    outcomes = {**answers.outcomes, **{failure.client: failure for failure in refused}}
    for failure in refused:
        watch(ClientFinished(asked.round, failure, answers.traffic[failure.client]))
    if len(updates) - len(refused) < schedule.min_clients:
        hopeless = not any(isinstance(outcome, Failure) for outcome in answers.outcomes.values())
        raise RoundError(too_few(asked.round, schedule.min_clients, outcomes, hopeless=hopeless), final=hopeless)
    return norms, outcomes


def decode_and_admit(answer: Reply | Failure, asked: RoundRequest) -> Outcome:
    """Return the update if it can be read and answers its assignment, otherwise why not."""
    if isinstance(answer, Failure):
        return answer
    name, assignment = answer.client, asked.assignments[answer.client]
    task, plan = assignment.task, assignment.plan
    limit = largest_update(
        type(task),
        rank=plan.rank,
        steps=plan.training.steps or 0,
        blueprint=asked.blueprint,
        pruned=isinstance(task, TrainLora) and task.pruning is not None,
    )
    try:
        update = decode_update(answer.update, client=name, limit_bytes=limit, task=type(task))
    except WireError as error:
        return Failure.from_text(name, str(error), kind="refused", code="MALFORMED")
    if isinstance(update.result, ProbeResult) and update.result.lost:
        return AdmittedUpdate(update)
    outcome = admit(update, assignment, asked.blueprint, num_examples=asked.enrolled[name])
    if isinstance(outcome, AdmittedUpdate) and (reason := asked.refuse(outcome)):
        return Failure.from_text(name, reason, kind="refused", code="STATE_REBUILT")
    return outcome


def is_late(outcome: Outcome) -> bool:
    return isinstance(outcome, Failure) and outcome.kind == "late"


def needs_whole_state(outcome: Outcome) -> bool:
    """Return whether a client asks for the state that its assignment refers to."""
    if isinstance(outcome, Failure):
        return False
    return isinstance(outcome.update.result, ProbeResult) and outcome.update.result.lost


def encoded_bytes(order: EncodedAssignment) -> int:
    """Return the bytes of an order as it travels, every blob counted for each client."""
    return len(order.header) + sum(len(body) for body in order.blobs.values())


def assignment_digests(orders: Mapping[str, EncodedAssignment]) -> Mapping[str, str]:
    """Return the SHA-256 (hex) of each order; its header names the digests of its bodies."""
    return {name: hashlib.sha256(order.header).hexdigest() for name, order in orders.items()}


def changed_assignments(round: int, noted: Mapping[str, str], now: Mapping[str, str]) -> str:
    name = next(name for name in sorted(noted.keys() | now.keys()) if noted.get(name) != now.get(name))
    return (
        f"round {round}: expected to tell {name} what the journal notes (digest {noted.get(name, 'none')[:12]}); "
        f"got {now.get(name, 'none')[:12]}; resume with the versions the run was started with"
    )


def too_few(round: int, wanted: int, outcomes: Mapping[str, Outcome], *, hopeless: bool) -> str:
    """Return why a round cannot be completed; hopeless: everybody has answered, so nobody can be asked again."""
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
    reasons = "; ".join(f"{failure.client} {failure.kind}: {failure.reason}" for failure in failures[:5])
    more = f"; and {len(failures) - 5} more" if len(failures) > 5 else ""
    advice = "; start another run with other rounds.max_norm or rounds.min_clients" if hopeless else ""
    return (
        f"round {round}: expected at least {wanted} usable updates (rounds.min_clients); "
        f"got {len(outcomes) - len(failures)} of {len(outcomes)}: {reasons}{more}{advice}"
    )
