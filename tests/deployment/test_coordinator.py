from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.deployment.coordinator import (
    accepted_updates,
    first_cohort_size,
    max_update_bytes,
    on_event,
    readiness_fault,
    refusal,
    run_id,
)
from fedtune.deployment.server_setup import data_at_sites
from fedtune.errors import WireError
from fedtune.link import uploads
from fedtune.link.pki import authority
from fedtune.link.pki.roster import RosterFile
from fedtune.link.server.dispatcher import Withdrawn
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    ClientUpdate,
    Failure,
    LoraResult,
    Plan,
    ProbeSeeds,
    SeedState,
    Traffic,
    Training,
    TrainLora,
)
from fedtune.rounds.admission import largest_update
from fedtune.rounds.loop import ClientFinished, Note, RoundFinished, RoundStarted
from fedtune.store.run_journal import RunJournal
from fedtune.wire.codec import encode_assignment
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import ceremony
from tests.link.conftest import Clock, answer, made
from tests.store.test_run_journal import INPUTS

RECORD: Mapping[str, Any] = {
    "clients": {},
    "cohort": [],
    "state_digest": "ab",
    "bytes_up": 1,
    "bytes_down": 2,
    "seconds": 0.1,
}
BLUEPRINT = Blueprint({"q": (6, 5)}, {"head": np.zeros((2, 3), np.float32)}, max_rank=4, seed=0)


def test_what_became_of_an_update_is_told_to_its_client(tmp_path: Path) -> None:
    desk, told = made(tmp_path), list[tuple[str, Mapping[str, Any]]]()

    def tell(kind: str, **fields: int | str) -> None:
        told.append((kind, fields))

    on_event(desk.hub, tell, RoundStarted(1, 3, ("anna", "bob", "carl")))
    sent = {}
    for name in ("anna", "bob", "carl"):
        _, order, asked = desk.post(name)
        assert order.cohort == 3
        sent[name] = answer(name, order, asked, b"data")
        if name != "carl":
            desk.submit(name, sent[name], b"data")
    on_event(
        desk.hub, tell, ClientFinished(1, AdmittedUpdate(ClientUpdate("anna", 1, 10, LoraResult({}))), Traffic(3, 4))
    )
    bad = Failure.from_text(
        "bob", "q.a: expected finite numbers; got 1 of 10 that are not", kind="refused", code="NOT_FINITE"
    )
    on_event(desk.hub, tell, ClientFinished(1, bad, Traffic(3, 4)))
    record = {**RECORD, "round": 1}
    on_event(desk.hub, tell, RoundFinished(record))
    on_event(desk.hub, tell, RoundFinished({**record, "round": 0}))
    on_event(desk.hub, tell, Note("a remark"))
    receipts = {}
    for name in sent:
        reply = desk.submit(name, sent[name])
        assert reply is not None
        receipts[name] = pb.Header.FromString(reply.receipt.header).receipt
    assert [receipts[name].verdict for name in sorted(receipts)] == [pb.ACCEPTED, pb.REFUSED, pb.LATE]
    assert receipts["bob"].refusal == refusal(bad)
    assert [kind for kind, _ in told] == ["round", "used", "unused", "committed", "note"]


def test_a_reason_in_words_is_taken_apart_for_the_schema() -> None:
    found = refusal(
        Failure.from_text("bob", "q.a: expected shape (2, 5); got (3, 5)", kind="refused", code="TENSOR_SHAPE")
    )
    assert (found.reason, found.field, found.expected, found.found) == (
        pb.TENSOR_SHAPE,
        "q.a",
        "shape (2, 5)",
        "(3, 5)",
    )
    assert refusal(Failure.from_text("bob", "odd", kind="refused")).reason == pb.MALFORMED


def test_a_journal_promises_what_it_accepts(tmp_path: Path) -> None:
    assert accepted_updates(tmp_path) == ({}, 0)
    with RunJournal.create(tmp_path, group_s=0.0) as ledger:
        ledger.begin(INPUTS)
        cohort = {"anna": 1, "bob": 1}
        ledger.open(1, state="", cohort=cohort, orders={name: "o" for name in cohort})
        ledger.accept(1, "anna", b"of anna")
        ledger.close(1, {"bob": Failure.from_text("bob", "x")}, {"bob": 0})
        ledger.commit(1, [b"state"])
        ledger.open(2, state=promised_state(tmp_path), cohort=cohort, orders={name: "o" for name in cohort})
        ledger.accept(2, "bob", b"of bob")
    accepted, committed = accepted_updates(tmp_path)
    assert committed == 1
    assert accepted == {(1, "anna"): sha256(b"of anna").hexdigest(), (2, "bob"): sha256(b"of bob").hexdigest()}


def promised_state(run: Path) -> str:
    from fedtune.store.history import replay_journal

    return replay_journal(run)[0].digests[-1]


def test_a_run_keeps_its_number(tmp_path: Path) -> None:
    first = run_id(tmp_path)
    assert len(first) == 16
    assert run_id(tmp_path) == first
    assert run_id(tmp_path / "other") != first


