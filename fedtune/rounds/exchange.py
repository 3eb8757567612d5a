"""One round's exchange: assignments are sent, updates come back, each is admitted or refused with its reason."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedtune.errors import RoundError, WireError
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    DescendResult,
    Failure,
    Outcome,
    PlannedClient,
    ProbeResult,
    Traffic,
    TrainLora,
    Verb,
    Weight,
)
from fedtune.rounds.admission import admit, largest_update, refuse_other_codes, scalar_bytes_of
from fedtune.rounds.clock import ClientTime, Clock, CompletedWork
from fedtune.rounds.context import RoundContext
from fedtune.rounds.events import ClientFinished, Note
from fedtune.rounds.influence import planned_moves, refuse_outliers
from fedtune.rounds.journal import UNFIT, InterruptedRound
from fedtune.rounds.schedule import enough
from fedtune.rounds.transport import Answer, Reply, UnsolicitedReply
from fedtune.wire.codec import EncodedAssignment, decode_update, encode_assignment


@dataclass(frozen=True)
class RoundRequest:
    """What the clients of a cohort are asked to do in one round."""

    round: int
    enrolled: Mapping[str, int]
    """Examples by client, of the whole cohort."""
    planned: Mapping[str, PlannedClient]
    """By client with a feasible plan, in cohort order, as the two below."""
    assignments: Mapping[str, Assignment]
    encoded: Mapping[str, EncodedAssignment]
    """The assignments as they travel."""
    blueprint: Blueprint
    refuse: Callable[[AdmittedUpdate], str]
    """`Method.refuse` over the state that the round starts from."""
    assign_whole: Callable[[PlannedClient], Assignment | None]
    """`Method.assign_whole` over that state."""
    bound: Callable[[AdmittedUpdate, Assignment], AdmittedUpdate | Failure]
    """`Bounds.bound` over that state."""
    weights: Mapping[str, Weight] = field(default_factory=dict)
    """What each client of the cohort counts."""
    unfit: Mapping[str, Failure] = field(default_factory=dict)
    """The clients without a feasible plan, which are not asked, and why."""

    @property
    def digests(self) -> Mapping[str, str]:
        """The SHA-256 (hex) of each assignment: its header names the digests of its bodies."""
        digests = {name: hashlib.sha256(encoded.header).hexdigest() for name, encoded in self.encoded.items()}
        return {**digests, **dict.fromkeys(self.unfit, UNFIT)}


@dataclass(frozen=True)
class RoundReplies:
    """The outcome of each client of a cohort, in cohort order whatever the arrival."""

    outcomes: Mapping[str, Outcome]
    traffic: Mapping[str, Traffic]
    unsolicited: Sequence[UnsolicitedReply] = ()
    arrived: Mapping[str, float] = field(default_factory=dict)
    """Seconds from the first assignment to each client's reply; none for those that came before a resume."""


