from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.admit import largest_update
from fedtune.coordinator import expected_of, follow, most, number, promised, refusal, unready
from fedtune.link import authority, spool
from fedtune.link.roster import RosterFile
from fedtune.round import (
    Assignment,
    Blueprint,
    ClientUpdate,
    Failure,
    LocalAdapter,
    Plan,
    Probe,
    SeedState,
    Traffic,
    Training,
)
from fedtune.rounds import ClientFinished, Note, RoundFinished, RoundStarted
from fedtune.serving import at_the_sites
from fedtune.store.ledger import RunLedger
from fedtune.wire.messages import encode_assignment
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import ceremony
from tests.link.conftest import answer, made
from tests.store.test_ledger import INPUTS

BLUEPRINT = Blueprint({"q": (6, 5)}, {"head": np.zeros((2, 3), np.float32)}, max_rank=4, seed=0)


def test_what_became_of_an_update_is_told_to_its_client(tmp_path: Path) -> None:
    desk, told = made(tmp_path), list[tuple[str, Mapping[str, Any]]]()

    def tell(kind: str, **fields: int | str) -> None:
        told.append((kind, fields))

    follow(desk.hub, tell, RoundStarted(1, 3, ("anna", "bob", "carl")))
    sent = {}
    for name in ("anna", "bob", "carl"):
        _, order, asked = desk.post(name)
        assert order.cohort == 3
        sent[name] = answer(name, order, asked, b"data")
        if name != "carl":
            desk.submit(name, sent[name], b"data")
    follow(desk.hub, tell, ClientFinished(1, ClientUpdate("anna", 1, 10, {}), Traffic(3, 4)))
    bad = Failure("bob", "q.a: expected finite numbers; got 1 of 10 that are not", kind="refused", code="NOT_FINITE")
    follow(desk.hub, tell, ClientFinished(1, bad, Traffic(3, 4)))
    record = {
        "round": 1,
        "clients": {},
        "cohort": [],
        "state_digest": "ab",
        "bytes_up": 1,
        "bytes_down": 2,
        "seconds": 0.1,
    }
    follow(desk.hub, tell, RoundFinished(record))
    follow(desk.hub, tell, RoundFinished({**record, "round": 0}))
    follow(desk.hub, tell, Note("a remark"))
    receipts = {}
    for name in sent:
        reply = desk.submit(name, sent[name])
        assert reply is not None
        receipts[name] = pb.Header.FromString(reply.receipt.header).receipt
    assert [receipts[name].verdict for name in sorted(receipts)] == [pb.ACCEPTED, pb.REFUSED, pb.LATE]
    assert receipts["bob"].refusal == refusal(bad)
    assert [kind for kind, _ in told] == ["round", "used", "unused", "committed", "note"]


def test_a_reason_in_words_is_taken_apart_for_the_schema() -> None:
    found = refusal(Failure("bob", "q.a: expected shape (2, 5); got (3, 5)", kind="refused", code="TENSOR_SHAPE"))
    assert (found.reason, found.field, found.expected, found.found) == (
        pb.TENSOR_SHAPE,
        "q.a",
        "shape (2, 5)",
        "(3, 5)",
    )
    assert refusal(Failure("bob", "odd", kind="refused")).reason == pb.MALFORMED


def test_a_journal_promises_what_it_accepts(tmp_path: Path) -> None:
    assert promised(tmp_path) == ({}, 0)
    with RunLedger.create(tmp_path, group_s=0.0) as ledger:
        ledger.begin(INPUTS)
        cohort = {"anna": 1, "bob": 1}
        ledger.open(1, state="", cohort=cohort, orders={name: "o" for name in cohort})
        ledger.accept(1, "anna", b"of anna")
        ledger.close(1, {"bob": Failure("bob", "x")}, {"bob": 0})
        ledger.commit(1, [b"state"])
        ledger.open(2, state=promised_state(tmp_path), cohort=cohort, orders={name: "o" for name in cohort})
        ledger.accept(2, "bob", b"of bob")
    from hashlib import sha256

    accepted, committed = promised(tmp_path)
    assert committed == 1
    assert accepted == {(1, "anna"): sha256(b"of anna").hexdigest(), (2, "bob"): sha256(b"of bob").hexdigest()}


def promised_state(run: Path) -> str:
    from fedtune.store.history import replayed

    return replayed(run)[0].digests[-1]


def test_a_run_keeps_its_number(tmp_path: Path) -> None:
    first = number(tmp_path)
    assert len(first) == 16
    assert number(tmp_path) == first
    assert number(tmp_path / "other") != first


def test_the_largest_answer_follows_from_the_order() -> None:
    plan = Plan("anna", rank=3, scale=2.0, training=Training(batch=1, learning_rate=0.1, steps=7))
    asked = Assignment("flora", round=3, seed=0, plan=plan, local=LocalAdapter(a_key=0))
    assert most(encode_assignment(asked).header, BLUEPRINT) == largest_update(asked, BLUEPRINT)
    probe = Probe(
        bank="hadamard", seeds=4, key=1, exponent=20, shift=1, perturbation=1,
        state=SeedState("whole", 0, b"\0" * 16, 2, b"d" * 32),
    )  # fmt: skip
    seeds = Assignment("fedkseed", round=3, seed=0, plan=plan, local=LocalAdapter(a_key=0), probe=probe)
    assert most(encode_assignment(seeds).header, BLUEPRINT) == largest_update(seeds, BLUEPRINT)


RECIPE = """
[model]
base = "none"
[adapter]
rank = 2
targets = ["q"]
[method]
name = "flora"
[client]
steps = 1
batch = 1
learning_rate = 0.1
[rounds]
count = 1
"""


def test_all_means_everybody_in_the_roster(tmp_path: Path) -> None:
    places = ceremony(tmp_path, clients=("a", "b", "c"))
    authority.revoke(places["ca"], "c", now=2_000_000_000)
    (places["server"] / "roster").write_bytes((places["ca"] / "roster").read_bytes())
    from fedtune.link.identity import ROOT, root_key

    roster = RosterFile(places["server"] / "roster", root_key((places["server"] / ROOT).read_bytes()))
    assert expected_of(at_the_sites(RECIPE), roster) == 2
    assert expected_of(at_the_sites(RECIPE + "cohort = 1\n"), roster) == 1
    assert expected_of(at_the_sites(RECIPE + "min_clients = 4\n"), roster) == 4


def test_a_server_is_unready_while_its_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = ceremony(tmp_path)
    from fedtune.link.identity import ROOT, root_key

    roster = RosterFile(places["server"] / "roster", root_key((places["server"] / ROOT).read_bytes()))
    hub = made(tmp_path).hub
    assert unready(hub, roster) == ""
    monkeypatch.setattr(spool, "room", lambda folder: 0)
    assert "disk" in unready(hub, roster)
