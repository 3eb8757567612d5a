from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtune.errors import RoundError
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    ClientUpdate,
    DescendResult,
    Failure,
    Measured,
    Plan,
    PlannedClient,
    ProbeResult,
    Traffic,
    Training,
)
from fedtune.probing.replica import Replicas
from fedtune.rounds.events import Note, RoundStarted
from fedtune.rounds.exchange import completed_work
from fedtune.rounds.transport import Answer, Reply, Rule, UnsolicitedReply
from fedtune.wire.codec import EncodedAssignment
from tests.rounds.scripted import (
    STEPS,
    TRAINING,
    Script,
    Scripted,
    answer,
    chosen,
    cut,
    lost,
    lost_from,
    probing,
    rounds,
    seeded,
    state_bytes,
)


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
        for reply in honest(self, orders, rule):
            assert isinstance(reply, Reply)
            sizes.append((reply.client, len(orders[reply.client].header), len(reply.update)))
            yield reply

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


def test_a_round_lasts_as_long_as_its_slowest_client_and_the_late_one_is_left_out() -> None:
    replies = {"ann": answer(), "bob": answer(), "cyd": answer()}
    first, second = chosen(replies, {"ann": 2.0, "bob": 5.0, "cyd": 50.0})
    late = first.outcomes["cyd"]
    assert isinstance(late, Failure)
    assert (late.kind, first.times["cyd"].seconds) == ("late", 10.0)
    assert (first.clock_s, second.clock_s) == (10.0, 20.0)
    without, _ = chosen({name: replies[name] for name in ("ann", "bob")}, {"ann": 2.0, "bob": 5.0})
    assert state_bytes(first) == state_bytes(without)
    assert without.clock_s == 6.0
    seen = {each.client: each for each in first.observations}
    assert (seen["ann"].compute_s, seen["ann"].transfer_s, seen["cyd"].status) == (2.0, 1.0, "late")


def test_late_clients_that_the_round_needs_are_waited_for_the_quickest_first() -> None:
    replies = {"ann": answer(), "bob": answer(), "cyd": answer()}
    first, _ = chosen(replies, {"ann": 70.0, "bob": 30.0, "cyd": 50.0}, min_clients=2)
    late = {name: outcome for name, outcome in first.outcomes.items() if isinstance(outcome, Failure)}
    assert set(late) == {"ann"}
    assert first.clock_s == 51.0


def test_a_change_beyond_the_reach_of_its_plan_is_refused_even_where_nobody_else_answers() -> None:
    training = replace(TRAINING, learning_rate=0.1)
    small = {"x.a": np.full((2, 6), 0.05, np.float32), "x.b": np.full((4, 2), -0.05, np.float32)}
    result = rounds({"ann": answer(tensors=small)}, training=training)[0]
    assert isinstance(result.outcomes["ann"], AdmittedUpdate)
    with pytest.raises(
        RoundError, match=r"factors, most of it in x\.a: expected the change of the factors.*reach of 1"
    ):
        rounds({"ann": answer()}, training=training)
    large = rounds({"ann": answer()}, training=training, norm_cap=None)[0]
    assert isinstance(large.outcomes["ann"], AdmittedUpdate)


def test_who_probed_in_place_of_descending_is_timed_by_its_probing() -> None:
    descent, probing = Training(learning_rate=0.02, steps=8), Training(learning_rate=2e-4, steps=3)
    planned = PlannedClient(Plan("ann", 1, 1.0, descent), verb="auto", probing=probing)
    numbers = np.zeros(4, np.int8)
    for result, verb, training in (
        (ProbeResult(numbers), "probe", probing),
        (DescendResult(numbers, 0, 8), "descend", descent),
    ):
        update = AdmittedUpdate(ClientUpdate("ann", 1, 5, result))
        done = completed_work(planned, update, Traffic(1, 2), None)
        assert (done.verb, done.plan.training) == (verb, training)
