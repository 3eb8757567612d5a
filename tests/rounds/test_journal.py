from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from fedtune.errors import RoundError, StoreError
from fedtune.messages import (
    Failure,
)
from fedtune.probing.replica import Replicas
from fedtune.rounds.events import ClientFinished
from fedtune.rounds.journal import InterruptedRound
from fedtune.rounds.transport import Answer, Rule
from fedtune.wire.codec import EncodedAssignment
from tests.rounds.scripted import (
    FLEET,
    Noted,
    Scripted,
    answer,
    never,
    probing,
    rounds,
    seeded,
)


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


def test_an_open_round_goes_on_with_the_updates_it_had() -> None:
    noted = Noted()
    first = rounds(FLEET, ledger=noted)
    held = InterruptedRound({"ann": 10, "bob": 10, "cyd": 10}, noted.noted["digests"], {"ann": noted.noted["ann"]})
    again = Noted(held)
    second = rounds({**FLEET, "ann": never}, ledger=again, count=1)
    assert second[0].digest == first[0].digest
    assert again.steps == [("accept", 1, "bob"), ("close", 1, ("cyd",)), ("commit", 1)]


def test_a_closed_round_is_aggregated_without_asking_anybody() -> None:
    noted = Noted()
    whole = rounds(FLEET, ledger=noted)[0]
    updates = {name: noted.noted[name] for name in ("ann", "bob")}
    cohort = {"ann": 10, "bob": 10, "cyd": 10}
    held = InterruptedRound(cohort, noted.noted["digests"], updates, {"cyd": Failure.from_text("cyd", "no power")})
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
    held = InterruptedRound(cohort, noted.noted["digests"], updates, {"bad": failure}, sizes)
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
    held = InterruptedRound({"ann": 10, "bob": 10, "cyd": 10}, noted.noted["digests"], updates)
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
    held = InterruptedRound({"ann": 10, "bob": 10, "cyd": 10}, {**noted.noted["digests"], "bob": "f" * 64}, {})
    with pytest.raises(StoreError, match="round 1: expected to send bob what the journal notes"):
        rounds(FLEET, ledger=Noted(held))


def test_a_run_goes_on_from_a_state() -> None:
    whole = rounds(FLEET, count=3)
    rest = rounds(FLEET, count=3, start=whole[0].state)
    assert [result.round for result in rest] == [2, 3]
    assert rest[-1].digest == whole[-1].digest


def test_each_client_is_told_finished_once_and_only_what_is_used_is_kept() -> None:
    events, ledger = list[Any](), Noted()
    seeded({"ann": probing(Replicas()), "bob": probing()}, count=3, watch=events.append, ledger=ledger)
    finished = [event.outcome.client for event in events if isinstance(event, ClientFinished) and event.round == 3]
    assert finished == ["ann", "bob"]
    assert [step for step in ledger.steps if step[:2] == ("accept", 3)] == [("accept", 3, "ann"), ("accept", 3, "bob")]
