"""Receipts: signed, the same on every repeat, and right also after a restart."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from fedtune.link.envelopes import digest
from fedtune.link.rejections import RejectionError
from fedtune.link.server import receipts as receipt_store
from fedtune.link.server.receipts import Receipts
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import RUN, Harness, assignment, make_harness, reason, signed_reply, verdict

DATA = b"update of anna"


def test_a_receipt_is_dropped_after_many_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipt_store, "MAX_RECEIPTS", 2)
    receipts, header = Receipts({}, 0), pb.Header(round=1)
    for number in range(3):
        task = bytes([number])
        receipts.remember("anna", task, b"reply", receipts.give(RUN, "anna", b"reply", header, pb.LATE))
    assert receipts.find_receipt("anna", b"\0") is None
    assert receipts.find_receipt("anna", b"\2") is not None
    receipts.forget("anna", b"\2")
    assert receipts.find_receipt("anna", b"\2") is None


def test_the_last_round_never_goes_back() -> None:
    receipts = Receipts({}, 3)
    receipts.end_round(2)
    assert receipts.ended == 3
    receipts.end_round(4)
    assert receipts.ended == 4


def test_an_update_is_known_by_round_client_and_digest() -> None:
    receipts, digests = Receipts({}, 0), (b"a" * 32, b"b" * 32)
    header = pb.Header(round=2, parts=[pb.Part(key="update", digest=digests[0])])
    receipts.accept("anna", header)
    assert receipts.is_accepted("anna", header)
    assert not receipts.is_accepted("bob", header)
    assert not receipts.is_accepted("anna", pb.Header(round=1, parts=header.parts))
    assert not receipts.is_accepted("anna", pb.Header(round=2, parts=[pb.Part(key="update", digest=digests[1])]))


def test_a_receipt_is_signed_and_names_the_reply_and_the_journal(harness: Harness) -> None:
    harness.dispatcher.set_journal_end(lambda: (7, "ab" * 32))
    _, task, task_digest = harness.post("anna")
    sent = signed_reply("anna", task, task_digest, DATA)
    harness.submit("anna", sent, DATA)
    harness.dispatcher.settle("anna", 1, None)
    reply = harness.submit("anna", sent)
    assert reply is not None
    header = pb.Header.FromString(reply.receipt.header)
    assert (header.kind, header.to, header.run, header.author) == (pb.RECEIPT, "anna", RUN.run, "server")
    assert header.receipt.answer == digest(sent)
    assert (header.receipt.journal_records, header.receipt.journal_head.hex()) == (7, "ab" * 32)


def test_an_update_that_an_earlier_process_accepted_is_accepted_again_and_delivered_never(tmp_path: Path) -> None:
    harness = make_harness(tmp_path, accepted={(1, "anna"): sha256(DATA).hexdigest()}, ended=1)
    task, front = assignment("anna", 1), pb.Header(federation="care", run=RUN.run, round=1)
    assert task.header
    assert verdict(harness.submit("anna", signed_reply("anna", front, b"o" * 32, DATA))) == "ACCEPTED"
    assert verdict(harness.submit("anna", signed_reply("anna", front, b"p" * 32, b"other"))) == "LATE"


def test_an_accepted_reply_of_an_earlier_process_has_one_receipt(tmp_path: Path) -> None:
    harness = make_harness(tmp_path, accepted={(1, "anna"): sha256(DATA).hexdigest()}, ended=0)
    front = pb.Header(federation="care", run=RUN.run, round=1)
    sent = signed_reply("anna", front, b"o" * 32, DATA)
    first = harness.submit("anna", sent)
    assert verdict(first) == "ACCEPTED"
    assert harness.submit("anna", sent) == first
    with pytest.raises(RejectionError) as caught:  # the same bytes of another client do not count
        harness.submit("bob", signed_reply("bob", pb.Header(federation="care", run=RUN.run, round=7), b"o" * 32, DATA))
    assert reason(caught) == "ORDER_UNKNOWN"


def test_a_reply_that_was_accepted_stays_accepted_when_its_receipt_has_been_dropped(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later receipts push it out, even those of one client for tasks that it has invented."""
    monkeypatch.setattr(receipt_store, "MAX_RECEIPTS", 2)
    _, task, task_digest = harness.post("anna")
    sent = signed_reply("anna", task, task_digest, DATA)
    harness.submit("anna", sent, DATA)
    harness.dispatcher.settle("anna", 1, None)
    harness.dispatcher.end_round(1)
    assert verdict(harness.submit("anna", sent)) == "ACCEPTED"
    for number in range(3):
        front = pb.Header(federation="care", run=RUN.run, round=1)
        harness.submit("bob", signed_reply("bob", front, bytes([number]) * 32, DATA))
    assert verdict(harness.submit("anna", sent)) == "ACCEPTED"


def test_an_accepted_reply_is_accepted_again_after_a_restart_whatever_else_its_client_sent_before(
    tmp_path: Path,
) -> None:
    harness = make_harness(tmp_path, accepted={(1, "anna"): sha256(DATA).hexdigest()}, ended=1)
    front = pb.Header(federation="care", run=RUN.run, round=1)
    assert verdict(harness.submit("anna", signed_reply("anna", front, b"o" * 32, b"other"))) == "LATE"
    assert verdict(harness.submit("anna", signed_reply("anna", front, b"o" * 32, DATA))) == "ACCEPTED"


def test_an_order_that_outlasts_rounds_may_be_posted_after_a_restart() -> None:
    """Its site is asked to wait and not told that it is late: what it has trained will be used."""
    receipts = Receipts({}, 5, {"bob": 3})
    assert receipts.may_be_posted("bob", 3)
    assert receipts.may_be_posted("bob", 6)
    assert not receipts.may_be_posted("bob", 4)
    assert not receipts.may_be_posted("ann", 3)
    receipts.end_round(6, ["bob"])
    assert receipts.may_be_posted("bob", 3)
    receipts.end_round(7, [])
    assert not receipts.may_be_posted("bob", 3)
