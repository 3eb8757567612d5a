from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import StoreError
from fedtune.messages import Failure
from fedtune.store.history import History, has_begun, replay_journal
from fedtune.store.journal import End, Journal
from fedtune.store.orders import Place

Step = tuple[str, Mapping[str, Any]]
ONE, TWO = "1" * 64, "2" * 64

START: Step = ("start", {"run": "r", "inputs": {"recipe": "x"}})
OPEN: Step = (
    "open",
    {"round": 1, "state": "0" * 64, "cohort": {"ann": 3, "bob": 4}, "orders": {"ann": "a", "bob": "b"}},
)
ACCEPT: Step = ("accept", {"round": 1, "blob": "u", "updates": [["bob", 0, 9]]})
CLOSE: Step = (
    "close",
    {"round": 1, "blob": "", "updates": [], "failures": {"ann": ["late", "no answer"]}, "sizes": {"ann": 7}},
)
COMMIT: Step = ("commit", {"round": 1, "state": ONE})
FINAL: Step = ("final", {"round": 1})
SECOND: Step = ("open", {"round": 2, "state": ONE, "cohort": {"ann": 3}, "orders": {"ann": "c"}})
REPLACE: Step = ("commit", {"round": 1, "state": TWO, "replaces": ONE})


def told(*steps: Step) -> History:
    history = History()
    for kind, fields in steps:
        history.apply(kind, fields)
    return history


def test_a_round_is_followed_from_open_to_commit() -> None:
    history = told(START, OPEN)
    assert history.open is not None
    assert (history.open.number, history.open.missing) == (1, ["ann", "bob"])
    history.apply(*ACCEPT)
    assert history.open.missing == ["ann"]
    assert history.open.updates == {"bob": Place("u", 0, 9)}
    history.apply(*CLOSE)
    assert history.open.missing == []
    assert history.open.failures == {"ann": Failure.from_text("ann", "no answer", kind="late")}
    assert history.open.sizes == {"ann": 7}
    assert (history.committed, history.repeatable) == (0, None)
    history.apply(*COMMIT)
    assert (history.committed, history.digests) == (1, [ONE])
    assert told(START, OPEN, ACCEPT, CLOSE, COMMIT).open is None


def test_the_state_of_a_round_that_is_done_again_can_be_replaced() -> None:
    history = told(START, OPEN, ACCEPT, CLOSE, COMMIT, REPLACE)
    assert (history.digests, history.repeatable) == ([TWO], history.round)
    assert TWO in history.needed()
    assert ONE not in history.needed()


def test_what_is_needed_follows_the_round() -> None:
    update = {"u": "the update of bob in round 1"}
    assert told(START, OPEN).needed() == {}
    assert told(START, OPEN, ACCEPT).needed() == update
    committed = told(START, OPEN, ACCEPT, CLOSE, COMMIT)
    assert committed.needed() == update | {ONE: "the state of round 1"}
    assert committed.repeatable is committed.round
    committed.apply(*SECOND)
    assert committed.needed() == {ONE: "the state of round 1"}
    committed.apply("close", {"round": 2, "blob": "v", "updates": [["ann", 0, 1]], "failures": {}, "sizes": {}})
    committed.apply("commit", {"round": 2, "state": TWO})
    kept = {ONE: "the state of round 1", TWO: "the state of round 2", "v": "the update of ann in round 2"}
    assert committed.needed() == kept
    committed.apply("final", {"round": 2})
    assert committed.needed() == {TWO: "the state of round 2"}
    assert committed.finished


def test_a_finished_run_may_get_more_rounds() -> None:
    history = told(START, OPEN, ACCEPT, CLOSE, COMMIT, FINAL, START, SECOND)
    assert not history.finished
    assert history.open is not None


