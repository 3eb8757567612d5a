from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fedtune.errors import RoundError, StoreError
from fedtune.methods import METHODS
from fedtune.planning.fixed import Fixed
from fedtune.round import Assignment, Blueprint, Client, ClientUpdate, Failure, Measured, Outcome, Training
from fedtune.rounds import ClientFinished, Forgetful, Note, Opened, RoundResult, RoundStarted, Schedule, run, sample
from fedtune.transport import Answer, Aside, Reply, Rule
from fedtune.wire.messages import EncodedAssignment, decode_assignment, encode_update

SHAPE = (4, 6)
TRAINING = Training(batch=1, learning_rate=0.1, steps=1)
Script = Callable[[Assignment], Outcome]


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
            yield outcome if isinstance(outcome, Failure) else Reply(name, encode_update(outcome))
        yield from self.strays


def answer(value: float = 0.1, **changes: Any) -> Script:
    def reply(assignment: Assignment) -> ClientUpdate:
        name, rank = assignment.plan.client, assignment.plan.rank
        rng = np.random.default_rng(sum(name.encode()))
        factors = {
            "x.a": rng.normal(size=(rank, SHAPE[1])).astype(np.float32),
            "x.b": (value * rng.normal(size=(SHAPE[0], rank))).astype(np.float32),
        }
        return replace(ClientUpdate(name, assignment.round, 10, factors, base=assignment.base), **changes)

    return reply