def test_the_largest_answer_follows_from_the_order() -> None:
    plan = Plan("anna", rank=3, scale=2.0, training=Training(batch=1, learning_rate=0.1, steps=7))
    asked = Assignment("flora", round=3, seed=0, plan=plan, task=TrainLora(a_key=0))
    assert max_update_bytes(encode_assignment(asked).header, BLUEPRINT) == largest_update(
        TrainLora, rank=3, steps=7, blueprint=BLUEPRINT
    )
    probe = ProbeSeeds(
        bank="hadamard", seeds=4, key=1, exponent=20, shift=1, perturbation=1,
        state=SeedState("whole", 0, b"\0" * 16, 2, b"d" * 32),
    )  # fmt: skip
    seeds = Assignment("fedkseed", round=3, seed=0, plan=plan, task=probe)
    assert max_update_bytes(encode_assignment(seeds).header, BLUEPRINT) == largest_update(
        ProbeSeeds, rank=1, steps=7, blueprint=BLUEPRINT
    )


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
    from fedtune.link.pki.identity import ROOT, root_key

    roster = RosterFile(places["server"] / "roster", root_key((places["server"] / ROOT).read_bytes()))
    assert first_cohort_size(data_at_sites(RECIPE), roster) == 2
    assert first_cohort_size(data_at_sites(RECIPE + "cohort = 1\n"), roster) == 1
    assert first_cohort_size(data_at_sites(RECIPE + "min_clients = 4\n"), roster) == 4


def test_a_server_is_unready_while_its_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = ceremony(tmp_path)
    from fedtune.link.pki.identity import ROOT, root_key

    roster = RosterFile(places["server"] / "roster", root_key((places["server"] / ROOT).read_bytes()))
    hub = made(tmp_path).hub
    assert readiness_fault(hub, roster) == ""
    monkeypatch.setattr(uploads, "free_bytes", lambda folder: 0)
    assert "disk" in readiness_fault(hub, roster)


def silent(kind: str, **fields: int | str) -> None:
    """Tell nobody."""


@pytest.mark.parametrize("kind", ["failed", "late"])
def test_an_update_that_failed_or_came_too_late_waits_for_the_end_of_its_round(tmp_path: Path, kind: Any) -> None:
    desk = made(tmp_path)
    _, order, asked = desk.post("anna")
    sent = answer("anna", order, asked, b"data")
    desk.submit("anna", sent, b"data")
    on_event(
        desk.hub, silent, ClientFinished(1, Failure.from_text("anna", "no answer in 60 s", kind=kind), Traffic(1, 2))
    )
    assert desk.submit("anna", sent) is None  # the round may ask for it again
    on_event(desk.hub, silent, RoundFinished({**RECORD, "round": 1}))
    reply = desk.submit("anna", sent)
    assert reply is not None
    assert pb.Header.FromString(reply.receipt.header).receipt.verdict == pb.LATE


def test_an_update_that_is_refused_for_its_size_beside_the_others_keeps_its_receipt(tmp_path: Path) -> None:
    desk = made(tmp_path)
    _, order, asked = desk.post("anna")
    sent = answer("anna", order, asked, b"data")
    desk.submit("anna", sent, b"data")
    on_event(
        desk.hub, silent, ClientFinished(1, AdmittedUpdate(ClientUpdate("anna", 1, 10, LoraResult({}))), Traffic(1, 2))
    )
    first = desk.submit("anna", sent)
    large = Failure.from_text(
        "anna", "expected a change of norm at most 3; got 9", kind="refused", code="NORM_OVER_CAP"
    )
    on_event(desk.hub, silent, ClientFinished(1, large, Traffic(1, 2)))
    assert desk.submit("anna", sent) == first
    assert first is not None
    assert pb.Header.FromString(first.receipt.header).receipt.verdict == pb.ACCEPTED


def test_the_line_before_the_first_round_ends_none(tmp_path: Path) -> None:
    desk = made(tmp_path)
    message_id, _, _ = desk.post("anna")
    on_event(desk.hub, silent, RoundFinished({**RECORD, "round": 0}))
    assert desk.hub.collect([message_id]) == {}
    on_event(desk.hub, silent, RoundFinished({**RECORD, "round": 1}))
    assert desk.hub.collect([message_id]) == {message_id: Withdrawn("anna", "its round has ended")}


def test_three_refused_updates_bar_their_client_over_the_rounds(tmp_path: Path) -> None:
    desk = made(tmp_path)
    for turn in (1, 2, 3):
        assert not desk.hub.bars.why("anna")
        on_event(desk.hub, silent, RoundStarted(turn, 3, ("anna",)))
        _, order, asked = desk.post("anna", turn)
        desk.submit("anna", answer("anna", order, asked, b"data"), b"data")
        bad = Failure.from_text("anna", "q.a: expected finite numbers; got 1", kind="refused", code="NOT_FINITE")
        on_event(desk.hub, silent, ClientFinished(turn, bad, Traffic(1, 2)))
        on_event(desk.hub, silent, RoundFinished({**RECORD, "round": turn}))
    assert "NOT_FINITE" in desk.hub.bars.why("anna")


