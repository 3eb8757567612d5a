"""Asynchronous rounds over a network whose clients answer at times of their own, and a process that is restarted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.devices.measured_clock import MeasuredClock
from fedtune.errors import StoreError
from fedtune.messages import AdmittedUpdate, Client, ClientUpdate, Failure
from fedtune.rounds import buffer
from fedtune.rounds.asynchronous import AsyncSettings
from fedtune.rounds.context import RoundContext
from fedtune.rounds.journal import OpenOrders
from fedtune.rounds.live_courier import LIMIT_S, LiveCourier
from fedtune.rounds.loop import RoundResult
from fedtune.rounds.transport import Answer, LiveTransport, Reply, Rule, UnsolicitedReply
from fedtune.store.run_journal import RunJournal
from fedtune.wire.codec import EncodedAssignment, decode_assignment, encode_update
from tests.rounds.scripted import Script
from tests.rounds.test_buffer import THREE, context_of, trained


class KilledError(Exception):
    """The process is gone."""


@dataclass
class Wire:
    """Clients that take so many seconds for an order, on a clock that passes while their answers are waited for."""

    seconds: Mapping[str, float]
    scripts: Mapping[str, Script]
    now: float = 0.0
    due: list[tuple[float, str, Answer]] = field(default_factory=list)
    sent: list[tuple[str, int]] = field(default_factory=list)
    """Client and round of every order."""
    withdrawn: list[str] = field(default_factory=list)
    kill_after: int = 10**9
    """Answers after which the process ends."""

    def clock(self) -> float:
        return self.now

    def clients(self) -> Sequence[Client]:
        return [Client(name, 10) for name in self.seconds]

    def idle(self) -> Sequence[Client]:
        busy = {name for _, name, _ in self.due}
        return [client for client in self.clients() if client.name not in busy]

    def exchange(self, orders: Mapping[str, EncodedAssignment], rule: Rule) -> Any:
        raise AssertionError("orders of these rounds outlast them")

    def send(self, orders: Mapping[str, EncodedAssignment], seconds: float) -> Sequence[Failure]:
        for name, order in orders.items():
            assignment = decode_assignment(order.header, order.blobs)
            self.sent.append((name, assignment.round))
            outcome = self.scripts[name](assignment)
            answer = Reply(name, encode_update(outcome)) if isinstance(outcome, ClientUpdate) else outcome
            assert not isinstance(answer, bytes)
            self.due.append((self.now + self.seconds[name], name, answer))
        return []

    def receive(self, seconds: float) -> Answer | None:
        ready = sorted(self.due, key=lambda each: each[:2])
        if not ready or ready[0][0] > self.now + seconds:
            self.now += seconds
            return None
        if not self.kill_after:
            raise KilledError
        self.kill_after -= 1
        at, _, answer = ready[0]
        self.due.remove(ready[0])
        self.now = max(self.now, at)
        return answer

    def withdraw(self, client: str) -> None:
        self.withdrawn.append(client)


def wire_of(seconds: Mapping[str, float], **scripts: Script) -> Wire:
    own = {name: trained(0.1 * place) for place, name in enumerate(seconds, 1)}
    return Wire(seconds, {**own, **scripts})


def live(wire: Wire, asynchronous: AsyncSettings, **options: Any) -> RoundContext:
    context = context_of(wire.seconds, asynchronous, **options)
    return replace(context, transport=wire, clock=MeasuredClock(), live=True)


def conduct(context: RoundContext, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[RoundResult]:
    return list(stream(context, monkeypatch, **options))


def stream(context: RoundContext, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[RoundResult]:
    wire = context.transport
    assert isinstance(wire, Wire)

    def courier(context: RoundContext, transport: LiveTransport, *, began_s: float) -> LiveCourier:
        return LiveCourier(context, transport, began_s=began_s, clock=wire.clock)

    monkeypatch.setattr(buffer, "LiveCourier", courier)
    return buffer.run(context, **options)


def buffers(results: Sequence[RoundResult]) -> list[tuple[float, dict[str, int]]]:
    return [(result.clock_s, dict(result.staleness)) for result in results]


def test_updates_fill_the_buffers_in_the_order_in_which_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = wire_of(THREE)
    results = conduct(live(wire, AsyncSettings(buffer=2), count=6), monkeypatch)
    fresh = {"ann": 0, "bob": 0}
    assert buffers(results) == [(2, fresh), (4, fresh), (6, fresh), (8, fresh), (10, fresh), (11, {"ann": 0, "cyd": 5})]
    # Two are in one order each at a time, and who still works at the end is not waited for.
    assert wire.sent.count(("cyd", 1)) == 1
    assert wire.withdrawn == ["bob"]
    assert results[0].times["bob"].seconds == 2


def test_simulated_and_live_rounds_of_the_same_arrivals_end_in_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = AsyncSettings(buffer=2)
    simulated = list(buffer.run(context_of(THREE, settings, count=6)))
    assert [r.digest for r in conduct(live(wire_of(THREE), settings, count=6), monkeypatch)] == [
        r.digest for r in simulated
    ]


@pytest.mark.parametrize("send", ["after-aggregating", "after-receiving"])
def test_a_process_that_ends_after_any_answer_goes_on_to_the_same_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, send: Any
) -> None:
    """The wire goes on while the server is down; what it had accepted fills the buffer that it would have filled."""
    settings = AsyncSettings(buffer=2, concurrency=3, send=send)
    seconds = {**THREE, "dan": 2.5}
    whole = conduct(live(wire_of(seconds), settings, count=4), monkeypatch)
    answers = sum(len(result.outcomes) for result in whole)
    for place in range(answers):
        run = tmp_path / f"{send}-{place}"
        run.mkdir()
        wire, results = wire_of(seconds), list[RoundResult]()
        wire.kill_after = place
        with RunJournal.create(run, group_s=0.0) as journal:
            journal.begin({"recipe": "..."})
            with pytest.raises(KilledError):
                results.extend(stream(live(wire, settings, count=4, journal=journal), monkeypatch))
        wire.kill_after, done = 10**9, len(results)
        # Orders are sent again, and clients that work on them already are not disturbed.
        wire.due = [each for each in wire.due if each[1] not in {name for name, _ in wire.sent}]
        with RunJournal.reopen(run, group_s=0.0) as journal:
            journal.begin({"recipe": "..."})
            context = live(wire, settings, count=4, journal=journal)
            start = results[-1].state if results else None
            results += conduct(context, monkeypatch, start=start, clock_s=results[-1].clock_s if results else 0.0)
        assert len(results) == 4
        # Accepted updates of the open round are in its buffer, in the order of the journal.
        if done < 3:
            assert set(whole[done].staleness) & set(results[done].staleness)
        assert [result.round for result in results] == [1, 2, 3, 4]


def test_a_round_whose_buffer_was_full_is_aggregated_from_the_journal_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between `settle` and `commit`: the slow client has answered meanwhile, and is in no other buffer."""
    wire, settings = wire_of(THREE), AsyncSettings(buffer=2)
    whole = conduct(live(wire_of(THREE), settings, count=2), monkeypatch)
    (tmp_path / "run").mkdir()
    with RunJournal.create(tmp_path / "run", group_s=0.0) as journal:
        journal.begin({"recipe": "..."})
        monkeypatch.setattr(journal, "commit", killed)
        with pytest.raises(KilledError):
            conduct(live(wire, settings, count=2, journal=journal), monkeypatch)
    wire = wire_of({**THREE, "cyd": 0.1})
    with RunJournal.reopen(tmp_path / "run", group_s=0.0) as journal:
        journal.begin({"recipe": "..."})
        results = conduct(live(wire, settings, count=2, journal=journal), monkeypatch)
    assert results[0].digest == whole[0].digest
    assert dict(results[0].staleness) == {"ann": 0, "bob": 0}
    assert wire.sent[0] == ("cyd", 1)
    assert ("ann", 1) not in wire.sent
    assert "cyd" in results[1].staleness