def rounds(replies: Mapping[str, Script], *, count: int = 1, watch: Any = None, **options: Any) -> list[RoundResult]:
    order, strays = options.pop("order", sorted), options.pop("strays", ())
    ledger, start = options.pop("ledger", None), options.pop("start", None)
    method = METHODS[options.pop("method", "flora")]
    return list(
        run(
            method=method,
            settings=method.settings(),
            planner=Fixed(lambda name: (2, TRAINING), alpha="2r", rslora=False),
            transport=Scripted(replies, order, strays),
            ledger=ledger,
            start=start,
            schedule=Schedule(count=count, **options),
            blueprint=Blueprint(modules={"x": SHAPE}, saved={}, max_rank=2, seed=0),
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
    replies = {"ann": answer(), "bob": answer(), "cyd": lambda assignment: Failure("cyd", "out of memory")}
    result = rounds(replies)[0]
    assert result.outcomes["cyd"] == Failure("cyd", "out of memory")
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
    assert isinstance(rounds(replies, max_norm=None)[0].outcomes["dan"], ClientUpdate)


def test_too_few_updates_end_the_run_naming_round_and_reasons() -> None:
    replies = {"ann": answer(), "bob": lambda assignment: Failure("bob", "no space left")}
    with pytest.raises(
        RoundError, match=r"round 1: expected at least 2 usable updates.*got 1 of 2: bob failed: no space"
    ):
        rounds(replies, min_clients=2)


def test_a_silent_client_is_a_failure() -> None:
    result = rounds({"ann": answer(), "bob": answer()}, order=lambda names: ["ann"])[0]
    assert result.outcomes["bob"] == Failure("bob", "expected an answer; none came")


def test_a_cohort_is_drawn_by_number_or_share_and_is_the_same_for_the_same_seed() -> None:
    fleet = [Client(f"client-{i:02}", 1) for i in range(20)]
    five = sample(fleet, 5, seed=0, round=1)
    assert five == sample(fleet, 5, seed=0, round=1)
    assert five == sorted(five, key=lambda client: client.name)
    assert five != sample(fleet, 5, seed=0, round=2)
    assert five != sample(fleet, 5, seed=1, round=1)
    assert len(sample(fleet, 0.25, seed=0, round=1)) == 5
    assert len(sample(fleet, 0.26, seed=0, round=1)) == 6
    assert sample(fleet, None, seed=0, round=1) == fleet
    assert sample(fleet, 99, seed=0, round=1) == fleet
    assert sample(fleet, 1.0, seed=0, round=1) == fleet


def test_every_client_is_drawn_now_and_then() -> None:
    fleet = [Client(f"client-{i}", 1) for i in range(10)]
    drawn = {client.name for round in range(40) for client in sample(fleet, 2, seed=0, round=round)}
    assert len(drawn) == 10


def test_the_watcher_sees_start_and_every_client() -> None:
    events: list[Any] = []
    rounds({"ann": answer(), "bob": answer()}, count=2, watch=events.append)
    assert [event.round for event in events if isinstance(event, RoundStarted)] == [1, 2]
    assert [event.outcome.client for event in events if isinstance(event, ClientFinished)] == ["ann", "bob"] * 2


@pytest.mark.parametrize("method", [name for name, method in sorted(METHODS.items()) if method.verb == "adapt"])
def test_every_method_with_adapters_runs_under_the_loop(method: str) -> None:
    def reply(assignment: Assignment) -> Outcome:
        update = answer()(assignment)
        assert isinstance(update, ClientUpdate)
        kept = {name: t for name, t in update.tensors.items() if name.rpartition(".")[2] in assignment.local.train}
        return replace(update, tensors=kept)

    results = rounds({"ann": reply, "bob": reply}, count=2, method=method)
    assert results[-1].state.round == 2
    assert METHODS[method].adapter(results[-1].state)["x"].shape == SHAPE


def test_an_answer_that_nobody_waits_for_is_named_and_changes_nothing() -> None:
    events: list[Any] = []
    late = Aside("bob", "answered round 0 after its end; dropped", 12)
    twice = Reply("ann", b"once more")
    result = rounds({"ann": answer()}, strays=[late, twice, Failure("eve", "gone")], watch=events.append)[0]
    assert [stray.client for stray in result.aside] == ["bob", "ann", "eve"]
    assert [event.text.split(":")[0] for event in events if isinstance(event, Note)] == ["bob", "ann", "eve"]
    assert result.digest == rounds({"ann": answer()})[0].digest
    assert list(result.outcomes) == ["ann"]


def test_bytes_are_counted_on_the_messages_as_they_travel() -> None:
    result = rounds({"ann": answer(), "bob": lambda assignment: Failure("bob", "no power")})[0]
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


class Noted(Forgetful):
    """Writes down the steps, and may hold a round that had begun."""

    def __init__(self, held: Opened | None = None) -> None:
        self.steps: list[tuple[Any, ...]] = []
        self.held = held
        self.noted: dict[str, Any] = {}

    def opened(self, round: int) -> Opened | None:
        return self.held if round == 1 else None

    def open(self, round: int, *, state: str, cohort: Mapping[str, int], orders: Mapping[str, str]) -> None:
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


FLEET: Mapping[str, Script] = {"ann": answer(), "bob": answer(), "cyd": lambda assignment: Failure("cyd", "no power")}


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


def never(assignment: Assignment) -> Outcome:
    raise AssertionError(f"{assignment.plan.client} was asked again")


def test_an_open_round_goes_on_with_the_updates_it_had() -> None:
    noted = Noted()
    first = rounds(FLEET, ledger=noted)
    held = Opened({"ann": 10, "bob": 10, "cyd": 10}, noted.noted["orders"], {"ann": noted.noted["ann"]})
    again = Noted(held)
    second = rounds({**FLEET, "ann": never}, ledger=again, count=1)
    assert second[0].digest == first[0].digest
    assert again.steps == [("accept", 1, "bob"), ("close", 1, ("cyd",)), ("commit", 1)]


def test_a_closed_round_is_aggregated_without_asking_anybody() -> None:
    noted = Noted()
    whole = rounds(FLEET, ledger=noted)[0]
    updates = {name: noted.noted[name] for name in ("ann", "bob")}
    cohort = {"ann": 10, "bob": 10, "cyd": 10}
    held = Opened(cohort, noted.noted["orders"], updates, {"cyd": Failure("cyd", "no power")})
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
    held = Opened(cohort, noted.noted["orders"], updates, {"bad": failure}, sizes)
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
    held = Opened({"ann": 10, "bob": 10, "cyd": 10}, noted.noted["orders"], updates)
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
    held = Opened({"ann": 10, "bob": 10, "cyd": 10}, {**noted.noted["orders"], "bob": "f" * 64}, {})
    with pytest.raises(StoreError, match="round 1: expected to tell bob what the journal notes"):
        rounds(FLEET, ledger=Noted(held))


def test_a_run_goes_on_from_a_state() -> None:
    whole = rounds(FLEET, count=3)
    rest = rounds(FLEET, count=3, start=whole[0].state)
    assert [result.round for result in rest] == [2, 3]
    assert rest[-1].digest == whole[-1].digest
