from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fedtune.client.replica import Replicas, restore
from fedtune.directions.bank import BANKS, displacement
from fedtune.directions.consistency import block_checks
from fedtune.directions.seed_ledger import describe_base
from fedtune.errors import RoundError, StoreError
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    Client,
    ClientUpdate,
    Failure,
    LoraResult,
    Measured,
    PlannedClient,
    ProbeResult,
    Training,
    TrainLora,
)
from fedtune.methods import METHODS
from fedtune.methods.fedkseed_state import FedKSeedSettings
from fedtune.planning.fixed import Fixed
from fedtune.planning.planner import ClientObservation
from fedtune.rounds.clock import ClientTime, CompletedWork
from fedtune.rounds.loop import ClientFinished, InterruptedRound, Note, NullJournal, RoundResult, RoundStarted, run
from fedtune.rounds.schedule import Schedule
from fedtune.rounds.transport import Answer, Reply, Rule, UnsolicitedReply
from fedtune.wire.codec import EncodedAssignment, decode_assignment, encode_update

SHAPE = (4, 6)
TRAINING = Training(batch=1, learning_rate=0.1, steps=1)
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

    def clients(self) -> Sequence[Client]:
        return [Client(name, 10) for name in self.replies]

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
    order, strays = options.pop("order", sorted), options.pop("strays", ())
    ledger, start = options.pop("ledger", None), options.pop("start", None)
    method = METHODS[options.pop("method", "flora")]
    settings, training = options.pop("settings", method.settings()), options.pop("training", TRAINING)
    return list(
        run(
            method=method,
            settings=settings,
            planner=Fixed(lambda name: (2, training), alpha="2r", rslora=False),
            transport=Scripted(replies, order, strays),
            ledger=ledger,
            start=start,
            schedule=Schedule(count=count, **options),
            blueprint=Blueprint({"x": SHAPE}, saved={}, max_rank=2, seed=0, manifest=LISTED.encode()),
            base="base",
            watch=watch or (lambda event: None),
        )
    )


def state_bytes(result: RoundResult) -> bytes:
    return b"".join(array.tobytes() for _, array in sorted(result.state.delta.items()))


def test_the_order_of_arrival_changes_no_bit() -> None:
    replies = {name: answer() for name in ("ann", "bob", "cyd")}
    forward, backward = (
        rounds(replies, count=3),
        rounds(replies, count=3, order=lambda names: sorted(names, reverse=True)),
    )
    assert state_bytes(forward[-1]) == state_bytes(backward[-1])
    assert list(backward[-1].outcomes) == ["ann", "bob", "cyd"]


def test_a_client_that_fails_costs_its_update_alone() -> None:
    replies = {"ann": answer(), "bob": answer(), "cyd": lambda assignment: Failure.from_text("cyd", "out of memory")}
    result = rounds(replies)[0]
    assert result.outcomes["cyd"] == Failure.from_text("cyd", "out of memory")
    without = rounds({name: replies[name] for name in ("ann", "bob")})[0]
    assert state_bytes(result) == state_bytes(without)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tensors": {"x.a": np.full((2, 6), np.nan, np.float32), "x.b": np.zeros((4, 2), np.float32)}}, "finite"),
        ({"tensors": {"x.a": np.zeros((3, 6), np.float32), "x.b": np.zeros((4, 3), np.float32)}}, "shape"),
        ({"tensors": {}}, "missing"),
        ({"num_examples": 0}, "1 to 10 examples"),
        ({"num_examples": 10**9}, "1 to 10 examples"),
        ({"round": 7}, "expected round 1"),
        ({"base": "other"}, "base digest"),
        ({"measured": Measured(loss_after=float("nan"))}, "finite loss_after"),
        ({"measured": Measured(loss_before=1e300)}, "finite loss_before"),
    ],
)
def test_a_bad_update_is_refused_by_name_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    result = rounds({"ann": answer(), "bad": answer(**changes)})[0]
    failure = result.outcomes["bad"]
    assert isinstance(failure, Failure)
    assert failure.kind == "refused"
    assert reason in failure.reason
    assert state_bytes(result) == state_bytes(rounds({"ann": answer()})[0])