def killed(*arguments: Any) -> Any:
    raise KilledError


def test_a_client_that_vanishes_holds_its_place_no_longer_than_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = wire_of({"ann": 1.0, "bob": 1.0, "cyd": 10**9})
    context = live(wire, AsyncSettings(buffer=3), count=1, deadline_s=60.0)
    (result,) = conduct(context, monkeypatch)
    failure = result.outcomes["cyd"]
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.reason) == ("late", "no answer in 60 s")
    assert wire.withdrawn == ["cyd"]
    assert result.clock_s == 60
    assert live_limit(context, wire) == 60
    assert live_limit(replace(context, schedule=replace(context.schedule, deadline_s=None)), wire) == LIMIT_S


def live_limit(context: RoundContext, wire: Wire) -> float:
    return LiveCourier(context, wire, began_s=0.0)._limit_s


def test_an_answer_that_comes_too_late_or_twice_is_dropped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = wire_of(THREE)

    class Liar(Wire):
        def receive(self, seconds: float) -> Answer | None:
            answer = super().receive(seconds)
            if isinstance(answer, Reply) and answer.client == "ann" and self.now == 1:
                self.now = 1.5
                self.due.append((self.now, "ann", answer))
            return answer

    liar = Liar(wire.seconds, wire.scripts)
    results = conduct(live(liar, AsyncSettings(buffer=2), count=1), monkeypatch)
    assert sorted(results[0].staleness) == ["ann", "bob"]
    assert [stray.client for stray in results[0].unsolicited][:1] == ["ann"]


def test_a_stray_of_the_transport_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = wire_of(THREE)
    wire.due.append((0.5, "eve", UnsolicitedReply("eve", "refused: no such base")))
    results = conduct(live(wire, AsyncSettings(buffer=2), count=1), monkeypatch)
    assert [stray.reason for stray in results[0].unsolicited] == ["refused: no such base"]


def test_a_client_given_up_as_stale_is_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = wire_of(THREE)
    results = conduct(live(wire, AsyncSettings(buffer=2, max_staleness=1), count=4), monkeypatch)
    assert wire.withdrawn[0] == "cyd"
    assert isinstance(results[2].outcomes["cyd"], Failure)


def test_a_round_of_time_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = AsyncSettings(trigger="time", budget_s=4.5)
    results = conduct(live(wire_of(THREE), settings, count=2), monkeypatch)
    assert buffers(results) == [(4.5, {"ann": 0, "bob": 0}), (9.0, {"ann": 0, "bob": 0})]


def test_a_buffer_without_its_update_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    context = live(wire_of(THREE), AsyncSettings(buffer=2), count=1)
    state = context.method.init(context.blueprint, context.settings)
    courier = LiveCourier(context, wire_of(THREE), began_s=0.0)
    round = buffer.Buffer(context, state, "", {}, OpenOrders(), courier, 0.0)
    round._ask(wire_of(THREE).clients(), 3)
    round._known = OpenOrders(used=["ann"])
    with pytest.raises(StoreError, match="expected an update of ann, as its buffer says"):
        round._settle_as_recorded()


def test_outcomes_are_admitted_against_the_version_that_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    results = conduct(live(wire_of(THREE), AsyncSettings(buffer=2), count=6), monkeypatch)
    assert isinstance(results[-1].outcomes["cyd"], AdmittedUpdate)