class Collector:
    """Waits for the replies of one round.

    A client that does not hold the state that its short assignment refers to says so, and is asked once more, with the
    whole state. Where too few have replied in time, the late ones are waited for again, `attempts` times in all.
    """

    def __init__(self, context: RoundContext, request: RoundRequest) -> None:
        self._context, self._request = context, request
        self._goal = enough(len(request.enrolled), context.schedule)
        self._outcomes = dict[str, Outcome]()
        self._whole = dict[str, EncodedAssignment]()
        """Assignments with the whole state, of the clients that asked for it."""
        # Counted on the encoded bytes, so that reports show what a network would carry and not an estimate.
        self._down = {name: encoded_bytes(encoded) for name, encoded in request.encoded.items()}
        self._up = dict[str, int]()
        self._arrived = dict[str, float]()
        self._unsolicited = list[UnsolicitedReply]()
        self._began = time.perf_counter()

    def collect(self, interrupted: InterruptedRound | None) -> RoundReplies:
        """Return every client's admitted update or failure; what the journal holds already is not asked for again."""
        if interrupted is not None:
            self._restore(interrupted)
        if interrupted is None or interrupted.failures is None:
            # A closed round is not reopened: its outcomes are recorded, and clients may have learned of them.
            for _ in range(self._context.schedule.attempts):
                self._attempt()
                if self._used >= self._context.schedule.min_clients or not any(map(is_late, self._outcomes.values())):
                    break
        return self._replies()

    @property
    def _used(self) -> int:
        return sum(isinstance(outcome, AdmittedUpdate) for outcome in self._outcomes.values())

    def _restore(self, interrupted: InterruptedRound) -> None:
        # Admitted anew from their bytes: the journal stores no verdict that could disagree with the checks.
        for name, update in interrupted.updates.items():
            self._take(Reply(name, update), len(update))
        for name, failure in (interrupted.failures or {}).items():
            if name not in self._request.unfit:
                self._take(failure, interrupted.sizes.get(name, 0))

    def _attempt(self) -> None:
        """Ask every client that has not replied, or was late, and wait for the rule of the schedule to be met."""
        began = time.perf_counter()
        self._outcomes = {name: outcome for name, outcome in self._outcomes.items() if not is_late(outcome)}
        # A client that lacks the state is asked with the whole of it from then on.
        done = self._outcomes.keys() | self._whole.keys()
        self._exchange({name: sent for name, sent in self._request.encoded.items() if name not in done}, began)
        if self._whole and self._used < self._goal:
            self._exchange_whole(began)

    def _exchange_whole(self, began: float) -> None:
        """Send the whole state to the clients that asked for it."""
        whole = {name: sent for name, sent in self._whole.items() if name not in self._outcomes}
        for name, sent in whole.items():
            self._down[name] += encoded_bytes(sent)
        self._exchange(whole, began)

    def _exchange(self, encoded: Mapping[str, EncodedAssignment], began: float) -> None:
        # Updates accepted already count towards the quorum, and time spent towards the deadline.
        rule = self._context.schedule.rule.remaining(self._used, time.perf_counter() - began)
        for reply in self._context.transport.exchange(encoded, rule):
            # A second reply of a client must not replace the first, whose receipt it may have.
            if isinstance(reply, UnsolicitedReply) or reply.client not in encoded or reply.client in self._outcomes:
                self._drop(reply)
                continue
            self._take(reply, len(reply.update) if isinstance(reply, Reply) else 0, new=True)
            if self._used >= self._goal:
                return

    def _drop(self, reply: Answer) -> None:
        if not isinstance(reply, UnsolicitedReply):
            reply = UnsolicitedReply(reply.client, "answered unasked; dropped")
        self._unsolicited.append(reply)
        self._context.watch(Note(f"{reply.client}: {reply.reason}"))

    def _take(self, reply: Reply | Failure, num_bytes: int, *, new: bool = False) -> None:
        """Settle what becomes of one client; `new`: the reply came now, and not before the run was interrupted."""
        name, outcome = reply.client, decode_and_admit(reply, self._request)
        self._up[name] = self._up.get(name, 0) + num_bytes
        if needs_whole_state(outcome):
            failure = self._ask_again(name)
            if failure is None:
                return
            outcome = failure
        self._outcomes[name] = outcome
        # Not on a resume: the time since this process began says nothing of the client.
        if new:
            self._arrived[name] = time.perf_counter() - self._began
        if new and isinstance(reply, Reply) and isinstance(outcome, AdmittedUpdate):
            self._context.journal.accept(self._request.round, name, reply.update)
        # Only after the journal: a client may hear of this, and after a crash its update must still be used.
        traffic = Traffic(down=self._down[name], up=self._up[name])
        self._context.watch(ClientFinished(self._request.round, outcome, traffic))

    def _ask_again(self, name: str) -> Failure | None:
        """Note that a client is to get the whole state; or return why not, if it has had that or there is none."""
        whole = None if name in self._whole else self._request.assign_whole(self._request.planned[name])
        if whole is None:
            return Failure(name, expected="it to work on the whole state", hint="it asked for that again")
        self._whole[name] = encode_assignment(whole)
        return None

    def _replies(self) -> RoundReplies:
        request = self._request
        for failure in request.unfit.values():
            self._context.watch(ClientFinished(request.round, failure, Traffic()))
        known, down, up = {**self._outcomes, **request.unfit}, self._down, self._up
        # In the cohort's order, not that of arrival: sums of floats depend on it, and so would the state's digest.
        return RoundReplies(
            outcomes={name: known.get(name) or self._silence(name) for name in request.enrolled},
            traffic={name: Traffic(down=down.get(name, 0), up=up.get(name, 0)) for name in request.enrolled},
            unsolicited=self._unsolicited,
            arrived=self._arrived,
        )

    def _silence(self, name: str) -> Failure:
        """Return the failure of a client of which nothing came before the round ended."""
        if self._used >= self._goal:
            return Failure(name, got=f"the round had its {self._goal} updates", kind="late")
        return Failure(name, expected="an answer", hint="none came")


