from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from fedtune.errors import StoreError
from fedtune.messages import Client, Failure
from fedtune.methods.serialization import digest
from fedtune.rounds.journal import Ask
from fedtune.store.journal import canonical
from fedtune.store.run_journal import RunJournal
from fedtune.store.training_record import check_journal, training_record
from tests.store.test_verify import COHORT, ORDERS

INPUTS = {"recipe": "rounds = 2", "recipe_digest": "ab" * 32, "versions": "fedtune 0.3.0", "number": "cd" * 8}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with RunJournal.create(tmp_path, group_s=0) as ledger:
        ledger.begin(INPUTS)
        ledger.open(1, state="", cohort=COHORT, digests=ORDERS)
        ledger.accept(1, "ann", b"of ann")
        ledger.close(1, {"bob": Failure.from_text("bob", "late", kind="late")}, {"bob": 0})
        ledger.commit(1, [b"state 1"])
    return tmp_path


def test_a_round_is_the_number_and_the_digest_of_its_accepted_updates(run: Path) -> None:
    record = training_record(run)
    places = [["ann", sha256(b"of ann").hexdigest(), 0, 6]]
    assert record["rounds"] == [
        {
            "round": 1,
            "accepted": 1,
            "set": sha256(canonical({"updates": places})).hexdigest(),
            "state": digest([b"state 1"]),
        }
    ]
    assert (record["run"], record["recipe"], record["versions"]) == ("cd" * 8, "ab" * 32, "fedtune 0.3.0")
    assert "ann" not in str(record)


def test_the_stated_head_stays_in_a_journal_that_goes_on_and_not_in_another(run: Path, tmp_path: Path) -> None:
    record = training_record(run)
    with RunJournal.reopen(run) as ledger:
        ledger.begin(INPUTS)
    check_journal(run, record)
    (tmp_path / "other").mkdir()
    with RunJournal.create(tmp_path / "other", group_s=0) as ledger:
        ledger.begin(INPUTS)
    with pytest.raises(StoreError, match=r"expected the head .* after 5 records, as was signed; got nothing"):
        check_journal(tmp_path / "other", record)
    for stated in ({}, {"journal": 3}, {"journal": {"records": 1, "head": "00" * 32}}, {"journal": {"records": -1}}):
        with pytest.raises(StoreError, match="the journal was cut or written anew, or is another run's"):
            check_journal(run, stated)


def test_a_folder_without_a_journal_has_no_record(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="expected a run with a journal; got none"):
        training_record(tmp_path)


def test_a_round_of_an_asynchronous_run_has_the_updates_of_its_buffer(tmp_path: Path) -> None:
    """Bob's update came in the first round and was used in the second."""
    with RunJournal.create(tmp_path, group_s=0) as ledger:
        ledger.begin(INPUTS)
        both = Ask(1, 0.0, (Client("ann", 1), Client("bob", 1)), {"ann": "o", "bob": "o"})
        ledger.ask(both, state="")
        ledger.accept(1, "bob", b"of bob")
        ledger.accept(1, "ann", b"of ann")
        ledger.settle(1, ["ann"], {}, {})
        ledger.commit(1, [b"state 1"])
        ledger.ask(Ask(2, 1.0), state=digest([b"state 1"]))
        ledger.settle(2, ["bob"], {}, {})
        ledger.commit(2, [b"state 2"])
    first, second = training_record(tmp_path)["rounds"]
    for entry, name in ((first, "ann"), (second, "bob")):
        places = [[name, sha256(f"of {name}".encode()).hexdigest(), 0, 6]]
        assert (entry["accepted"], entry["set"]) == (1, sha256(canonical({"updates": places})).hexdigest())