def test_what_is_committed_is_told_in_numbers(tmp_path: Path) -> None:
    told = list[tuple[str, Mapping[str, Any]]]()
    record = {
        **RECORD,
        "round": 2,
        "cohort": ["anna", "bob", "carl"],
        "clients": {"anna": {"status": "ok"}, "bob": {"status": "late"}, "carl": {"status": "ok"}},
        "seconds": 1.2345,
    }
    on_event(made(tmp_path).hub, lambda kind, **fields: told.append((kind, fields)), RoundFinished(record))
    ((kind, fields),) = told
    assert kind == "committed"
    assert {name: fields[name] for name in ("round", "updates", "asked", "ms")} == {
        "round": 2,
        "updates": 2,
        "asked": 3,
        "ms": 1234,
    }


@pytest.mark.parametrize(
    ("reason", "field", "expected", "found"),
    [
        ("x" * 1000, "x" * 256, "", ""),
        (f"expected {'e' * 1000}; got {'f' * 1000}", "", "e" * 256, "f" * 256),
        ("a: b: expected c; got d; got e", "a: b", "c", "d; got e"),
        ("", "", "", ""),
    ],
)
def test_the_texts_of_a_refusal_are_cut(reason: str, field: str, expected: str, found: str) -> None:
    made = refusal(Failure.from_text("bob", reason, kind="refused", code="TENSOR_NAMES"))
    assert (made.field, made.expected, made.found) == (field, expected, found)
    assert not made.passing


def test_every_reason_of_an_update_that_is_refused_has_a_number_in_the_schema() -> None:
    from fedtune.rounds import admission, loop

    source = "".join(Path(str(module.__file__)).read_text() for module in (admission, loop))
    codes = {one for one in re.findall(r'"([A-Z][A-Z_]+)"', source) if "_" in one or one in ("MALFORMED", "SCALARS")}
    assert {"NOT_FINITE", "MALFORMED", "STATE_REBUILT", "WRONG_CLIENT"} <= codes
    for code in codes:
        assert pb.Reason.Name(refusal(Failure.from_text("bob", "x", kind="refused", code=code)).reason) == code


def test_an_update_that_was_refused_is_not_promised(tmp_path: Path) -> None:
    with RunJournal.create(tmp_path, group_s=0.0) as ledger:
        ledger.begin(INPUTS)
        ledger.open(1, state="", cohort={"anna": 1, "bob": 1}, orders={"anna": "o", "bob": "o"})
        assert accepted_updates(tmp_path) == ({}, 0)
        ledger.accept(1, "anna", b"of anna")
        assert accepted_updates(tmp_path) == (
            {(1, "anna"): sha256(b"of anna").hexdigest()},
            0,
        )  # durable before it is told
        ledger.close(1, {"bob": Failure.from_text("bob", "x", kind="refused", code="NOT_FINITE")}, {"bob": 3})
    assert accepted_updates(tmp_path) == ({(1, "anna"): sha256(b"of anna").hexdigest()}, 0)


def test_two_clients_with_the_same_bytes_are_both_promised(tmp_path: Path) -> None:
    with RunJournal.create(tmp_path, group_s=0.0) as ledger:
        ledger.begin(INPUTS)
        names = ("anna", "bob", "carl")
        ledger.open(1, state="", cohort=dict.fromkeys(names, 1), orders=dict.fromkeys(names, "o"))
        for name in names:
            ledger.accept(1, name, b"the same")
    assert accepted_updates(tmp_path)[0] == {(1, name): sha256(b"the same").hexdigest() for name in names}


def test_a_runs_number_is_hexadecimal_and_its_own(tmp_path: Path) -> None:
    found = {run_id(tmp_path / str(one)) for one in range(20)}
    assert len(found) == 20
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in found)
    path = tmp_path / "0" / "link" / "id"
    path.write_text("00112233445566aa\n")  # as an editor may leave it
    assert run_id(tmp_path / "0") == "00112233445566aa"


def test_what_is_no_assignment_has_no_largest_answer() -> None:
    with pytest.raises(WireError):
        max_update_bytes(b"\xff\xff", BLUEPRINT)


def test_a_server_is_unready_while_its_roster_has_expired_or_is_spoilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.link.pki.identity import ROOT, root_key

    places = ceremony(tmp_path)
    clock = Clock()
    roster = RosterFile(places["server"] / "roster", root_key((places["server"] / ROOT).read_bytes()), clock=clock)
    hub = made(tmp_path).hub
    monkeypatch.setattr(uploads, "free_bytes", lambda folder: 2**40)
    assert readiness_fault(hub, roster) == ""
    (places["server"] / "roster").write_bytes(b"spoilt")
    clock.now += 2
    roster.current()
    assert "roster" in readiness_fault(hub, roster)
    monkeypatch.setattr("fedtune.deployment.coordinator.time.time", lambda: roster.current().valid_until + 1)
    assert "expired" in readiness_fault(hub, roster)