def decode_and_admit(reply: Reply | Failure, request: RoundRequest) -> Outcome:
    """Return the update if it can be read and answers its assignment, otherwise why not."""
    if isinstance(reply, Failure):
        return reply
    name, assignment = reply.client, request.assignments[reply.client]
    task, plan = assignment.task, assignment.plan
    pruned, own = isinstance(task, TrainLora) and task.pruning is not None, scalar_bytes_of(task, plan.training)
    # Before a byte is parsed: what a client sends must not decide how much memory the server takes.
    limit = largest_update(
        type(task), rank=plan.rank, scalar_bytes=own, blueprint=request.blueprint, pruned=pruned, ranks=plan.ranks
    )
    try:
        update = decode_update(reply.update, client=name, limit_bytes=limit, task=type(task))
    except WireError as error:
        return Failure.from_text(name, str(error), kind="refused", code="MALFORMED")
    if needs_whole_state(AdmittedUpdate(update)):
        return AdmittedUpdate(update)
    outcome = admit(update, assignment, request.blueprint, num_examples=request.enrolled[name])
    if isinstance(outcome, AdmittedUpdate):
        # What it was sent follows from this too, and what it changes is its difference from that.
        planned = request.planned.get(name)
        outcome = replace(outcome, down_rank=planned.down_rank if planned else None)
    if isinstance(outcome, AdmittedUpdate) and (reason := request.refuse(outcome)):
        return Failure.from_text(name, reason, kind="refused", code="STATE_REBUILT")
    if isinstance(outcome, Failure):
        return outcome
    # Last: what the update changes is known only of one that fits.
    bounded = request.bound(outcome, assignment)
    # What it says of its examples decides nothing: its weight was set before it trained.
    return bounded if isinstance(bounded, Failure) else replace(bounded, weight=request.weights.get(name))


def needs_whole_state(outcome: Outcome) -> bool:
    """Return whether a client asks for the state that its assignment refers to, in place of an update."""
    result = None if isinstance(outcome, Failure) else outcome.update.result
    return isinstance(result, ProbeResult) and result.lost


def is_late(outcome: Outcome) -> bool:
    return isinstance(outcome, Failure) and outcome.kind == "late"


def encoded_bytes(encoded: EncodedAssignment) -> int:
    """Return the bytes of an assignment as it travels, every blob counted for each client."""
    return len(encoded.header) + sum(len(body) for body in encoded.blobs.values())


def completed_work(
    planned: PlannedClient, update: AdmittedUpdate, traffic: Traffic, arrived_s: float | None
) -> CompletedWork:
    """Return what a client did, as a clock reads it: of one that probed in place of descending, its probing."""
    plan, result = planned.plan, update.update.result
    verb: Verb | None = (
        "descend" if isinstance(result, DescendResult) else "probe" if isinstance(result, ProbeResult) else None
    )
    if verb == "probe" and planned.probing is not None:
        plan = replace(plan, training=planned.probing)
    return CompletedWork(plan, update.measured, traffic, arrived_s, planned.down_rank, verb)