@pytest.mark.parametrize(
    ("before", "step", "message"),
    [
        ([], OPEN, "to begin with start; got open"),
        ([START], ("start", {"run": "other", "inputs": {}}), "expected the run r; got other"),
        (
            [START],
            ("vote", {}),
            "of the kinds start, open, accept, close, ask, settle, commit, final, keep; got 'vote'",
        ),
        ([START], SECOND, "expected round 1 to begin once, after round 0 is committed; got 2"),
        ([START, OPEN], OPEN, "expected round 1 to begin once"),
        ([START], ("open", {**OPEN[1], "orders": {"ann": "a"}}), "expected an assignment for each client"),
        ([START, OPEN, ACCEPT, CLOSE, COMMIT], ("open", {**SECOND[1], "state": TWO}), "to start from the state 1111"),
        ([START], ACCEPT, "expected a round that waits for clients; got round 1"),
        ([START, OPEN, ACCEPT], ACCEPT, "expected one update of each client .* got another of bob"),
        ([START, OPEN], ("accept", {**ACCEPT[1], "updates": [["eve", 0, 1]]}), "got another of eve"),
        ([START, OPEN, ACCEPT, CLOSE], ACCEPT, "expected a round that waits for clients"),
        ([START, OPEN], CLOSE, "expected an update or a failure of each client"),
        (
            [START, OPEN, ACCEPT],
            ("close", {**CLOSE[1], "failures": {"ann": ["late", ""], "bob": ["late", ""]}}),
            "each",
        ),
        (
            [START, OPEN, ACCEPT],
            ("close", {**CLOSE[1], "sizes": {}}),
            r"from each of \['ann'\]; got those of \[\]",
        ),
        ([START, OPEN, ACCEPT], COMMIT, "expected a round to be closed before it is committed; got round 1"),
        ([START, OPEN, ACCEPT, CLOSE, COMMIT], COMMIT, "expected a round to be closed"),
        ([START, OPEN, ACCEPT, CLOSE], REPLACE, "expected the state of the last round to be replaced; got round 1"),
        ([START, OPEN, ACCEPT, CLOSE, COMMIT, SECOND], REPLACE, "state of the last round to be replaced"),
        ([START, OPEN, ACCEPT, CLOSE, COMMIT, FINAL], REPLACE, "state of the last round to be replaced"),
        ([START, OPEN, ACCEPT, CLOSE, COMMIT, REPLACE], REPLACE, "state of the last round to be replaced"),
        ([START], ("keep", {"round": 0}), "expected to keep the state of round 0; got round 0"),
        ([START, OPEN, ACCEPT, CLOSE], ("keep", {"round": 1}), "expected to keep the state of round 0; got round 1"),
        ([START, OPEN, ACCEPT, CLOSE, COMMIT], ("keep", {"round": 2}), "of round 1; got round 2"),
        ([START, OPEN], FINAL, "expected a run to end after round 0; got 1"),
        ([START], ("open", {"round": 1}), r"expected the fields of open; got \['round'\]"),
        ([START, OPEN], ("accept", {"round": 1, "blob": "u", "updates": [["bob"]]}), "expected the fields of accept"),
    ],
)
def test_what_cannot_follow_is_refused_and_changes_nothing(before: list[Step], step: Step, message: str) -> None:
    history = told(*before)
    kept = deepcopy(history)
    with pytest.raises(StoreError, match=message):
        history.apply(*step)
    assert history == kept


def test_a_journal_is_replayed_and_a_fault_names_its_record(tmp_path: Path) -> None:
    assert not has_begun(tmp_path)
    with pytest.raises(StoreError, match="expected a run that can be resumed; got a folder without a journal"):
        replay_journal(tmp_path)
    journal = Journal(tmp_path / "journal", End())
    assert not has_begun(tmp_path)
    for kind, fields in (START, OPEN, ACCEPT):
        journal.append(kind, fields)
    assert has_begun(tmp_path)
    history, end = replay_journal(tmp_path)
    assert history == told(START, OPEN, ACCEPT)
    assert (end.count, end.epoch) == (3, 1)
    journal.append(*OPEN)
    journal.close()
    with pytest.raises(StoreError, match=r"journal, record 3 \(open\): expected round 1 to begin once"):
        replay_journal(tmp_path)
