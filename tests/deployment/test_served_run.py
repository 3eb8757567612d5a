from __future__ import annotations

import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from fedtune.deployment.served_run import (
    accepted_updates,
    complete_summary,
    informed_clients,
    pin_base,
    pinned_base,
    plan_text,
    result_files,
    run_id,
    sign_result,
    unsettled_orders,
)
from fedtune.deployment.server_setup import data_at_sites
from fedtune.errors import StoreError
from fedtune.link.audit_log import AuditLog
from fedtune.link.client.policy import RESULT_FILE
from fedtune.link.pki.identity import load_identity
from fedtune.link.provenance import Signer, load_roster, verify_folder
from fedtune.messages import Client, Failure
from fedtune.rounds.journal import Ask
from fedtune.store import manifest
from fedtune.store.run_directory import write_summary
from fedtune.store.run_journal import RunJournal
from fedtune.store.training_record import check_journal, training_record
from fedtune.store.verify import status as run_status
from tests.deployment.test_coordinator import RECIPE, promised_state
from tests.link.ceremony import enroll_parties
from tests.store.test_run_journal import INPUTS


def test_sites_get_the_result_without_what_it_says_of_each_other(tmp_path: Path) -> None:
    assert result_files(tmp_path) == {}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"numbers")
    manifest.write(tmp_path / "adapter", {"round": 3, "clients": {"anna": {"examples": 7}}})
    files = result_files(tmp_path)
    assert bytes(files["adapter/adapter_model.safetensors"]) == b"numbers"
    (tmp_path / "site").mkdir()
    for name, data in files.items():
        (tmp_path / "site" / name.partition("/")[2]).write_bytes(bytes(data))
    opened = manifest.open_folder(tmp_path / "site")
    opened.check()
    assert opened.facts == {"round": 3}


def test_the_result_of_a_run_is_signed_for_its_sites_and_where_it_lies(tmp_path: Path) -> None:
    parties = enroll_parties(tmp_path / "parties")
    identity = load_identity(parties["server"], role="coordinator", now=int(time.time()))
    signer, roster = Signer("care", identity.name, identity.key), load_roster(parties["server"] / "roster", None)[0]
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"numbers")
    manifest.write(run / "adapter", {"round": 3, "clients": {"anna": {"examples": 7}}})
    with RunJournal.create(run) as ledger:
        ledger.begin({**INPUTS, "number": "ab" * 8})
    sign_result(run, signer)
    own = verify_folder(run / "adapter", roster)
    check_journal(run, own.predicate["training"])
    (tmp_path / "site").mkdir()
    for name, data in result_files(run, signer).items():
        # Sites of 0.2.0 take no other ends of names; later ones give the envelope its own name.
        assert RESULT_FILE.fullmatch(name)
        (tmp_path / "site" / name.partition("/")[2].replace(".dsse.json", ".dsse")).write_bytes(bytes(data))
    assert b"anna" not in b"".join(path.read_bytes() for path in (tmp_path / "site").iterdir())
    theirs = verify_folder(tmp_path / "site", roster)
    assert theirs.predicate["training"]["run"] == "ab" * 8
    assert theirs.files == own.files == 2


def test_a_damaged_result_goes_to_no_site(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"numbers")
    manifest.write(tmp_path / "adapter", {"round": 3})
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"number!")
    with pytest.raises(StoreError, match=r"adapter_model\.safetensors: expected the digest"):
        result_files(tmp_path)


def test_a_journal_promises_what_it_accepts(tmp_path: Path) -> None:
    assert accepted_updates(tmp_path) == ({}, 0)
    with RunJournal.create(tmp_path, group_s=0.0) as ledger:
        ledger.begin(INPUTS)
        cohort = {"anna": 1, "bob": 1}
        ledger.open(1, state="", cohort=cohort, digests={name: "o" for name in cohort})
        ledger.accept(1, "anna", b"of anna")
        ledger.close(1, {"bob": Failure.from_text("bob", "x")}, {"bob": 0})
        ledger.commit(1, [b"state"])
        ledger.open(2, state=promised_state(tmp_path), cohort=cohort, digests={name: "o" for name in cohort})
        ledger.accept(2, "bob", b"of bob")
    accepted, committed = accepted_updates(tmp_path)
    assert committed == 1
    assert accepted == {(1, "anna"): sha256(b"of anna").hexdigest(), (2, "bob"): sha256(b"of bob").hexdigest()}