def apply_clock(
    context: RoundContext, clock: Clock, request: RoundRequest, replies: RoundReplies, now_s: float
) -> tuple[RoundReplies, Mapping[str, ClientTime]]:
    """Return the replies, those past their deadline by the clock as late failures, and how long each client took."""
    updates = {name: update for name, update in replies.outcomes.items() if isinstance(update, AdmittedUpdate)}
    work = {
        name: completed_work(request.planned[name], update, replies.traffic[name], replies.arrived.get(name))
        for name, update in updates.items()
    }
    late = {
        name: replies.arrived[name]
        for name, outcome in replies.outcomes.items()
        if is_late(outcome) and name in replies.arrived
    }
    times = dict(clock.client_times(request.round, now_s, work, late))
    deadlines = {name: at for name in updates if (at := request.planned[name].deadline_s) is not None}
    overdue = clock.overdue(deadlines, times)
    outcomes = dict(replies.outcomes)
    for name in given_up(overdue, times, wanted=context.schedule.min_clients - (len(updates) - len(overdue))):
        came = f"it would have come after {times[name].seconds:.3g} s"
        failure = Failure(name, expected=f"an update within {overdue[name]:.3g} s", hint=came, kind="late")
        outcomes[name], times[name] = failure, times[name].cut(overdue[name])
        context.watch(ClientFinished(request.round, failure, replies.traffic[name]))
    return replace(replies, outcomes=outcomes), times


def given_up(overdue: Mapping[str, float], times: Mapping[str, ClientTime], *, wanted: int) -> Sequence[str]:
    """Return the overdue clients without the quickest `wanted` ones: for those that `min_clients` needs it waits."""
    # The name decides between equal times: they are frequent in simulations, and a replay must give up the same.
    quickest = sorted(overdue, key=lambda name: (times[name].seconds, name))[: max(0, wanted)]
    return [name for name in overdue if name not in quickest]


def filter_by_norm(
    context: RoundContext, request: RoundRequest, replies: RoundReplies
) -> tuple[Mapping[str, float], Mapping[str, Outcome]]:
    """Return the norms of the changes, and the outcomes without updates far above the others, or over other codes.

    Raises:
        RoundError: if too few updates are left.
    """
    updates = [outcome for outcome in replies.outcomes.values() if isinstance(outcome, AdmittedUpdate)]
    outcomes: Mapping[str, Outcome] = replies.outcomes
    if other := refuse_other_codes(updates):
        outcomes = without_refused(context, request, replies, outcomes, other)
        updates = [outcome for outcome in outcomes.values() if isinstance(outcome, AdmittedUpdate)]
    # After the clock: an update that came too late must not move the median either.
    norms, refused = refuse_outliers(updates, context.schedule.max_norm, planned_moves(request.planned))
    return norms, without_refused(context, request, replies, outcomes, refused)


def without_refused(
    context: RoundContext,
    request: RoundRequest,
    replies: RoundReplies,
    outcomes: Mapping[str, Outcome],
    refused: Sequence[Failure],
) -> Mapping[str, Outcome]:
    """Return the outcomes after the refusal of updates that had been admitted.

    Raises:
        RoundError: if too few updates are left.
    """
    outcomes = {**outcomes, **{failure.client: failure for failure in refused}}
    for failure in refused:
        context.watch(ClientFinished(request.round, failure, replies.traffic[failure.client]))
    used = sum(isinstance(outcome, AdmittedUpdate) for outcome in outcomes.values())
    if used < context.schedule.min_clients:
        raise too_few(request.round, context.schedule.min_clients, outcomes, replies)
    return outcomes


def too_few(round: int, min_clients: int, outcomes: Mapping[str, Outcome], replies: RoundReplies) -> RoundError:
    """Return why a round cannot be completed; final if every client has replied: then none can be asked again."""
    final = not any(isinstance(outcome, Failure) for outcome in replies.outcomes.values())
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
    reasons = "; ".join(f"{failure.client} {failure.kind}: {failure.reason}" for failure in failures[:5])
    more = f"; and {len(failures) - 5} more" if len(failures) > 5 else ""
    advice = "; start another run with other rounds.max_norm or rounds.min_clients" if final else ""
    return RoundError(
        f"round {round}: expected at least {min_clients} usable updates (rounds.min_clients); "
        f"got {len(outcomes) - len(failures)} of {len(outcomes)}: {reasons}{more}{advice}",
        final=final,
    )