def test_an_update_far_above_the_median_norm_is_refused() -> None:
    replies = {name: answer() for name in ("ann", "bob", "cyd")} | {"dan": answer(value=100.0)}
    result = rounds(replies)[0]
    assert isinstance(result.outcomes["dan"], Failure)
    assert "dan" not in result.norms
    assert isinstance(rounds(replies, max_norm=None)[0].outcomes["dan"], AdmittedUpdate)


def test_too_few_updates_end_the_run_naming_round_and_reasons() -> None:
    replies = {"ann": answer(), "bob": lambda assignment: Failure.from_text("bob", "no space left")}
    with pytest.raises(
        RoundError, match=r"round 1: expected at least 2 usable updates.*got 1 of 2: bob failed: no space"
    ):
        rounds(replies, min_clients=2)


def test_a_silent_client_is_a_failure() -> None:
    result = rounds({"ann": answer(), "bob": answer()}, order=lambda names: ["ann"])[0]
    assert result.outcomes["bob"] == Failure.from_text("bob", "expected an answer; none came")


def test_the_watcher_sees_start_and_every_client() -> None:
    events: list[Any] = []
    rounds({"ann": answer(), "bob": answer()}, count=2, watch=events.append)
    assert [event.round for event in events if isinstance(event, RoundStarted)] == [1, 2]
    assert [event.outcome.client for event in events if isinstance(event, ClientFinished)] == ["ann", "bob"] * 2


@pytest.mark.parametrize("method", [name for name, method in sorted(METHODS.items()) if method.task is TrainLora])
def test_every_method_with_adapters_runs_under_the_loop(method: str) -> None:
    def reply(assignment: Assignment) -> ClientUpdate:
        update = answer()(assignment)
        assert isinstance(update, ClientUpdate)
        tensors = update.lora.tensors.items()
        kept = {name: t for name, t in tensors if name.rpartition(".")[2] in assignment.lora.train}
        return replace(update, result=replace(update.lora, tensors=kept))

    results = rounds({"ann": reply, "bob": reply}, count=2, method=method)
    assert results[-1].state.round == 2
    assert METHODS[method].adapter(results[-1].state)["x"].shape == SHAPE


def test_an_answer_that_nobody_waits_for_is_named_and_changes_nothing() -> None:
    events: list[Any] = []
    late = UnsolicitedReply("bob", "answered round 0 after its end; dropped", 12)
    twice = Reply("ann", b"once more")
    result = rounds({"ann": answer()}, strays=[late, twice, Failure.from_text("eve", "gone")], watch=events.append)[0]
    assert [stray.client for stray in result.unsolicited] == ["bob", "ann", "eve"]
    assert [event.text.split(":")[0] for event in events if isinstance(event, Note)] == ["bob", "ann", "eve"]
    assert result.digest == rounds({"ann": answer()})[0].digest
    assert list(result.outcomes) == ["ann"]


def test_bytes_are_counted_on_the_messages_as_they_travel() -> None:
    result = rounds({"ann": answer(), "bob": lambda assignment: Failure.from_text("bob", "no power")})[0]
    payload = 4 * 2 * (6 + 4)  # four bytes, rank 2, (6 in + 4 out)
    assert payload < result.traffic["ann"].up < payload + 400
    assert 0 < result.traffic["ann"].down < 1000  # nothing but the header in round 1
    assert result.traffic["bob"].up == 0
    assert result.traffic["bob"].down == result.traffic["ann"].down


def test_an_update_larger_than_any_honest_one_is_refused_unread() -> None:
    tensors = {"x.a": np.zeros((2, 6), np.float32), "x.b": np.zeros((4, 100_000), np.float32)}
    failure = rounds({"ann": answer(), "bad": answer(tensors=tensors)})[0].outcomes["bad"]
    assert isinstance(failure, Failure)
    assert "expected an update of at most" in failure.reason


