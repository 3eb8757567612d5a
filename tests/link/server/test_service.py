"""The five calls over real gRPC on loopback: who may call, what is taken, and where a transfer goes on."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from fedtune.link.client.channel import LinkStub, dial
from fedtune.link.envelopes import TRAIN, digest, seal
from fedtune.link.pki import authority, certificates, roster
from fedtune.link.pki.identity import load_identity
from fedtune.link.server.assignments import ReceivedParts
from fedtune.link.server.service import Service, rpc_handlers
from fedtune.link.settings import JoinSettings
from fedtune.link.uploads import part_path
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import copy_roster, enroll_parties
from tests.link.harness import assignment, signed_reply
from tests.link.link_server import SETTINGS, LinkServer, greeting, run_link_server


def reason(refusal: pb.Refusal) -> str:
    return pb.Reason.Name(refusal.reason)


def test_a_hello_brings_the_run_the_limits_and_the_newer_roster(link: LinkServer) -> None:
    reply = greeting(link.calls())
    assert reply.recipe == b'name = "x"\n'
    assert pb.Header.FromString(reply.plan.header).kind == pb.PLAN
    assert reply.limits.part_bytes == 16 * 1024
    assert reply.roster == (link.places["server"] / "roster").read_bytes()
    assert greeting(link.calls(), roster_version=99).roster == b""


def test_a_question_for_work_is_held_until_there_is_some(link: LinkServer) -> None:
    calls = link.calls()
    epoch = greeting(calls).epoch
    assert calls.next(pb.NextRequest(epoch=epoch), timeout=10).WhichOneof("what") == "wait"
    task = assignment("site-a", 1)
    link.dispatcher.post("site-a", TRAIN, task.header, task.blobs, seconds=60)
    reply = calls.next(pb.NextRequest(epoch=epoch), timeout=10)
    assert pb.Header.FromString(reply.work.order.header).to == "site-a"
    assert {one.digest for one in pb.Header.FromString(reply.work.order.header).parts}
    assert calls.next(pb.NextRequest(epoch=epoch, holding=[b"gone"]), timeout=10).withdrawn.order == b"gone"


def test_a_held_question_is_woken_by_its_task(tmp_path: Path) -> None:
    with run_link_server(tmp_path, replace(SETTINGS, hold_s=300)) as link:
        calls, result = link.calls(), list[pb.NextReply]()
        epoch = greeting(calls).epoch
        waiter = threading.Thread(target=lambda: result.append(calls.next(pb.NextRequest(epoch=epoch), timeout=60)))
        waiter.start()
        while not (stands := link.dispatcher.status().get("site-a")) or stands.seen_s:  # 0 only while a call is held
            link.dispatcher.wait(0.01)
        other, task = assignment("site-b", 1), assignment("site-a", 1)
        link.dispatcher.post("site-b", TRAIN, other.header, other.blobs, seconds=60)
        link.dispatcher.post("site-a", TRAIN, task.header, task.blobs, seconds=60)
        waiter.join()
        assert pb.Header.FromString(result[0].work.order.header).to == "site-a"


Call = Callable[[LinkStub], pb.Refusal]
CALLS: dict[str, Call] = {
    "hello": lambda calls: greeting(calls).refusal,
    "next": lambda calls: calls.next(pb.NextRequest(), timeout=10).refusal,
    "fetch": lambda calls: next(iter(calls.fetch(pb.FetchRequest(digest=b"d"), timeout=10))).refusal,
    "submit": lambda calls: calls.submit(pb.SubmitRequest(), timeout=10).refusal,
    "push": lambda calls: next(iter(calls.push(iter([pb.PushPart()]), timeout=10))).refusal,
}


@pytest.mark.guarantee("G6")
@pytest.mark.parametrize("call", CALLS)
def test_every_call_looks_at_who_calls_first(link: LinkServer, call: str, cases: Callable[[int], None]) -> None:
    ask, calls = CALLS[call], link.calls()
    now = int(link.time.now)

    def changed(change: Callable[[], object]) -> str:
        change()
        copy_roster(link.places["ca"], link.places, to=["server"])
        link.clock.now += 2
        return reason(ask(calls))

    good = authority.current_roster(link.places["ca"])
    root = certificates.load_signing_key((link.places["ca"] / "roster.key").read_bytes())

    def resigned(**members: object) -> None:
        current = authority.current_roster(link.places["ca"])
        one = good.parties["site-a"]
        changed_members = {**good.parties, "site-a": replace(one, **members)}  # type: ignore[arg-type]
        running = replace(current, version=current.version + 1, parties=changed_members)
        (link.places["ca"] / "roster").write_bytes(roster.encode(running, root))

    assert changed(lambda: resigned(serials=("abc",))) == "SERIAL_UNKNOWN"
    assert changed(lambda: resigned(role="auditor")) == "WRONG_ROLE"
    assert changed(lambda: authority.revoke(link.places["ca"], "site-a", now=now)) == "REVOKED"
    current = authority.current_roster(link.places["ca"])
    rest = {name: one for name, one in good.parties.items() if name != "site-a"}
    alone = replace(current, version=current.version + 1, parties=rest)

    def removed() -> None:
        (link.places["ca"] / "roster").write_bytes(roster.encode(alone, root))

    assert changed(removed) == "NOT_IN_ROSTER"
    assert changed(resigned) in ("REASON_UNSET", "STALE_EPOCH", "NOT_WANTED", "KEY_UNKNOWN")  # it is itself again
    link.dispatcher.blocklist.block("site-a", "too many refusals")
    assert reason(ask(calls)) == "BARRED"
    (link.folder / "barred").unlink()
    link.clock.now += 2
    link.time.now += 40 * 86_400
    assert reason(ask(calls)) == "ROSTER_OLD"
    cases(6)


def test_a_hello_of_another_federation_or_protocol_is_refused(link: LinkServer) -> None:
    assert reason(greeting(link.calls(), federation="other").refusal) == "WRONG_FEDERATION"
    assert reason(greeting(link.calls(), protocols=[2, 3]).refusal) == "PROTOCOL"
    assert reason(link.calls().next(pb.NextRequest(epoch=1), timeout=10).refusal) == "STALE_EPOCH"


def test_a_client_that_calls_too_often_is_put_off(tmp_path: Path) -> None:
    with run_link_server(tmp_path, replace(SETTINGS, calls_per_min=10)) as link:
        calls = link.calls()
        result = [reason(greeting(calls).refusal) for _ in range(11)]
        assert result == ["REASON_UNSET"] * 10 + ["TOO_MANY_CALLS"]
        assert reason(greeting(link.calls("site-b")).refusal) == "REASON_UNSET"


def post_task(link: LinkServer, name: str, front: bytes, bodies: dict[str, bytes]) -> tuple[pb.Envelope, pb.Header]:
    message_id = link.dispatcher.post(name, TRAIN, front, bodies, seconds=60)
    offered = link.dispatcher.offer(name, ())
    assert offered is not None
    link.ids[digest(offered.work.order)] = message_id
    return offered.work.order, pb.Header.FromString(offered.work.order.header)


def signed(link: LinkServer, name: str, task: pb.Envelope, data: bytes) -> pb.Envelope:
    """Return a client's answer, signed with its own key."""
    running = signed_reply(name, pb.Header.FromString(task.header), digest(task), data)
    return seal(pb.Header.FromString(running.header), link.identities[name].key)


