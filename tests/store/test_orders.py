"""The orders of an asynchronous run in its journal: what follows from the records, and which ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import StoreError
from fedtune.messages import Client, Failure
from fedtune.methods import serialization as states
from fedtune.rounds.journal import UNFIT, Ask, OpenOrders
from fedtune.store.blobs import Blobs
from fedtune.store.history import History, replay_journal
from fedtune.store.orders import Place, ask_fields, grouped_asks, read_ask
from fedtune.store.run_journal import RunJournal

ANN, BOB, CYD = Client("ann", 3, 2**30, "north"), Client("bob", 4), Client("cyd", 5)


def ask(round: int, *clients: Client, now_s: float = 0.0) -> Ask:
    return Ask(round, now_s, clients, {client.name: f"order of {client.name}" for client in clients})


def state(round: int) -> list[bytes]:
    return [f"state {round}".encode()]


def digest(round: int) -> str:
    return states.digest(state(round)) if round else "start"


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    (tmp_path / "run").mkdir()
    with RunJournal.create(tmp_path / "run", group_s=0.0) as journal:
        journal.begin({"recipe": "..."})
        yield journal


def began(journal: Any) -> Any:
    """One round is over: cyd works on the first version; ann and bob on the second, of which ann has answered."""
    journal.ask(ask(1, ANN, BOB, CYD), state=digest(0))
    journal.accept(1, "ann", b"first of ann")
    journal.accept(1, "bob", b"first of bob")
    journal.settle(1, ["ann", "bob"], {}, {})
    journal.commit(1, state(1))
    journal.ask(ask(2, ANN, BOB, now_s=1.5), state=digest(1))
    journal.accept(2, "ann", b"second of ann")
    return journal


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_an_ask_reads_back_as_it_was() -> None:
    orders = ask(3, ANN, BOB, CYD, now_s=0.1 + 0.2)
    sent = read_ask(ask_fields(orders), 0, {})
    assert grouped_asks(sent.values()) == (orders,)
    assert "memory" not in ask_fields(ask(1, BOB))


def test_a_resumed_run_finds_every_order_and_update(journal: Any, run: Path) -> None:
    began(journal)
    known = journal.open_orders(2)
    assert known.earlier == (ask(1, CYD),)
    assert known.asks == [ask(2, ANN, BOB, now_s=1.5)]
    assert known.updates == {"ann": b"second of ann"}
    assert known.used is None
    journal.ask(ask(2, now_s=2.0), state=digest(1))
    assert journal.open_orders(2).asks[1] == Ask(2, 2.0)
    journal.accept(2, "cyd", b"first of cyd")
    journal.settle(2, ["ann", "cyd"], {"bob": Failure.from_text("bob", "no power")}, {"bob": 7})
    for committed in (False, True):
        known = journal.open_orders(2)
        assert (known.used, known.sizes) == (["ann", "cyd"], {"bob": 7})
        assert known.updates == {"ann": b"second of ann", "cyd": b"first of cyd"}
        assert known.failures["bob"].reason == "no power"
        assert known.earlier == (ask(1, CYD),)
        if not committed:
            journal.commit(2, state(2))
    assert journal.open_orders(3) == OpenOrders()
    assert replay_journal(run)[0].sent == {}


def test_a_state_stays_as_long_as_an_order_starts_from_it(journal: Any, run: Path) -> None:
    began(journal)
    journal.accept(2, "cyd", b"first of cyd")
    journal.settle(2, ["ann", "cyd"], {}, {})
    journal.commit(2, state(2))
    for round in (3, 4):
        journal.ask(ask(round, ANN if round == 3 else CYD), state=digest(round - 1))
        journal.accept(round, "ann" if round == 3 else "cyd", b"...")
        journal.settle(round, ["ann" if round == 3 else "cyd"], {}, {})
        journal.commit(round, state(round))
    # Bob still works on the second version.
    assert journal.version(1) == b"state 1"
    journal.ask(ask(5, ANN), state=digest(4))
    held = set(Blobs(run / "blobs").present())
    assert held == {digest(1), digest(4)}
    journal.settle(
        5, [], {"bob": Failure.from_text("bob", "gone"), "ann": Failure.from_text("ann", "gone")}, {"bob": 0, "ann": 0}
    )
    journal.commit(5, state(5))
    journal.ask(ask(6, ANN), state=digest(5))
    with pytest.raises(StoreError, match="which an order starts from"):
        journal.version(1)


def test_who_is_waited_for_are_those_at_work_without_an_answer(journal: Any, run: Path) -> None:
    began(journal)
    assert replay_journal(run)[0].missing == ["cyd", "bob"]


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "an order beside another": (lambda j: j.ask(ask(2, CYD), state=digest(1)), "without an order; got another for cyd"),
    "a second update": (lambda j: j.accept(2, "ann", b"again"), "one update of each client in .* got another of ann"),
    "an update of nobody": (lambda j: j.accept(2, "eve", b"..."), "got another of eve"),
    "a buffer without an update": (lambda j: j.settle(2, ["bob"], {}, {}), "a buffer of accepted updates.* got bob"),
    "a buffer with one twice": (lambda j: j.settle(2, ["ann", "ann"], {}, {}), "a buffer of accepted updates"),
    "a failure of nobody": (
        lambda j: j.settle(2, ["ann"], {"eve": Failure.from_text("eve", "x")}, {"eve": 0}),
        "with an order; got eve",
    ),
    "a failure in the buffer": (
        lambda j: j.settle(2, ["ann"], {"ann": Failure.from_text("ann", "x")}, {"ann": 0}),
        "with an order; got ann",
    ),
    "an ask from another state": (lambda j: j.ask(ask(2), state=digest(0)), "expected round 2 to ask clients"),
    "an ask of another round": (
        lambda j: j.ask(ask(3), state=digest(1)),
        "a round that waits for clients; got round 3",
    ),
    "a close": (lambda j: j.close(2, {}, {}), "to settle a buffer; got one that is closed"),
    "a commit before the buffer": (lambda j: j.commit(2, state(2)), "to be closed before it is committed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_record_that_cannot_follow_is_refused_and_leaves_no_trace(journal: Any, run: Path, name: str) -> None:
    began(journal)
    step, text = REFUSED[name]
    before = journal.end
    with pytest.raises(StoreError, match=text):
        step(journal)
    assert journal.end == before
    # The record that is refused may hold an update that waits to be written.
    journal._waiting.clear()
    journal.accept(2, "bob", b"second of bob")
    journal.settle(2, ["ann", "bob"], {}, {})
    assert list(replay_journal(run)[0].sent) == ["cyd"]


def test_a_round_that_waits_for_all_does_not_follow_one_that_left_clients_at_work(journal: Any) -> None:
    began(journal)
    journal.settle(2, ["ann"], {}, {})
    journal.commit(2, state(2))
    with pytest.raises(StoreError, match="while bob works"):
        journal.open(3, state=digest(2), cohort={"ann": 3}, digests={"ann": "x"})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"orders": {}}, "expected an order for each client"),
        ({"now": "nan"}, "expected the fields of ask"),
        ({"now": "soon"}, "expected the fields of ask"),
        ({"clients": {"ann": "many"}, "orders": {"ann": "x"}}, "expected the fields of ask"),
        ({"round": 2}, "expected round 1 to begin once"),
    ],
)
def test_a_damaged_record_is_refused(change: dict[str, Any], text: str) -> None:
    history = History()
    history.apply("start", {"run": "r", "inputs": {}})
    with pytest.raises(StoreError, match=text):
        history.apply("ask", {**ask_fields(ask(1, ANN)), "state": "start", **change})
    assert (history.sent, history.round) == ({}, None)


def test_an_unfit_client_has_an_order_that_says_so() -> None:
    history = History()
    history.apply("start", {"run": "r", "inputs": {}})
    history.apply("ask", {**ask_fields(Ask(1, 0.0, (ANN,), {"ann": UNFIT})), "state": "start"})
    assert history.sent["ann"].order == UNFIT
    history.apply("accept", {"round": 1, "blob": "b", "updates": [["ann", 0, 3]]})
    assert history.sent["ann"].update == Place("b", 0, 3)