class Noted(NullJournal):
    """Writes down the steps, and may hold a round that had begun."""

    def __init__(self, held: InterruptedRound | None = None) -> None:
        self.steps: list[tuple[Any, ...]] = []
        self.held = held
        self.noted: dict[str, Any] = {}

    def opened(self, round: int) -> InterruptedRound | None:
        return self.held if round == 1 else None

    def open(
        self,
        round: int,
        *,
        state: str,
        cohort: Mapping[str, int],
        orders: Mapping[str, str],
        memory: Mapping[str, int] | None = None,
    ) -> None:
        self.steps.append(("open", round, tuple(cohort)))
        self.noted["orders"] = orders

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


def test_each_step_is_noted_before_the_next_one_is_taken() -> None:
    ledger = Noted()
    rounds(FLEET, ledger=ledger)
    assert ledger.steps == [
        ("open", 1, ("ann", "bob", "cyd")),
        ("accept", 1, "ann"),
        ("accept", 1, "bob"),
        ("close", 1, ("cyd",)),
        ("commit", 1),
    ]


def never(assignment: Assignment) -> ClientUpdate | Failure:
    raise AssertionError(f"{assignment.plan.client} was asked again")


def test_an_open_round_goes_on_with_the_updates_it_had() -> None:
    noted = Noted()
    first = rounds(FLEET, ledger=noted)
    held = InterruptedRound({"ann": 10, "bob": 10, "cyd": 10}, noted.noted["orders"], {"ann": noted.noted["ann"]})
    again = Noted(held)
    second = rounds({**FLEET, "ann": never}, ledger=again, count=1)
    assert second[0].digest == first[0].digest
    assert again.steps == [("accept", 1, "bob"), ("close", 1, ("cyd",)), ("commit", 1)]


def test_a_closed_round_is_aggregated_without_asking_anybody() -> None:
    noted = Noted()
    whole = rounds(FLEET, ledger=noted)[0]
    updates = {name: noted.noted[name] for name in ("ann", "bob")}
    cohort = {"ann": 10, "bob": 10, "cyd": 10}
    held = InterruptedRound(cohort, noted.noted["orders"], updates, {"cyd": Failure.from_text("cyd", "no power")})
    again = rounds(dict.fromkeys(FLEET, never), ledger=Noted(held))[0]
    assert again.digest == whole.digest
    assert again.outcomes["cyd"] == whole.outcomes["cyd"]
    assert again.traffic == whole.traffic


def test_a_refused_updates_bytes_count_after_a_resume_too() -> None:
    fleet = {"ann": answer(), "bad": answer(round=7)}
    noted = Noted()
    whole = rounds(fleet, ledger=noted)[0]
    failure = whole.outcomes["bad"]
    assert isinstance(failure, Failure)
    cohort, updates, sizes = {"ann": 10, "bad": 10}, {"ann": noted.noted["ann"]}, noted.noted["sizes"]
    held = InterruptedRound(cohort, noted.noted["orders"], updates, {"bad": failure}, sizes)
    assert rounds(dict.fromkeys(fleet, never), ledger=Noted(held))[0].traffic == whole.traffic
    assert whole.traffic["bad"].up > 0


def test_who_was_accepted_before_the_crash_counts_towards_the_quorum(monkeypatch: pytest.MonkeyPatch) -> None:
    rules: list[Rule] = []
    honest = Scripted.exchange

    def exchange(self: Scripted, orders: Mapping[str, EncodedAssignment], rule: Rule) -> Iterator[Answer]:
        rules.append(rule)
        return honest(self, orders, rule)

    monkeypatch.setattr(Scripted, "exchange", exchange)
    noted = Noted()
    rounds(FLEET, ledger=noted, min_clients=2)
    updates = {name: noted.noted[name] for name in ("ann", "bob")}
    held = InterruptedRound({"ann": 10, "bob": 10, "cyd": 10}, noted.noted["orders"], updates)
    rounds(FLEET, ledger=Noted(held), min_clients=2)
    assert [rule.quorum for rule in rules] == [2, 0]


