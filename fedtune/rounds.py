"""The one loop: plan, assign, exchange, admit, aggregate, and hand each round's result on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Annotated, Any, Protocol, TypeAlias

from annotated_types import Ge, Gt

from fedtune.admit import admit, admit_norms
from fedtune.errors import RoundError
from fedtune.methods.method import Method
from fedtune.planning import Planner
from fedtune.round import Assignment, Blueprint, Client, ClientUpdate, Failure, Outcome, Traffic
from fedtune.seeds import derive, generator


@dataclass(frozen=True)
class Schedule:
    """How many rounds, and who takes part; the recipe's table `rounds`."""

    count: Annotated[int, Ge(1)]
    cohort: Annotated[int, Ge(1)] | Annotated[float, Gt(0)] | None = None
    """Clients per round: a whole number of them, or a share of the fleet in (0, 1]; none takes all."""
    min_clients: Annotated[int, Ge(1)] = 1
    """Admitted updates without which a round cannot be completed."""
    max_norm: Annotated[float, Gt(0)] | None = 10.0
    """An update whose change has more than so many times the cohort's median norm is refused; none takes any."""


class Transport(Protocol):
    """How messages travel: the one seam between the loop and the clients."""

    def clients(self) -> Sequence[Client]:
        """Return the fleet."""
        ...

    def exchange(self, assignments: Mapping[str, Assignment]) -> Iterable[tuple[Outcome, Traffic]]:
        """Deliver the assignments and yield one outcome per client, in any order."""
        ...


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
    record: Mapping[str, Any]
    """The round's line of rounds.jsonl."""


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
    assignments: Mapping[str, Assignment]
    """By client, in cohort order; without the blobs, which the state can make again."""
    outcomes: Mapping[str, Outcome]
    """By client, in cohort order: an admitted update (without its tensors), or a failure."""
    norms: Mapping[str, float]
    """Frobenius norm of each admitted change."""
    traffic: Mapping[str, Traffic]
    seconds: float


def run(
    *,
    method: Method[Any],
    settings: Any,
    planner: Planner,
    transport: Transport,
    schedule: Schedule,
    blueprint: Blueprint,
    base: str,
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
        watch: told when a round starts and when a client is done.

    Raises:
        RoundError: if fewer than `min_clients` updates of a round could be used.
    """
    state = method.init(blueprint, settings)
    fleet = sorted(transport.clients(), key=lambda client: client.name)
    for number in range(1, schedule.count + 1):
        began = time.perf_counter()
        cohort = sample(fleet, schedule.cohort, seed=blueprint.seed, round=number)
        watch(RoundStarted(number, schedule.count, tuple(client.name for client in cohort)))
        plans = planner.plan(number, cohort)
        assignments = {
            client.name: replace(method.assign(state, blueprint.seed, plans[client.name]), base=base)
            for client in cohort
        }
        enrolled = {client.name: client.num_examples for client in cohort}
        outcomes, traffic = collect(transport, assignments, enrolled, blueprint, watch)
        updates = [outcome for outcome in outcomes.values() if isinstance(outcome, ClientUpdate)]
        norms, refused = admit_norms(updates, schedule.max_norm, assignments=assignments)
        for failure in refused:
            outcomes[failure.client] = failure
            watch(ClientFinished(number, failure, traffic[failure.client]))
        admitted = [outcome for outcome in outcomes.values() if isinstance(outcome, ClientUpdate)]
        if len(admitted) < schedule.min_clients:
            raise RoundError(too_few(number, schedule.min_clients, outcomes))
        state = method.aggregate(state, admitted)
        yield RoundResult(
            round=number,
            state=state,
            assignments={name: replace(assignment, blobs={}) for name, assignment in assignments.items()},
            outcomes={
                name: replace(outcome, tensors={}, saved={}) if isinstance(outcome, ClientUpdate) else outcome
                for name, outcome in outcomes.items()
            },
            norms=norms,
            traffic=traffic,
            seconds=time.perf_counter() - began,
        )


def collect(
    transport: Transport,
    assignments: Mapping[str, Assignment],
    enrolled: Mapping[str, int],
    blueprint: Blueprint,
    watch: Watch,
) -> tuple[dict[str, Outcome], dict[str, Traffic]]:
    """Return every client's admitted update or failure, and its traffic, in cohort order whatever the arrival."""
    arrived: dict[str, Outcome] = {}
    traffic: dict[str, Traffic] = {}
    for outcome, sizes in transport.exchange(assignments):
        name = outcome.client
        if isinstance(outcome, ClientUpdate):
            outcome = admit(outcome, assignments[name], blueprint, num_examples=enrolled[name])
        arrived[name], traffic[name] = outcome, sizes
        watch(ClientFinished(assignments[name].round, outcome, sizes))
    silent = {name: Failure(name, "expected an answer; none came") for name in assignments if name not in arrived}
    return (
        {name: (arrived | silent)[name] for name in assignments},
        {name: traffic.get(name, Traffic()) for name in assignments},
    )


def cohort_size(fleet: int, cohort: int | float | None) -> int:
    """Return how many clients of a fleet a round takes: all, a number of them, or a share rounded up."""
    if cohort is None:
        return fleet
    return min(fleet, cohort if isinstance(cohort, int) else ceil(cohort * fleet - 1e-9))


def sample(fleet: Sequence[Client], cohort: int | float | None, *, seed: int, round: int) -> Sequence[Client]:
    """Return the round's clients, sorted by name: all, a number of them, or a share of the fleet rounded up."""
    size = cohort_size(len(fleet), cohort)
    if size == len(fleet):
        return fleet
    # Positions, not names or ids, are drawn: numpy would turn 64-bit ids into rounded floats.
    drawn = generator(derive(seed, "cohort", round)).choice(len(fleet), size=size, replace=False)
    return [fleet[position] for position in sorted(drawn.tolist())]


def too_few(round: int, wanted: int, outcomes: Mapping[str, Outcome]) -> str:
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
    reasons = "; ".join(f"{failure.client} {failure.kind}: {failure.reason}" for failure in failures[:5])
    more = f"; and {len(failures) - 5} more" if len(failures) > 5 else ""
    return (
        f"round {round}: expected at least {wanted} usable updates (rounds.min_clients); "
        f"got {len(outcomes) - len(failures)} of {len(outcomes)}: {reasons}{more}"
    )
