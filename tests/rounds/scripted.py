"""Clients of the round loop that answer as a script says, in this process and without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedtune.directions.bank import BANKS, displacement
from fedtune.directions.consistency import block_checks
from fedtune.directions.seed_ledger import describe_base
from fedtune.messages import (
    Assignment,
    Blueprint,
    Client,
    ClientUpdate,
    Failure,
    LoraResult,
    PlannedClient,
    ProbeResult,
    ProbeSeeds,
    Training,
    Weight,
)
from fedtune.methods import METHODS
from fedtune.methods.fedkseed_state import FedKSeedSettings
from fedtune.planning.fixed import Fixed
from fedtune.planning.planner import ClientObservation
from fedtune.probing.replica import Replicas, restore
from fedtune.rounds.clock import ClientTime, CompletedWork
from fedtune.rounds.context import RoundContext
from fedtune.rounds.journal import AsyncJournal, InterruptedRound, NullJournal, Probed
from fedtune.rounds.loop import RoundResult, run
from fedtune.rounds.probe import Prober
from fedtune.rounds.schedule import Schedule
from fedtune.rounds.transport import Answer, Reply, Rule
from fedtune.wire.codec import EncodedAssignment, decode_assignment, encode_update

SHAPE = (4, 6)


# A rate by which the planned step can reach whatever a script answers.
TRAINING = Training(batch=1, learning_rate=1000.0, steps=1)


LISTED = describe_base({"x.weight": np.ones(SHAPE, np.float32), "y.bias": np.zeros(5000, np.float32)})


Script = Callable[[Assignment], ClientUpdate | Failure | bytes]
"""What a client answers, or its bytes as they arrive."""


@dataclass(frozen=True)
class Scripted:
    """A transport whose clients answer by a script; `order` is the order in which answers arrive."""

    replies: Mapping[str, Script]
    order: Callable[[list[str]], list[str]] = sorted
    strays: Sequence[Answer] = ()
    """What arrives after everything else in every round."""
    enrolled: Mapping[str, int] = field(default_factory=dict)
    """Examples of the clients that have others than ten."""

    def clients(self) -> Sequence[Client]:
        return [Client(name, self.enrolled.get(name, 10)) for name in self.replies]

    def exchange(self, orders: Mapping[str, EncodedAssignment], rule: Rule) -> Iterator[Answer]:
        for name in self.order(list(orders)):
            outcome = self.replies[name](decode_assignment(orders[name].header, orders[name].blobs))
            if isinstance(outcome, Failure):
                yield outcome
            else:
                yield Reply(name, outcome if isinstance(outcome, bytes) else encode_update(outcome))
        yield from self.strays


def answer(value: float = 0.1, **changes: Any) -> Script:
    def reply(assignment: Assignment) -> ClientUpdate:
        name, rank = assignment.plan.client, assignment.plan.rank
        rng = np.random.default_rng(sum(name.encode()))
        factors = {
            "x.a": rng.normal(size=(rank, SHAPE[1])).astype(np.float32),
            "x.b": (value * rng.normal(size=(SHAPE[0], rank))).astype(np.float32),
        }
        own = {key: value for key, value in changes.items() if key in ("tensors", "base")}
        others = {key: value for key, value in changes.items() if key not in own}
        result = replace(LoraResult(factors, base=assignment.base), **own)
        return replace(ClientUpdate(name, assignment.round, 10, result), **others)

    return reply


def rounds(replies: Mapping[str, Script], *, count: int = 1, watch: Any = None, **options: Any) -> list[RoundResult]:
    order, strays, enrolled = options.pop("order", sorted), options.pop("strays", ()), options.pop("enrolled", {})
    journal, start = options.pop("ledger", None) or NullJournal(), options.pop("start", None)
    method = METHODS[options.pop("method", "flora")]
    # The scripted clients send numbers and not codes.
    plain = {} if method.task is ProbeSeeds else {"wire_dtype": "bf16"}
    settings, training = options.pop("settings", method.settings(**plain)), options.pop("training", TRAINING)
    return list(
        run(
            RoundContext(
                method=method,
                settings=settings,
                planner=Fixed(lambda name: (2, training), alpha="2r", rslora=False),
                transport=Scripted(replies, order, strays, enrolled),
                journal=journal,
                schedule=Schedule(count=count, **options),
                blueprint=Blueprint({"x": SHAPE}, saved={}, max_rank=2, seed=0, manifest=LISTED.encode()),
                base="base",
                watch=watch or (lambda event: None),
            ),
            start=start,
        )
    )


def state_bytes(result: RoundResult) -> bytes:
    return b"".join(array.tobytes() for _, array in sorted(result.state.delta.items()))


class Noted(NullJournal):
    """Writes down the steps, and may hold a round that had begun."""

    def __init__(self, held: InterruptedRound | None = None) -> None:
        self.steps: list[tuple[Any, ...]] = []
        self.held = held
        self.noted: dict[str, Any] = {}

    def interrupted_round(self, round: int) -> InterruptedRound | None:
        return self.held if round == 1 else None

    def open(
        self,
        round: int,
        *,
        state: str,
        cohort: Mapping[str, int],
        digests: Mapping[str, str],
        memory: Mapping[str, int] | None = None,
        weights: Mapping[str, Weight] | None = None,
        probes: Mapping[str, Probed] | None = None,
    ) -> None:
        self.noted["weights"], self.noted["probes"] = weights or {}, probes or {}
        self.steps.append(("open", round, tuple(cohort)))
        self.noted["digests"] = digests

    def accept(self, round: int, client: str, update: bytes) -> None:
        self.steps.append(("accept", round, client))
        self.noted[client] = update

    def close(self, round: int, failures: Mapping[str, Failure], sizes: Mapping[str, int]) -> None:
        self.steps.append(("close", round, tuple(failures)))
        self.noted["sizes"] = sizes

    def commit(self, round: int, state: Sequence[bytes | memoryview]) -> str:
        self.steps.append(("commit", round))
        return super().commit(round, state)


FLEET: Mapping[str, Script] = {
    "ann": answer(),
    "bob": answer(),
    "cyd": lambda assignment: Failure.from_text("cyd", "no power"),
}


def never(assignment: Assignment) -> ClientUpdate | Failure:
    raise AssertionError(f"{assignment.plan.client} was asked again")


STEPS = 10


def seeded(replies: Mapping[str, Script], *, count: int = 1, **options: Any) -> list[RoundResult]:
    """Run rounds of scalars along sixteen seeds."""
    settings = FedKSeedSettings(seeds=16, scalar_step=2.0**-12, **options.pop("chosen", {}))
    training = Training(batch=1, learning_rate=0.1, steps=STEPS)
    return rounds(replies, count=count, method="fedkseed", settings=settings, training=training, **options)


def probing(replicas: Replicas | None = None, told: list[str] | None = None, **changes: Any) -> Script:
    """Return a client that puts the state together and answers with scalars of its own; None remembers nothing."""

    def reply(assignment: Assignment) -> ClientUpdate:
        name, probe = assignment.plan.client, assignment.probe
        assert probe is not None
        if told is not None:
            told.append(f"{assignment.round} {probe.state.form} {probe.state.since}")
        ledger = restore(
            probe.state,
            bank=BANKS[probe.bank](probe.seeds, probe.key),
            exponent=probe.exponent,
            manifest=LISTED.digest,
            sampling=probe.sampling,
            replicas=Replicas() if replicas is None else replicas,
        )
        if ledger is None:
            return lost(assignment)
        rng = np.random.default_rng(sum(name.encode()) + assignment.round)
        scalars = rng.integers(-20, 21, STEPS).astype(np.int8)
        found = ProbeResult(scalars, ledger.digest[:8], block_checks(ledger, LISTED, range(2), displacement))
        probed = {key: value for key, value in changes.items() if hasattr(found, key)}
        others = {key: value for key, value in changes.items() if key not in probed}
        return replace(ClientUpdate(name, assignment.round, 10, replace(found, **probed)), **others)

    return reply


def lost(assignment: Assignment) -> ClientUpdate:
    return ClientUpdate(assignment.plan.client, assignment.round, 10, ProbeResult(np.empty(0, np.int8), lost=True))


def lost_from(round: int) -> Script:
    """Return a client that answers up to a round, and from it on says that it has lost what is referred to."""
    honest = probing(Replicas())
    return lambda assignment: lost(assignment) if assignment.round >= round else honest(assignment)


def cut(place: int) -> Script:
    honest = probing(Replicas())

    def reply(assignment: Assignment) -> bytes:
        update = honest(assignment)
        assert isinstance(update, ClientUpdate)
        return encode_update(update)[:place]

    return reply


@dataclass(frozen=True)
class Choosing:
    """A planner that nothing fits eve for, and that remembers what it has seen."""

    fixed: Fixed

    def start(self) -> tuple[Any, ...]:
        return ()

    def plan(self, learned: Any, round: int, cohort: Sequence[Client]) -> Mapping[str, PlannedClient | Failure]:
        plans = {client.name: self.fixed.plan_for(client) for client in cohort}
        slow: dict[str, PlannedClient | Failure] = {
            name: PlannedClient(plan, deadline_s=10.0, why=f"seen {len(learned)}") for name, plan in plans.items()
        }
        return slow | {"eve": Failure.from_text("eve", "needs 9 GB; has 4", kind="unfit")} if "eve" in plans else slow

    def observe(self, learned: Any, seen: Sequence[ClientObservation]) -> Any:
        return (*learned, tuple(seen))


@dataclass(frozen=True)
class Told:
    """A clock that says what it is told, and gives up on whoever takes longer than the plan."""

    seconds: Mapping[str, float]
    away: tuple[str, ...] = ()

    def client_times(
        self, round: int, now_s: float, done: Mapping[str, CompletedWork], late: Mapping[str, float]
    ) -> Mapping[str, ClientTime]:
        return {name: ClientTime(self.seconds[name], 1.0) for name in done}

    def overdue(self, deadlines_s: Mapping[str, float], spent: Mapping[str, ClientTime]) -> Mapping[str, float]:
        return {name: at for name, at in deadlines_s.items() if spent[name].seconds > 10}

    def round_seconds(self, spent: Mapping[str, ClientTime]) -> float:
        return max((each.seconds for each in spent.values()), default=0.0)

    def reachable(self, round: int, client: str) -> bool:
        return client not in self.away


def chosen(
    replies: Mapping[str, Script],
    seconds: Mapping[str, float],
    count: int = 2,
    *,
    min_clients: int = 1,
    cohort: int | None = None,
    away: tuple[str, ...] = (),
    prober: Prober | None = None,
    journal: AsyncJournal | None = None,
    **options: Any,
) -> list[RoundResult]:
    return list(
        run(
            RoundContext(
                method=METHODS["flora"],
                settings=METHODS["flora"].settings(wire_dtype="bf16"),
                planner=Choosing(Fixed(lambda name: (2, TRAINING), alpha="2r", rslora=False)),
                transport=Scripted(replies),
                schedule=Schedule(count=count, min_clients=min_clients, cohort=cohort),
                blueprint=Blueprint({"x": SHAPE}, saved={}, max_rank=2, seed=0),
                base="base",
                clock=Told(seconds, away),
                prober=prober,
                journal=journal or NullJournal(),
            ),
            **options,
        )
    )