def test_a_round_that_everybody_has_answered_cannot_be_mended_by_going_on() -> None:
    fleet = {name: answer() for name in ("ann", "bob", "cyd")} | {"dan": answer(value=100.0)}
    with pytest.raises(RoundError, match=r"start another run with other rounds\.max_norm") as error:
        rounds(fleet, min_clients=4)
    assert error.value.final
    with pytest.raises(RoundError) as error:
        rounds(FLEET, min_clients=3)
    assert not error.value.final


def test_a_round_that_began_otherwise_is_refused() -> None:
    noted = Noted()
    rounds(FLEET, ledger=noted)
    held = InterruptedRound({"ann": 10, "bob": 10, "cyd": 10}, {**noted.noted["orders"], "bob": "f" * 64}, {})
    with pytest.raises(StoreError, match="round 1: expected to tell bob what the journal notes"):
        rounds(FLEET, ledger=Noted(held))


def test_a_run_goes_on_from_a_state() -> None:
    whole = rounds(FLEET, count=3)
    rest = rounds(FLEET, count=3, start=whole[0].state)
    assert [result.round for result in rest] == [2, 3]
    assert rest[-1].digest == whole[-1].digest


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


def test_clients_that_remember_are_sent_what_has_changed_and_nothing_is_asked_twice() -> None:
    told = list[str]()
    results = seeded({"ann": probing(Replicas(), told), "bob": probing(Replicas())}, count=4)
    assert told == ["1 log 0", "2 changed 0", "3 changed 1", "4 changed 2"]  # an empty log: nothing has happened yet
    assert [sorted(result.outcomes) for result in results] == [["ann", "bob"]] * 4
    assert len({result.digest for result in results}) == 4


def test_a_client_that_has_lost_its_state_is_asked_once_more_with_the_whole_and_its_bytes_add_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remembered = seeded({"ann": probing(Replicas()), "bob": probing(Replicas())}, count=4)
    told, sizes, honest = list[str](), list[tuple[str, int, int]](), Scripted.exchange

    def exchange(self: Scripted, orders: Mapping[str, EncodedAssignment], rule: Rule) -> Iterator[Answer]:
        for answer in honest(self, orders, rule):
            assert isinstance(answer, Reply)
            sizes.append((answer.client, len(orders[answer.client].header), len(answer.update)))
            yield answer

    monkeypatch.setattr(Scripted, "exchange", exchange)
    forgot = seeded({"ann": probing(Replicas()), "bob": probing(None, told)}, count=4)
    assert told == ["1 log 0", "2 changed 0", *("3 changed 1", "3 changed 0"), *("4 changed 2", "4 changed 0")]
    assert [result.digest for result in forgot] == [result.digest for result in remembered]
    assert all(isinstance(outcome, AdmittedUpdate) for result in forgot for outcome in result.outcomes.values())
    third = [one for one in sizes[4:7] if one[0] == "bob"]
    assert len(third) == 2
    assert forgot[2].traffic["bob"].down == third[0][1] + third[1][1]
    assert forgot[2].traffic["bob"].up == third[0][2] + third[1][2]
    assert forgot[2].traffic["ann"] == remembered[2].traffic["ann"]


def test_each_client_is_told_finished_once_and_only_what_is_used_is_kept() -> None:
    events, ledger = list[Any](), Noted()
    seeded({"ann": probing(Replicas()), "bob": probing()}, count=3, watch=events.append, ledger=ledger)
    finished = [event.outcome.client for event in events if isinstance(event, ClientFinished) and event.round == 3]
    assert finished == ["ann", "bob"]
    assert [step for step in ledger.steps if step[:2] == ("accept", 3)] == [("accept", 3, "ann"), ("accept", 3, "bob")]