def test_a_part_of_a_task_is_fetched_from_any_offset_by_its_own_client(link: LinkServer) -> None:
    body = bytes(range(256)) * 1000
    front = assignment("site-a", 1).header
    post_task(link, "site-a", front, {sha256(body).hexdigest(): body})
    for offset in (0, 1, 16 * 1024, len(body) - 1, len(body)):
        chunks = list(link.calls().fetch(pb.FetchRequest(digest=sha256(body).digest(), offset=offset), timeout=10))
        assert b"".join(one.data for one in chunks) == body[offset:]
        assert all(len(one.data) <= 16 * 1024 for one in chunks)
    (no,) = link.calls().fetch(pb.FetchRequest(digest=sha256(body).digest(), offset=len(body) + 1), timeout=10)
    assert reason(no.refusal) == "OFFSET"
    (no,) = link.calls("site-b").fetch(pb.FetchRequest(digest=sha256(body).digest()), timeout=10)
    assert reason(no.refusal) == "NOT_WANTED"


def parts(envelope: pb.Envelope, data: bytes, offset: int = 0, *, step: int = 16 * 1024) -> Iterator[pb.PushPart]:
    first = pb.PushPart(answer=digest(envelope), digest=sha256(data).digest(), offset=offset)
    for at in range(offset, len(data), step):
        first.data = data[at : at + step]
        yield first
        first = pb.PushPart()


