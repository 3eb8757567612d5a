from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fedtune.errors import RoundError
from fedtune.methods import METHODS
from fedtune.planning.fixed import Fixed
from fedtune.round import Assignment, Blueprint, Client, ClientUpdate, Failure, Measured, Outcome, Traffic, Training
from fedtune.rounds import ClientFinished, RoundResult, RoundStarted, Schedule, run, sample

SHAPE = (4, 6)
TRAINING = Training(batch=1, learning_rate=0.1, steps=1)
Reply = Callable[[Assignment], Outcome]


@dataclass(frozen=True)
class Scripted:
    """A transport whose clients answer by a script; `order` is the order in which answers arrive."""

    replies: Mapping[str, Reply]
    order: Callable[[list[str]], list[str]] = sorted

    def clients(self) -> Sequence[Client]:
        return [Client(name, 10) for name in self.replies]

    def exchange(self, assignments: Mapping[str, Assignment]) -> Iterator[tuple[Outcome, Traffic]]:
        for name in self.order(list(assignments)):
            yield self.replies[name](assignments[name]), Traffic(down=5, up=7)


def answer(value: float = 0.1, **changes: Any) -> Reply:
    def reply(assignment: Assignment) -> ClientUpdate:
        name, rank = assignment.plan.client, assignment.plan.rank
        rng = np.random.default_rng(sum(name.encode()))
        factors = {
            "x.a": rng.normal(size=(rank, SHAPE[1])).astype(np.float32),
            "x.b": (value * rng.normal(size=(SHAPE[0], rank))).astype(np.float32),
        }
        return replace(ClientUpdate(name, assignment.round, 10, factors, base=assignment.base), **changes)

    return reply


def rounds(replies: Mapping[str, Reply], *, count: int = 1, watch: Any = None, **options: Any) -> list[RoundResult]:
    order = options.pop("order", sorted)
    method = METHODS[options.pop("method", "flora")]
    return list(
        run(
            method=method,
            settings=method.settings(),
            planner=Fixed(
                ranks={name: 2 for name in replies}, alpha="2r", rslora=False, training={n: TRAINING for n in replies}
            ),
            transport=Scripted(replies, order),
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
        ({"num_examples": -1}, "1 to 10 examples"),
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


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_runs_under_the_loop(method: str) -> None:
    def reply(assignment: Assignment) -> Outcome:
        update = answer()(assignment)
        assert isinstance(update, ClientUpdate)
        kept = {name: t for name, t in update.tensors.items() if name.rpartition(".")[2] in assignment.local.train}
        return replace(update, tensors=kept)

    results = rounds({"ann": reply, "bob": reply}, count=2, method=method)
    assert results[-1].state.round == 2
    assert METHODS[method].adapter(results[-1].state)["x"].shape == SHAPE