def lost(assignment: Assignment) -> ClientUpdate:
    return ClientUpdate(assignment.plan.client, assignment.round, 10, ProbeResult(np.empty(0, np.int8), lost=True))


def lost_from(round: int) -> Script:
    """Return a client that answers up to a round, and from it on says that it has lost what is referred to."""
    honest = probing(Replicas())
    return lambda assignment: lost(assignment) if assignment.round >= round else honest(assignment)


def test_a_client_that_has_lost_the_whole_too_is_a_failure_and_the_round_goes_on() -> None:
    result = seeded({"ann": probing(Replicas()), "bob": lost_from(3)}, count=3)[-1]
    failure = result.outcomes["bob"]
    assert failure == Failure.from_text("bob", "expected it to work on the whole state; it asked for that again")
    assert isinstance(result.outcomes["ann"], AdmittedUpdate)


def test_a_client_that_was_sent_the_whole_at_once_is_not_asked_again() -> None:
    calls = list[int]()

    def always(assignment: Assignment) -> ClientUpdate:
        calls.append(assignment.round)
        return lost(assignment)

    result = seeded({"ann": probing(Replicas()), "bob": always})[0]
    assert calls == [1]
    assert result.outcomes["bob"] == Failure.from_text(
        "bob", "expected it to work on the whole state; it asked for that again"
    )
    assert result.digest == seeded({"ann": probing(Replicas())})[0].digest


def test_a_client_that_falls_silent_when_it_is_asked_again_is_a_failure() -> None:
    def tired(assignment: Assignment) -> ClientUpdate | Failure | bytes:
        if assignment.round < 3:
            return honest(assignment)
        return lost(assignment) if assignment.probe.state.since else Failure.from_text("bob", "no power")

    honest = probing(Replicas())
    result = seeded({"ann": probing(Replicas()), "bob": tired}, count=3)[-1]
    assert result.outcomes["bob"] == Failure.from_text("bob", "no power")


