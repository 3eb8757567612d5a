from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedtune.errors import RoundError
from fedtune.messages import (
    Assignment,
    ClientUpdate,
    Failure,
    TrainLora,
)
from fedtune.methods import METHODS
from tests.rounds.scripted import (
    SHAPE,
    TRAINING,
    answer,
    chosen,
    rounds,
    state_bytes,
)


def test_the_order_of_arrival_changes_no_bit() -> None:
    replies = {name: answer() for name in ("ann", "bob", "cyd")}
    forward, backward = (
        rounds(replies, count=3),
        rounds(replies, count=3, order=lambda names: sorted(names, reverse=True)),
    )
    assert state_bytes(forward[-1]) == state_bytes(backward[-1])
    assert list(backward[-1].outcomes) == ["ann", "bob", "cyd"]


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


def test_where_nothing_fits_any_client_drawn_others_are_drawn_beside_them() -> None:
    def never(assignment: Assignment) -> ClientUpdate | Failure:
        raise AssertionError("eve must not be asked")

    results = chosen({"ann": answer(), "eve": never}, {"ann": 2.0}, count=8, cohort=1)
    # Drawn one at a time: eve alone would end the run in her first round.
    assert {tuple(result.outcomes) for result in results} == {("ann",), ("ann", "eve")}
    assert all(result.outcomes["eve"].kind == "unfit" for result in results if "eve" in result.outcomes)  # type: ignore[union-attr]


def test_a_planner_learns_again_from_the_rounds_before() -> None:
    replies = {"ann": answer(), "bob": answer()}
    whole = chosen(replies, {"ann": 2.0, "bob": 3.0}, count=3)
    rest = chosen(
        replies,
        {"ann": 2.0, "bob": 3.0},
        count=3,
        start=whole[0].state,
        history=[whole[0].observations],
        clock_s=whole[0].clock_s,
    )
    assert [result.planned["ann"].why for result in rest] == ["seen 1", "seen 2"]
    assert (rest[-1].clock_s, rest[-1].digest) == (whole[-1].clock_s, whole[-1].digest)


def test_who_is_away_is_not_drawn_and_a_fleet_that_is_away_stops_the_run() -> None:
    replies = {"ann": answer(), "bob": answer()}
    first, _ = chosen(replies, {"ann": 2.0, "bob": 5.0}, away=("bob",))
    assert list(first.outcomes) == ["ann"]
    with pytest.raises(RoundError, match="round 1: expected one of 2 clients to be there; got none"):
        chosen(replies, {}, away=("ann", "bob"))


def test_clients_are_asked_for_the_rate_of_the_round() -> None:
    asked: list[float] = []

    def reply(assignment: Assignment) -> ClientUpdate | Failure | bytes:
        asked.append(assignment.plan.training.rate)
        return answer(value=0.1)(assignment)

    options: dict[str, Any] = {"training": replace(TRAINING, learning_rate=8.0), "final_rate": 0.5}
    results = rounds({"a": reply}, count=2, schedule="linear", **options)
    assert asked == [8.0, 8.0 * 0.5]
    assert [result.rate_share for result in results] == [1.0, 0.5]


def test_a_change_beyond_the_rate_of_its_round_is_refused() -> None:
    """The planned rate reaches it; a millionth of that, which the last round has, does not."""
    clients = {"a": answer(value=0.1)}
    assert len(rounds(clients, count=2)) == 2
    with pytest.raises(RoundError, match="the reach of 1 planned steps"):
        rounds(clients, count=2, schedule="cosine", final_rate=1e-6)