def test_the_base_that_the_first_site_had_is_noted_and_is_not_in_the_text_that_sites_know(tmp_path: Path) -> None:
    (tmp_path / "link").mkdir()
    recipe, digest = data_at_sites(RECIPE), "ab" * 32
    assert pinned_base(tmp_path) == ""
    before = plan_text(recipe, tmp_path)
    pin_base(tmp_path, digest)
    pinned = replace(recipe, model=replace(recipe.model, digest=digest))
    assert (pinned_base(tmp_path), plan_text(pinned, tmp_path)) == (digest, before)
    own = replace(recipe, model=replace(recipe.model, digest="cd" * 32))  # by the operator
    assert "cd" * 32 in plan_text(own, tmp_path)


def test_who_knows_the_end_is_known_until_more_rounds_begin(tmp_path: Path) -> None:
    assert not informed_clients(tmp_path / "audit")
    for kinds, known in ((["anna", "bob"], {"anna", "bob"}), ([], set())):
        log = AuditLog(tmp_path / "audit")
        for name in kinds:
            log.record("informed", client=name)
        if not kinds:
            log.record("round", round=2)
        log.close()
        assert informed_clients(tmp_path / "audit") == known


def test_the_number_of_a_run_is_in_its_journal(tmp_path: Path) -> None:
    number = run_id(tmp_path)
    with RunJournal.create(tmp_path) as ledger:
        ledger.begin({**INPUTS, "number": number})
    assert run_status(tmp_path).run == number == run_id(tmp_path)
    for text in (b"0" * 16, b"", b"\xff", f"{number}0".encode()):
        (tmp_path / "link" / "id").write_bytes(text)
        with pytest.raises(StoreError, match=f"link/id: expected the run's number {number}, as the journal notes"):
            run_id(tmp_path)
    (tmp_path / "link" / "id").unlink()
    assert run_id(tmp_path) == number


def test_a_number_that_is_none_is_refused_also_where_no_journal_notes_it(tmp_path: Path) -> None:
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "id").write_bytes(b"../../etc/passwd")
    with pytest.raises(StoreError, match="expected a number of 16 hex digits"):
        run_id(tmp_path)


def test_a_finished_run_is_complete_while_its_summary_and_result_are_whole(tmp_path: Path) -> None:
    recipe = data_at_sites(RECIPE)
    with RunJournal.create(tmp_path) as ledger:
        ledger.begin(INPUTS)
        ledger.finish(0)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"numbers")
    manifest.write(tmp_path / "adapter", {"round": 3})
    write_summary(tmp_path, {"selection": {"ended": "no better"}})
    assert complete_summary(tmp_path, recipe) is not None
    # What is damaged is work: a resume writes it again.
    for name in ("summary.json", "adapter/adapter_model.safetensors", "adapter/fedtune.json"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-2])
        assert complete_summary(tmp_path, recipe) is None
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "summary.json").unlink()
    assert complete_summary(tmp_path, recipe) is None


def test_a_damaged_digest_of_the_base_is_one_sentence(tmp_path: Path) -> None:
    pin_base(tmp_path, "ab" * 32)
    for data in (b"\xff" * 64, b"ab", ("AB" * 32).encode()):
        (tmp_path / "link" / "base").write_bytes(data)
        with pytest.raises(StoreError, match="link/base: expected the digest of a base, 64 hex digits"):
            pinned_base(tmp_path)


def test_the_journal_of_an_asynchronous_run_names_the_round_of_each_order(tmp_path: Path) -> None:
    """An update of an order of round 1 that comes in round 2 is one of round 1 to its site."""
    assert unsettled_orders(tmp_path) == {}
    anna, bob = Client("anna", 1), Client("bob", 1)
    with RunJournal.create(tmp_path, group_s=0.0) as ledger:
        ledger.begin(INPUTS)
        ledger.ask(Ask(1, 0.0, (anna, bob), {"anna": "o", "bob": "o"}), state="")
        ledger.accept(1, "anna", b"of anna")
        ledger.settle(1, ["anna"], {}, {})
        ledger.commit(1, [b"state"])
        ledger.ask(Ask(2, 1.0, (anna,), {"anna": "o"}), state=promised_state(tmp_path))
        ledger.accept(2, "bob", b"of bob")
    assert unsettled_orders(tmp_path) == {"anna": 2, "bob": 1}
    accepted, committed = accepted_updates(tmp_path)
    assert committed == 1
    assert accepted == {(1, "anna"): sha256(b"of anna").hexdigest(), (1, "bob"): sha256(b"of bob").hexdigest()}
    assert [entry["accepted"] for entry in training_record(tmp_path)["rounds"]] == [1]