def test_who_is_asked_again_is_waited_for_until_so_many_updates_as_the_quorum_are_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that has failed is no update: it must not end the wait for one that is still at work."""
    rules, honest = list[int](), Scripted.exchange

    def exchange(self: Scripted, orders: Mapping[str, EncodedAssignment], rule: Rule) -> Iterator[Answer]:
        rules.append(rule.quorum)
        return honest(self, orders, rule)

    monkeypatch.setattr(Scripted, "exchange", exchange)
    fleet = {
        "ann": probing(Replicas()),
        "bob": lambda assignment: Failure.from_text("bob", "no power"),
        "cyd": probing(),
    }
    seeded(fleet, count=3, min_clients=2)
    assert rules == [2, 2, 2, 1]


def cut(place: int) -> Script:
    honest = probing(Replicas())

    def reply(assignment: Assignment) -> bytes:
        update = honest(assignment)
        assert isinstance(update, ClientUpdate)
        return encode_update(update)[:place]

    return reply


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (probing(scalars=np.full(STEPS, -128, np.int8)), "expected scalars from -127 to 127; got -128"),
        (probing(scalars=np.zeros(STEPS - 1, np.int8)), "expected 10 scalars, one per seed drawn; got 9"),
        (probing(scalars=np.zeros(STEPS + 1, np.int8)), "expected 10 scalars, one per seed drawn; got 11"),
        (probing(skipped=2), "at most 10% of its losses"),
        (probing(round=7), "expected round 1; got 7"),
        (probing(state=b"12345678"), "got 3132333435363738: another base, bank, round or history"),
        (probing(state=b""), "another base, bank, round or history"),
        (probing(checks=bytes(16)), "expected the displacements of y.bias, block"),
        (probing(checks=b""), "expected the displacements of"),
        (probing(num_examples=11), "1 to 10 examples"),
        (probing(num_examples=0), "1 to 10 examples"),
        (probing(measured=Measured(loss_after=float("nan"))), "finite loss_after"),
        (probing(scalars=np.zeros(2000, np.int8)), "expected an update of at most 1034 bytes"),
        (answer(), "expected a serialised ProbeUpdate"),
        (lambda assignment: b"\xff" * 20, "expected a serialised ProbeUpdate"),
        (lambda assignment: b"", "expected round 1; got 0"),
    ],
)
def test_a_bad_probe_is_refused_by_name_and_the_round_goes_on_without_it(bad: Script, reason: str) -> None:
    alone = seeded({"ann": probing(Replicas())})[0]
    result = seeded({"ann": probing(Replicas()), "bad": bad})[0]
    failure = result.outcomes["bad"]
    assert isinstance(failure, Failure)
    assert (failure.client, failure.kind) == ("bad", "refused")
    assert reason in failure.reason
    assert result.digest == alone.digest
    assert isinstance(result.outcomes["ann"], AdmittedUpdate)


def test_a_probe_that_is_cut_off_anywhere_is_refused() -> None:
    whole = seeded({"ann": probing(Replicas())})[0].traffic["ann"].up
    alone = seeded({"ann": probing(Replicas())})[0]
    result = seeded({"ann": probing(Replicas()), **{f"cut-{place:03}": cut(place) for place in range(whole)}})[0]
    assert result.digest == alone.digest
    assert {name for name, outcome in result.outcomes.items() if isinstance(outcome, AdmittedUpdate)} == {"ann"}
    assert {outcome.kind for name, outcome in result.outcomes.items() if isinstance(outcome, Failure)} == {"refused"}


def test_more_are_asked_than_are_needed_and_the_round_ends_with_enough() -> None:
    replies = {name: answer() for name in ("ann", "bob", "cyd", "dan")}
    asked = list[str]()

    def watch(event: Any) -> None:
        if isinstance(event, RoundStarted):
            asked.extend(event.cohort)

    result = rounds(replies, cohort=2, over_select=1.5, watch=watch)[0]
    assert len(asked) == 3
    used = [name for name, outcome in result.outcomes.items() if isinstance(outcome, AdmittedUpdate)]
    assert used == asked[:2]  # the scripted clients answer in the order of their names
    late = result.outcomes[asked[2]]
    assert late == Failure.from_text(asked[2], "the round had its 2 updates", kind="late")


def test_who_was_late_is_waited_for_again_until_enough_have_answered() -> None:
    tries = list[int]()

    def slow(assignment: Assignment) -> Any:
        tries.append(assignment.round)
        return Failure.from_text("bob", "no answer in 5 s", kind="late") if len(tries) < 3 else answer()(assignment)

    result = rounds({"ann": answer(), "bob": slow}, min_clients=2, attempts=3)[0]
    assert len(tries) == 3
    assert all(isinstance(outcome, AdmittedUpdate) for outcome in result.outcomes.values())
    tries.clear()
    with pytest.raises(RoundError, match="expected at least 2 usable updates"):
        rounds({"ann": answer(), "bob": slow}, min_clients=2, attempts=2)


def test_who_failed_for_good_is_not_asked_again() -> None:
    tries = list[int]()

    def broken(assignment: Assignment) -> Failure:
        tries.append(assignment.round)
        return Failure.from_text("bob", "out of memory")

    with pytest.raises(RoundError):
        rounds({"ann": answer(), "bob": broken}, min_clients=2, attempts=3)
    assert len(tries) == 1


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

    def timed(
        self, round: int, now_s: float, done: Mapping[str, CompletedWork], late: Mapping[str, float]
    ) -> Mapping[str, ClientTime]:
        return {name: ClientTime(self.seconds[name], 1.0) for name in done}

    def cut(self, deadlines_s: Mapping[str, float], spent: Mapping[str, ClientTime]) -> Mapping[str, float]:
        return {name: at for name, at in deadlines_s.items() if spent[name].seconds > 10}

    def lasted(self, spent: Mapping[str, ClientTime]) -> float:
        return max((each.seconds for each in spent.values()), default=0.0)

    def reachable(self, round: int, client: str) -> bool:
        return client not in self.away


def chosen(
    replies: Mapping[str, Script],
    seconds: Mapping[str, float],
    count: int = 2,
    *,
    min_clients: int = 1,
    away: tuple[str, ...] = (),
    **options: Any,
) -> list[RoundResult]:
    return list(
        run(
            method=METHODS["flora"],
            settings=METHODS["flora"].settings(),
            planner=Choosing(Fixed(lambda name: (2, TRAINING), alpha="2r", rslora=False)),
            transport=Scripted(replies),
            schedule=Schedule(count=count, min_clients=min_clients),
            blueprint=Blueprint({"x": SHAPE}, saved={}, max_rank=2, seed=0),
            base="base",
            clock=Told(seconds, away),
            **options,
        )
    )


def test_a_client_that_nothing_fits_sits_out_with_the_reason_and_stops_nobody() -> None:
    def never(assignment: Assignment) -> ClientUpdate | Failure:
        raise AssertionError("eve must not be asked")

    first, second = chosen({"ann": answer(), "eve": never}, {"ann": 2.0})
    assert first.outcomes["eve"] == Failure.from_text("eve", "needs 9 GB; has 4", kind="unfit")
    assert (first.traffic["eve"].down, list(first.outcomes)) == (0, ["ann", "eve"])
    assert second.planned["ann"].why == "seen 1"
    with pytest.raises(
        RoundError, match=r"round 1: expected a client that can do something; got none: eve: needs 9 GB"
    ):
        chosen({"eve": never}, {})


def test_a_round_lasts_as_long_as_its_slowest_client_and_the_late_one_is_left_out() -> None:
    replies = {"ann": answer(), "bob": answer(), "cyd": answer()}
    first, second = chosen(replies, {"ann": 2.0, "bob": 5.0, "cyd": 50.0})
    late = first.outcomes["cyd"]
    assert isinstance(late, Failure)
    assert (late.kind, first.spent["cyd"].seconds) == ("late", 10.0)
    assert (first.clock_s, second.clock_s) == (10.0, 20.0)
    without, _ = chosen({name: replies[name] for name in ("ann", "bob")}, {"ann": 2.0, "bob": 5.0})
    assert state_bytes(first) == state_bytes(without)
    assert without.clock_s == 6.0
    seen = {each.client: each for each in first.seen}
    assert (seen["ann"].compute_s, seen["ann"].transfer_s, seen["cyd"].status) == (2.0, 1.0, "late")


def test_a_planner_learns_again_from_the_rounds_before() -> None:
    replies = {"ann": answer(), "bob": answer()}
    whole = chosen(replies, {"ann": 2.0, "bob": 3.0}, count=3)
    rest = chosen(
        replies,
        {"ann": 2.0, "bob": 3.0},
        count=3,
        start=whole[0].state,
        history=[whole[0].seen],
        clock_s=whole[0].clock_s,
    )
    assert [result.planned["ann"].why for result in rest] == ["seen 1", "seen 2"]
    assert (rest[-1].clock_s, rest[-1].digest) == (whole[-1].clock_s, whole[-1].digest)


def test_late_clients_that_the_round_needs_are_waited_for_the_quickest_first() -> None:
    replies = {"ann": answer(), "bob": answer(), "cyd": answer()}
    first, _ = chosen(replies, {"ann": 70.0, "bob": 30.0, "cyd": 50.0}, min_clients=2)
    late = {name: outcome for name, outcome in first.outcomes.items() if isinstance(outcome, Failure)}
    assert set(late) == {"ann"}
    assert first.clock_s == 51.0


def test_who_is_away_is_not_drawn_and_a_fleet_that_is_away_stops_the_run() -> None:
    replies = {"ann": answer(), "bob": answer()}
    first, _ = chosen(replies, {"ann": 2.0, "bob": 5.0}, away=("bob",))
    assert list(first.outcomes) == ["ann"]
    with pytest.raises(RoundError, match="round 1: expected one of 2 clients to be there; got none"):
        chosen(replies, {}, away=("ann", "bob"))
