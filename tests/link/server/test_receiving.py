"""Transfers over real gRPC: one bad member with every trick it has, and an honest one beside it."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from fedtune.link.envelopes import digest
from fedtune.link.rejections import RejectionError, rejection
from fedtune.link.server import receiving
from fedtune.link.server.limits import OpenCalls
from fedtune.link.server.receiving import receive
from fedtune.link.settings import LinkSettings
from fedtune.link.uploads import part_path
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import assignment, make_harness, signed_reply
from tests.link.link_server import SETTINGS, LinkServer, run_link_server
from tests.link.server.test_service import Sender, begun, parts, post_task, reason, until
from tests.link.site import END_S

DATA = bytes(range(256)) * 4000


def trickle(*messages: pb.PushPart, ends: threading.Event, each: pb.PushPart) -> Iterator[pb.PushPart]:
    """Yield messages, and then one more every few milliseconds."""
    yield from messages
    while not ends.wait(0.005):
        yield each


def pushing(link: LinkServer, name: str, messages: Iterator[pb.PushPart]) -> tuple[threading.Thread, list[pb.PushAck]]:
    """Push in a thread; the acknowledgements are in the list when it has ended."""
    acks, calls = list[pb.PushAck](), link.calls(name)
    thread = threading.Thread(target=lambda: acks.extend(calls.push(messages, timeout=60)))
    thread.start()
    return thread, acks


def test_an_upload_that_is_cut_while_its_file_is_opened_leaves_none_open(monkeypatch: pytest.MonkeyPatch) -> None:
    opens, closes, goes_on = threading.Event(), list[str](), threading.Event()

    class Slow:
        def __init__(self, path: Path, part: pb.Part, offset: int) -> None:
            opens.set()
            goes_on.wait(END_S)

        def close(self) -> None:
            closes.append("closed")

    async def cut() -> None:
        with ThreadPoolExecutor(1) as disk:
            task = asyncio.create_task(receiving.open_upload(disk, Path(), pb.Part(), 0))
            await asyncio.to_thread(opens.wait, END_S)
            task.cancel()
            goes_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task

    monkeypatch.setattr("fedtune.link.uploads.IncomingUpload", Slow)
    asyncio.run(cut())
    assert closes == ["closed"]


@pytest.mark.guarantee("G14")
@pytest.mark.parametrize("data", [b"", b"x"])
def test_messages_without_bytes_do_not_keep_a_place(tmp_path: Path, data: bytes) -> None:
    with run_link_server(tmp_path, replace(SETTINGS, stall_s=0.2)) as link:
        _, first = begun(link, "site-a", DATA)
        ends = threading.Event()
        thread, acks = pushing(link, "site-a", trickle(first, ends=ends, each=pb.PushPart(data=data)))
        thread.join()
        ends.set()
    assert reason(acks[-1].refusal) in ("STALLED", "LENGTH")


@pytest.mark.guarantee("G14")
def test_tiny_messages_are_refused_long_before_they_fill_the_memory(link: LinkServer) -> None:
    _, first = begun(link, "site-a", DATA)
    tiny = pb.PushPart(data=b"x")
    acks = list(link.calls().push(iter([first, *[tiny] * 1000]), timeout=30))
    assert reason(acks[-1].refusal) == "LENGTH"
    assert "messages of 4096 bytes or more" in acks[-1].refusal.expected


@pytest.mark.guarantee("G14")
def test_announced_uploads_of_one_member_leave_the_places_of_others(tmp_path: Path) -> None:
    """Eight of them stopped everybody."""
    with run_link_server(tmp_path, replace(SETTINGS, max_concurrent_uploads=2, stall_s=60)) as link:
        _, first = begun(link, "site-a", DATA)
        senders = [Sender(first), *(Sender() for _ in range(2))]
        streams: list[Any] = [link.calls().push(senders[0], timeout=60)]
        until(link, lambda: part_path(link.dispatcher.folder, "site-a", sha256(DATA).digest()).exists())
        for sender in senders[1:]:
            streams.append(link.calls().push(sender, timeout=60))
            assert reason(next(streams[-1]).refusal) == "BUSY"
        other, _ = begun(link, "site-b", DATA)
        assert list(link.calls("site-b").push(parts(other, DATA), timeout=10))[-1].complete
        for stream, sender in zip(streams, senders, strict=True):
            stream.cancel()
            sender.halt.set()


@pytest.mark.guarantee("G14")
def test_a_reader_that_does_not_read_loses_its_place(tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_concurrent_downloads=1, part_kib=256, stall_s=0.3)
    with run_link_server(tmp_path, settings) as link:
        body = bytes(2**25)
        for name in ("site-a", "site-b"):
            post_task(link, name, assignment(name, 1).header, {sha256(body).hexdigest(): body})
        request = pb.FetchRequest(digest=sha256(body).digest())
        slow: Any = link.calls().fetch(request, timeout=60)
        assert next(slow).data

        others = link.calls("site-b")

        def through() -> bool:
            return sum(len(one.data) for one in others.fetch(request, timeout=30)) == len(body)

        until(link, through)
        slow.cancel()


@pytest.mark.guarantee("G14")
def test_transfers_end_with_their_order_and_do_not_count_towards_barring(tmp_path: Path) -> None:
    with run_link_server(tmp_path, replace(SETTINGS, bar_after=1, stall_s=60, part_kib=256)) as link:
        body = bytes(2**25)
        post_task(link, "site-a", assignment("site-a", 1).header, {sha256(body).hexdigest(): body})
        fetched: Any = link.calls().fetch(pb.FetchRequest(digest=sha256(body).digest()), timeout=60)
        assert next(fetched).data
        _, first = begun(link, "site-a", DATA)
        sender = Sender(first)
        thread, acks = pushing(link, "site-a", iter(sender))
        until(link, lambda: part_path(link.dispatcher.folder, "site-a", sha256(DATA).digest()).exists())
        link.dispatcher.end_round(1)
        thread.join()
        sender.halt.set()
        assert reason(acks[-1].refusal) == "NOT_WANTED"
        assert reason(list(fetched)[-1].refusal) == "NOT_WANTED"
        assert not link.dispatcher.blocklist.reason("site-a")
        assert not list(link.dispatcher.folder.iterdir())  # nor does anything stay on the disk


def test_a_cut_upload_leaves_each_byte_once(tmp_path: Path) -> None:
    """Found wrong: a client that went away during a write had its last batch appended twice."""
    with run_link_server(tmp_path, replace(SETTINGS, part_kib=256)) as link:
        data = random.Random(0).randbytes(2**24)
        envelope, _ = begun(link, "site-a", data)
        calls = link.calls()
        for _ in range(10):
            (want,) = calls.submit(pb.SubmitRequest(envelope=envelope), timeout=10).wanted.parts
            stream: Any = calls.push(islice(parts(envelope, data, want.offset, step=2**16), 20), timeout=10)
            next(stream, None)
            stream.cancel()
        stored = part_path(link.dispatcher.folder, "site-a", sha256(data).digest()).read_bytes()
        assert stored == data[: len(stored)]


def test_a_part_that_has_just_come_whole_is_no_reason_to_end_its_upload(tmp_path: Path) -> None:
    """Found wrong: a look at the calls in that moment ended it as not wanted, and its client waited for ever."""
    harness = make_harness(tmp_path)
    _, task, task_digest = harness.post("anna")
    envelope = signed_reply("anna", task, task_digest, DATA[:1000])
    harness.submit("anna", envelope)
    first = pb.PushPart(answer=digest(envelope), digest=sha256(DATA[:1000]).digest(), data=DATA[:1000])
    open_calls = OpenCalls(SETTINGS, harness.clock)
    call = open_calls.begin("anna", "upload", interrupt=lambda: None)

    async def messages() -> AsyncIterator[pb.PushPart]:
        yield first

    async def receive_all() -> list[tuple[int, bool]]:
        acks = list[tuple[int, bool]]()
        with ThreadPoolExecutor(1) as disk:
            async for ack in receive(harness.dispatcher, disk, call, messages()):
                open_calls.look()
                acks.append(ack)
        return acks

    assert asyncio.run(receive_all()) == [(1000, True)]
    assert not call.ending
    assert not call.reading


@pytest.mark.guarantee("G14")
def test_each_message_of_an_upload_is_progress_before_a_batch_is_full(tmp_path: Path) -> None:
    """A batch of 1 MiB takes longer than `lost_s` on a line of 1 KiB/s, and its site was lost in the middle of it."""
    harness = make_harness(tmp_path, LinkSettings(lost_s=600, lease_s=10**6))
    harness.dispatcher.max_reply_bytes = lambda front: len(DATA)
    message_id, task, task_digest = harness.post("anna")
    envelope = signed_reply("anna", task, task_digest, DATA)
    harness.submit("anna", envelope)
    call = OpenCalls(SETTINGS, harness.clock).begin("anna", "upload", interrupt=lambda: None)
    first = pb.PushPart(answer=digest(envelope), digest=sha256(DATA).digest(), data=DATA[:16384])

    async def messages() -> AsyncIterator[pb.PushPart]:
        yield first
        for at in range(16384, len(DATA) - 16384, 16384):
            harness.clock.now += 16
            yield pb.PushPart(data=DATA[at : at + 16384])

    async def receive_all() -> None:
        with ThreadPoolExecutor(1) as disk:
            async for _ in receive(harness.dispatcher, disk, call, messages()):
                pass

    asyncio.run(receive_all())
    assert harness.clock.now > 1000 + 600
    assert not harness.dispatcher.collect([message_id])


def test_an_upload_that_was_ended_says_so_at_its_next_message(tmp_path: Path) -> None:
    harness = make_harness(tmp_path)
    call = OpenCalls(SETTINGS, harness.clock).begin("anna", "upload", interrupt=lambda: None)
    call.end(rejection(pb.REVOKED, "roster", "an active party", "anna, revoked"))

    async def receive_all() -> None:
        async for _ in receive(harness.dispatcher, ThreadPoolExecutor(1), call, silence()):
            raise AssertionError

    async def silence() -> AsyncIterator[pb.PushPart]:
        yield pb.PushPart()

    with pytest.raises(RejectionError, match="REVOKED"):
        asyncio.run(receive_all())
