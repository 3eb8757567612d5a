"""Replies on their way: pushed within a window, and the same bytes after a restart."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.errors import WireError
from fedtune.link.client import delivery
from fedtune.link.client.bandwidth import Bandwidth
from fedtune.link.client.delivery import Delivery, OutgoingUpload
from fedtune.link.client.jobs import Job
from fedtune.link.envelopes import digest
from fedtune.link.pki.roster import Party
from fedtune.link.pki.signing import public_bytes
from fedtune.link.server.assignments import ReceivedParts
from fedtune.link.server.receipts import Receipts
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import KEY, RUN, Clock, signed_reply
from tests.link.link_server import LinkServer
from tests.link.site import END_S, collect_one, post, run_site, until


@pytest.mark.guarantee("G13")
def test_after_a_restart_the_same_bytes_are_sent_and_nothing_is_done_again(link: LinkServer) -> None:
    with run_site(link) as first:
        message_id = post(link)
        result = collect_one(link, message_id)
    assert isinstance(result, ReceivedParts)
    with run_site(link) as second:
        until(link, lambda: "sending" in second.kinds())
        link.dispatcher.settle("site-a", 1, None)
        until(link, lambda: "receipt" in second.kinds())
        assert not second.trainer.done
    sent = [fields["answer"] for one in (first, second) for kind, fields in one.events if kind == "sending"]
    assert len(set(sent)) == 1


TASK = b"t" * 32
ROUND = pb.Header(federation="care", run=RUN.run, round=1, order=TASK)


def deliver(reply: pb.Envelope, responses: list[pb.SubmitReply]) -> list[str]:
    """Deliver a reply to a server that gives these responses, and return what happened in which order."""
    steps: list[str] = []
    coordinator = Party("server", "org-server", "coordinator", public_bytes(KEY), ("1",), 0, 1)
    session: Any = SimpleNamespace(
        identity=SimpleNamespace(name="site-a"),
        find_coordinator=lambda _: coordinator,
        hear_version=lambda version: None,
    )
    backoff: Any = SimpleNamespace(retry=lambda job, call: call())
    durable: Any = SimpleNamespace(join=lambda: steps.append("durable"))

    def submit(request: pb.SubmitRequest, timeout: float) -> pb.SubmitReply:
        steps.append("submit")
        return responses.pop(0)

    calls: Any = SimpleNamespace(submit=submit)
    delivery = Delivery(session, calls, backoff, Bandwidth(None), record=lambda kind, **fields: None)
    job = Job(TASK, ROUND, threading.Event())
    assert delivery.deliver(job, pb.SubmitRequest(envelope=reply), {}, durable=durable) is not None
    return steps


def receipt_of(reply: bytes) -> pb.SubmitReply:
    return pb.SubmitReply(receipt=Receipts({}, 0).give(RUN, "site-a", reply, ROUND, pb.ACCEPTED))


def test_a_reply_is_on_the_disk_before_it_is_submitted_as_whole() -> None:
    reply = signed_reply("site-a", ROUND, TASK, b"data")
    responses = [pb.SubmitReply(wanted=pb.Wanted()), receipt_of(digest(reply))]
    assert deliver(reply, responses) == ["submit", "durable", "submit"]


def test_a_reason_to_wait_that_lasts_is_recorded_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """A roster that has ended put a reply off each second, and filled the site's log with a line for each."""
    monkeypatch.setattr(delivery, "REFUSED_RETRY_S", 0)
    clock, recorded = Clock(), list[str]()
    session: Any = SimpleNamespace(hear_version=lambda version: None)
    backoff: Any = SimpleNamespace(retry=lambda job, call: call())
    codes = [pb.ROSTER_OLD] * 700 + [pb.DISK_LOW] * 2
    free = iter(range(1000))

    def submit(request: pb.SubmitRequest, timeout: float) -> pb.SubmitReply:
        clock.now += 1
        code = codes.pop(0) if codes else pb.SIGNATURE
        refusal = pb.Refusal(reason=code, found=str(next(free)), passing=code != pb.SIGNATURE)
        return pb.SubmitReply(refusal=refusal)

    calls: Any = SimpleNamespace(submit=submit)
    site = Delivery(
        session, calls, backoff, Bandwidth(None), record=lambda kind, **fields: recorded.append(kind), clock=clock
    )
    assert site.deliver(Job(TASK, ROUND, threading.Event()), pb.SubmitRequest(), {}) is None
    assert recorded.count("put off") == 4  # two reasons; the first lasted for more than ten minutes


def test_a_receipt_of_another_reply_is_refused() -> None:
    reply, other = (signed_reply("site-a", ROUND, TASK, data) for data in (b"data", b"other"))
    with pytest.raises(WireError, match="expected a receipt of this reply"):
        deliver(reply, [receipt_of(digest(other))])


LIMITS = pb.Limits(part_bytes=10, window_bytes=20)


def upload(folder: Path, data: bytes, offset: int = 0) -> OutgoingUpload:
    path = folder / "update"
    path.write_bytes(data)
    return OutgoingUpload(path, b"reply", pb.Want(digest=b"part", offset=offset), LIMITS, Bandwidth(None))


def test_the_first_message_names_the_part_and_the_others_only_carry_on(tmp_path: Path) -> None:
    outgoing = upload(tmp_path, bytes(range(21)), offset=3)
    first, second = outgoing.messages()
    assert (first.answer, first.digest, first.offset, first.data) == (b"reply", b"part", 3, bytes(range(3, 13)))
    assert (second.answer, second.digest, second.data) == (b"", b"", bytes(range(13, 21)))
    assert outgoing.sent == 21


def test_a_part_that_the_server_has_whole_is_still_announced(tmp_path: Path) -> None:
    (only,) = upload(tmp_path, b"whole", offset=5).messages()
    assert (only.offset, only.data) == (5, b"")


def test_no_more_than_a_window_is_sent_without_an_acknowledgement(tmp_path: Path) -> None:
    outgoing, sent = upload(tmp_path, bytes(100)), list[pb.PushPart]()
    thread = threading.Thread(target=lambda: sent.extend(outgoing.messages()))
    thread.start()
    while outgoing.sent < 30:  # one message beyond the window: its sender waits before the next
        thread.join(0.01)
    thread.join(0.1)
    assert thread.is_alive()
    assert outgoing.sent == 30
    outgoing.acknowledge(100)
    thread.join(END_S)
    assert sum(len(message.data) for message in sent) == 100


def test_an_upload_that_has_ended_lets_its_sender_go(tmp_path: Path) -> None:
    outgoing = upload(tmp_path, bytes(100))
    thread = threading.Thread(target=lambda: list(outgoing.messages()))
    thread.start()
    outgoing.end()
    thread.join(END_S)
    assert not thread.is_alive()