@contextmanager
def accepting(link: LinkServer, task: pb.Envelope) -> Iterator[list[ReceivedParts]]:
    """Act as the round loop: collect the reply to a task as soon as it has come, and settle it as used."""
    result, ends = list[ReceivedParts](), threading.Event()

    def loop() -> None:
        while not result and not ends.is_set():
            for one in link.dispatcher.collect([link.ids[digest(task)]]).values():
                assert isinstance(one, ReceivedParts)
                result.append(one)
                link.dispatcher.settle(one.client, 1, None)
            link.dispatcher.wait(0.02)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield result
    finally:
        ends.set()
        thread.join()


def test_a_reply_is_pushed_cut_and_pushed_on(link: LinkServer) -> None:
    calls, data = link.calls(), bytes(range(256)) * 20_000
    task, _ = post_task(link, "site-a", assignment("site-a", 1).header, {})
    envelope = signed(link, "site-a", task, data)
    request = pb.SubmitRequest(envelope=envelope)
    (want,) = calls.submit(request, timeout=10).wanted.parts
    assert (want.digest, want.offset) == (sha256(data).digest(), 0)
    other = list(calls.push(parts(envelope, data[: len(data) // 2]), timeout=10))  # another digest: not wanted
    assert reason(other[-1].refusal) == "NOT_WANTED"
    acks = list(calls.push(parts(envelope, data, step=100_000), timeout=10))
    assert acks[-1].complete
    assert [one.taken for one in acks] == sorted(one.taken for one in acks)
    with accepting(link, task):
        reply = calls.submit(request, timeout=30)
    assert calls.submit(request, timeout=10) == reply
    assert pb.Header.FromString(reply.receipt.header).receipt.verdict == pb.ACCEPTED


def test_a_push_goes_on_behind_what_the_server_has(link: LinkServer) -> None:
    calls, data = link.calls(), bytes(range(256)) * 20_000
    task, _ = post_task(link, "site-a", assignment("site-a", 1).header, {})
    envelope = signed(link, "site-a", task, data)
    request = pb.SubmitRequest(envelope=envelope)
    calls.submit(request, timeout=10)
    list(calls.push((one for one, _ in zip(parts(envelope, data), range(100), strict=False)), timeout=10))
    (want,) = calls.submit(request, timeout=10).wanted.parts
    assert want.offset == 100 * 16 * 1024
    wrong = list(calls.push(parts(envelope, data, 0), timeout=10))
    assert reason(wrong[-1].refusal) == "OFFSET"
    acks = list(calls.push(parts(envelope, data, want.offset), timeout=10))
    assert acks[-1].complete
    assert not link.dispatcher.collect([link.ids[digest(task)]])  # it is delivered when it is submitted, not before
    with accepting(link, task) as taken:
        reply = calls.submit(request, timeout=30)
    assert reply.WhichOneof("what") == "receipt"
    assert bytes(taken[0].bodies["update"]) == data


def test_a_part_that_lay_whole_before_a_restart_is_looked_at_and_taken(link: LinkServer) -> None:
    calls, data = link.calls(), bytes(range(256)) * 1000
    task, _ = post_task(link, "site-a", assignment("site-a", 1).header, {})
    envelope = signed(link, "site-a", task, data)
    part_path(link.dispatcher.folder, "site-a", sha256(data).digest()).write_bytes(data)
    (want,) = calls.submit(pb.SubmitRequest(envelope=envelope), timeout=10).wanted.parts
    assert want.offset == len(data)
    first = pb.PushPart(answer=digest(envelope), digest=want.digest, offset=want.offset)
    assert list(calls.push(iter([first]), timeout=10))[-1].complete


def test_bytes_that_are_others_than_signed_are_thrown_away(link: LinkServer) -> None:
    calls, data = link.calls(), bytes(100_000)
    task, _ = post_task(link, "site-a", assignment("site-a", 1).header, {})
    envelope = signed(link, "site-a", task, data)
    calls.submit(pb.SubmitRequest(envelope=envelope), timeout=10)

    def pushed(sent: bytes) -> Sequence[pb.PushAck]:
        first = pb.PushPart(answer=digest(envelope), digest=sha256(data).digest(), data=sent)
        return list(calls.push(iter([first]), timeout=10))

    assert reason(pushed(b"x" * len(data))[-1].refusal) == "DIGEST"
    assert reason(pushed(b"x" * (len(data) + 1))[-1].refusal) == "LENGTH"
    assert pushed(data)[-1].complete


@pytest.mark.guarantee("G6")
def test_a_statement_is_sent_by_its_author_alone(link: LinkServer) -> None:
    task, _ = post_task(link, "site-a", assignment("site-a", 1).header, {})
    envelope = signed(link, "site-a", task, b"data")
    assert (
        reason(link.calls("site-b").submit(pb.SubmitRequest(envelope=envelope), timeout=10).refusal)
        == "AUTHOR_MISMATCH"
    )
    forged = seal(pb.Header.FromString(envelope.header), link.identities["site-b"].key)
    assert (
        reason(link.calls("site-a").submit(pb.SubmitRequest(envelope=forged), timeout=10).refusal) == "AUTHOR_MISMATCH"
    )
    spoilt = pb.Envelope(header=envelope.header + b"\0", signature=envelope.signature, key_id=envelope.key_id)
    assert reason(link.calls("site-a").submit(pb.SubmitRequest(envelope=spoilt), timeout=10).refusal) == "SIGNATURE"


def status(call: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    code: grpc.StatusCode = caught.value.code()
    return code


def test_a_message_that_is_too_long_or_compressed_is_refused_by_grpc(link: LinkServer) -> None:
    calls = link.calls()
    large = pb.SubmitRequest(envelope=pb.Envelope(header=bytes(2**20 + 1)))
    assert status(lambda: calls.submit(large, timeout=10)) == grpc.StatusCode.RESOURCE_EXHAUSTED
    packed = pb.HelloRequest(build="x" * 10_000)
    assert (
        status(lambda: calls.hello(packed, timeout=10, compression=grpc.Compression.Gzip))
        == grpc.StatusCode.UNIMPLEMENTED
    )


@pytest.mark.guarantee("G6")
def test_only_certificates_of_the_federation_get_through(link: LinkServer, tmp_path: Path) -> None:
    other = enroll_parties(tmp_path / "other", clients=("site-a",))
    stranger = load_identity(other["site-a"], role="client", now=int(link.time.now))
    mixed = replace(stranger, ca=link.identities["site-a"].ca)  # takes the server's, shows its own
    for identity in (stranger, mixed):
        calls = dial(identity, JoinSettings(f"localhost:{link.port}"))
        assert status(lambda calls=calls: greeting(calls)) == grpc.StatusCode.UNAVAILABLE  # type: ignore[misc]
        calls.close()
    anchors = grpc.ssl_channel_credentials(link.identities["site-a"].ca)
    with grpc.secure_channel(f"localhost:{link.port}", anchors) as channel:
        call: Any = channel.unary_unary("/fedtune.v1.Link/Hello")
        assert status(lambda: call(b"", timeout=10)) == grpc.StatusCode.UNAVAILABLE
    with grpc.insecure_channel(f"localhost:{link.port}") as channel:
        call = channel.unary_unary("/fedtune.v1.Link/Hello")
        assert status(lambda: call(b"", timeout=10)) == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(("version", "spoken"), [(ssl.TLSVersion.TLSv1_2, None), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")])
def test_nothing_older_than_tls_1_3_is_spoken(link: LinkServer, version: ssl.TLSVersion, spoken: str | None) -> None:
    identity = link.identities["site-a"]
    context = ssl.create_default_context(cadata=identity.ca.decode())
    context.load_cert_chain(identity.folder / "tls.crt", identity.folder / "tls.key")
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    with socket.create_connection(("127.0.0.1", link.port)) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="localhost") as tls:
                result = tls.version()
        except ssl.SSLError:
            result = None
    assert result == spoken


def test_a_small_reply_travels_within_the_call(tmp_path: Path) -> None:
    with run_link_server(tmp_path, replace(SETTINGS, inline_kib=64)) as link:
        calls, data = link.calls(), b"a small update"
        task, _ = post_task(link, "site-a", assignment("site-a", 1).header, {})
        envelope = signed(link, "site-a", task, data)
        request = pb.SubmitRequest(envelope=envelope, inline=[pb.Inline(digest=sha256(data).digest(), data=data)])
        with accepting(link, task) as result:
            reply = calls.submit(request, timeout=30)
        assert pb.Header.FromString(reply.receipt.header).receipt.verdict == pb.ACCEPTED
        assert bytes(result[0].bodies["update"]) == data
        wrong = pb.SubmitRequest(envelope=envelope, inline=[pb.Inline(digest=sha256(data).digest(), data=b"other")])
        assert calls.submit(wrong, timeout=10) == reply  # what has its receipt is not looked at again


def test_a_hello_of_another_build_is_refused_where_one_is_pinned(tmp_path: Path) -> None:
    with run_link_server(tmp_path, replace(SETTINGS, build="fedtune 9.9.9")) as link:
        assert reason(greeting(link.calls()).refusal) == "BUILD_DIFFERS"
        assert reason(greeting(link.calls(), build="fedtune 9.9.9").refusal) == "REASON_UNSET"


@pytest.mark.guarantee("G6")
def test_the_coordinators_certificate_is_none_of_a_client(link: LinkServer) -> None:
    assert status(lambda: greeting(link.calls("server"))) == grpc.StatusCode.UNAVAILABLE


def test_a_client_that_forges_three_times_is_blocked_and_no_other(link: LinkServer) -> None:
    task, _ = post_task(link, "site-a", assignment("site-a", 1).header, {})
    envelope, calls = signed(link, "site-a", task, b"data"), link.calls("site-b")
    replies = [calls.submit(pb.SubmitRequest(envelope=envelope), timeout=10) for _ in range(4)]
    assert [reason(one.refusal) for one in replies] == ["AUTHOR_MISMATCH"] * 3 + ["BARRED"]
    assert reason(greeting(calls).refusal) == "BARRED"
    assert reason(greeting(link.calls()).refusal) == "REASON_UNSET"


class Sender:
    """Messages of a push that stops after these."""

    def __init__(self, *messages: pb.PushPart) -> None:
        self._messages, self.halt = iter(messages), threading.Event()

    def __iter__(self) -> Sender:
        return self

    def __next__(self) -> pb.PushPart:
        for one in self._messages:
            return one
        self.halt.wait(60)
        raise StopIteration


def begun(link: LinkServer, name: str, data: bytes) -> tuple[pb.Envelope, pb.PushPart]:
    """Return a reply whose part is wanted, and the first message of its push, with a thousand bytes."""
    task, _ = post_task(link, name, assignment(name, 1).header, {})
    envelope = signed(link, name, task, data)
    assert link.calls(name).submit(pb.SubmitRequest(envelope=envelope), timeout=10).wanted.parts
    return envelope, pb.PushPart(answer=digest(envelope), digest=sha256(data).digest(), data=data[:1000])


def until(link: LinkServer, current: Callable[[], bool]) -> None:
    while not current():
        link.dispatcher.wait(0.01)


def test_a_push_that_says_nothing_is_given_up_and_what_came_is_kept(tmp_path: Path) -> None:
    with run_link_server(tmp_path, replace(SETTINGS, stall_s=0.2)) as link:
        data = bytes(range(256)) * 4000
        envelope, first = begun(link, "site-a", data)
        sender = Sender(first)
        acks = list(link.calls().push(sender, timeout=30))
        sender.halt.set()
        assert reason(acks[-1].refusal) == "STALLED"
        assert acks[-1].refusal.passing
        (want,) = link.calls().submit(pb.SubmitRequest(envelope=envelope), timeout=10).wanted.parts
        assert want.offset == 1000
        silent = Sender()
        assert reason(list(link.calls().push(silent, timeout=30))[-1].refusal) == "STALLED"
        silent.halt.set()
        assert list(link.calls().push(parts(envelope, data, 1000), timeout=10))[-1].complete
        assert not link.dispatcher.blocklist.reason("site-a")


def test_more_uploads_than_fit_are_put_off_and_their_slots_come_back(tmp_path: Path) -> None:
    with run_link_server(tmp_path, replace(SETTINGS, max_concurrent_uploads=1, stall_s=60)) as link:
        data = bytes(range(256)) * 4000
        envelope, first = begun(link, "site-a", data)
        other, second = begun(link, "site-b", data)
        sender = Sender(first)
        pushing: Any = link.calls().push(sender, timeout=60)
        until(link, lambda: part_path(link.dispatcher.folder, "site-a", sha256(data).digest()).exists())
        (busy,) = link.calls("site-b").push(iter([second]), timeout=10)
        assert reason(busy.refusal) == "BUSY"
        assert busy.refusal.passing
        pushing.cancel()  # as a client that goes away
        sender.halt.set()

        def through() -> bool:
            return list(link.calls("site-b").push(parts(other, data), timeout=10))[-1].complete

        until(link, through)
        (want,) = link.calls().submit(pb.SubmitRequest(envelope=envelope), timeout=10).wanted.parts
        assert want.offset in (0, 1000)  # what had come is kept, unless it came with the cut
        assert list(link.calls().push(parts(envelope, data, want.offset), timeout=10))[-1].complete
        assert not link.dispatcher.blocklist.reason("site-b")


def test_a_part_is_pushed_by_one_transfer_at_a_time(link: LinkServer) -> None:
    data = bytes(range(256)) * 4000
    _, first = begun(link, "site-a", data)
    sender = Sender(first)
    acks = link.calls().push(sender, timeout=60)
    until(link, lambda: part_path(link.dispatcher.folder, "site-a", sha256(data).digest()).exists())
    (busy,) = link.calls().push(iter([first]), timeout=10)
    assert reason(busy.refusal) == "BUSY"
    sender.halt.set()
    assert not any(one.complete for one in acks)


def test_bytes_of_transfers_that_were_cut_count_towards_the_quota(link: LinkServer) -> None:
    """Else a client sends as much as it likes, in pushes of less than a mebibyte."""
    data = bytes(range(256)) * 4000
    envelope, first = begun(link, "site-a", data)
    list(link.calls().push(iter([first]), timeout=10))
    (want,) = link.calls().submit(pb.SubmitRequest(envelope=envelope), timeout=10).wanted.parts
    assert want.offset == 1000
    assert link.dispatcher.status()["site-a"].num_bytes == 1000


def test_bytes_that_are_no_message_do_no_harm(link: LinkServer) -> None:
    identity = link.identities["site-a"]
    credentials = grpc.ssl_channel_credentials(identity.ca, identity.tls_key, identity.certificate)
    with grpc.secure_channel(f"localhost:{link.port}", credentials) as channel:
        for method in ("Hello", "Next", "Submit", "Nothing"):
            call: Any = channel.unary_unary(f"/fedtune.v1.Link/{method}")
            assert status(lambda call=call: call(b"\xff\xff", timeout=10)) in (  # type: ignore[misc]
                grpc.StatusCode.INTERNAL,
                grpc.StatusCode.UNKNOWN,
                grpc.StatusCode.UNIMPLEMENTED,
            )
        streamed: Any = channel.stream_stream("/fedtune.v1.Link/Push")
        with pytest.raises(grpc.RpcError):
            list(streamed(iter([b"\xff\xff"]), timeout=10))
    assert reason(greeting(link.calls()).refusal) == "REASON_UNSET"


def test_a_body_is_fetched_by_one_client_while_another_has_stopped_reading(tmp_path: Path) -> None:
    with run_link_server(tmp_path, replace(SETTINGS, max_concurrent_downloads=1, part_kib=256)) as link:
        body = bytes(2**25)
        for name in ("site-a", "site-b"):
            post_task(link, name, assignment(name, 1).header, {sha256(body).hexdigest(): body})
        slow: Any = link.calls().fetch(pb.FetchRequest(digest=sha256(body).digest()), timeout=60)
        assert next(slow).data  # the rest waits in the server, not in memory
        request = pb.FetchRequest(digest=sha256(body).digest())
        (busy,) = link.calls("site-b").fetch(request, timeout=10)
        assert reason(busy.refusal) == "BUSY"
        slow.cancel()

        def through() -> bool:
            return sum(len(one.data) for one in link.calls("site-b").fetch(request, timeout=30)) == len(body)

        until(link, through)


def test_the_handlers_are_those_of_the_schema() -> None:
    service: Any = Service.__new__(Service)
    handlers = rpc_handlers(service)
    for method in pb.DESCRIPTOR.services_by_name["Link"].methods:
        details: Any = SimpleNamespace(method=f"/fedtune.v1.Link/{method.name}", invocation_metadata=())
        handler = handlers.service(details)
        assert handler is not None, method.name
        streaming = handler.request_streaming, handler.response_streaming
        assert streaming == (method.client_streaming, method.server_streaming)
        deserializer: Any = handler.request_deserializer
        assert type(deserializer(b"")).__name__ == method.input_type.name
