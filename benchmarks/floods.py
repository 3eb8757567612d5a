"""Honest uploads and dials while somebody floods the server, and what the server holds and writes meanwhile.

    python benchmarks/floods.py [--seconds 8] [--floods connections refused ...]

Server, honest members and flood are processes of their own on loopback; a phase without a flood comes before and after
each. The flood runs at a lower priority, since it would have a machine of its own. All numbers are of one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import fedtune.link  # noqa: E402, F401, I001 - before grpc, which reads its TLS settings once
import grpc  # noqa: E402

from fedtune.deployment.coordinator import open_records  # noqa: E402
from fedtune.cli.event_log import event_writer  # noqa: E402
from fedtune.link.client.channel import dial  # noqa: E402
from fedtune.link.envelopes import PROTOCOL, TRAIN, digest, seal  # noqa: E402
from fedtune.link.pki.roster import RosterFile  # noqa: E402
from fedtune.link.server.assignments import ReceivedParts  # noqa: E402
from fedtune.link.server.blocklist import Blocklist  # noqa: E402
from fedtune.link.server.dispatcher import Dispatcher  # noqa: E402
from fedtune.link.server.run_info import RunInfo  # noqa: E402
from fedtune.link.server.server import serve_link  # noqa: E402
from fedtune.link.settings import JoinSettings, LinkSettings  # noqa: E402
from fedtune.wire.v1 import link_pb2 as pb  # noqa: E402
from benchmarks.link import identity, memory_mb, order, say  # noqa: E402
from tests.link.ceremony import enroll_parties  # noqa: E402
from tests.link.harness import signed_reply  # noqa: E402

HONEST, BAD = ("site-a", "site-b"), "site-x"
UPDATE_BYTES, BODY_BYTES = 2**21, 2**25
BAD_ROUND = 10**6
DAY_S = 24 * 3600


# ---- the server ----


def serve(folder: Path) -> None:
    """Serve round after round to the honest members, and one open order to the bad one."""
    own = identity(folder, "server")
    roster = RosterFile(own.folder / "roster", own.root)
    run = RunInfo(own.federation, "0123456789abcdef", b'name = "x"\n', own.name, own.key)
    settings = LinkSettings(listen="127.0.0.1:0", health="", drain_s=0, stall_s=5)
    (folder / "link").mkdir()
    uploads = [0]
    with ExitStack() as stack:
        log = stack.enter_context((folder / "stderr").open("w"))
        record, _ = open_records(stack, folder / "link", settings, event_writer("text", log))
        dispatcher = Dispatcher(run, settings, folder / "spool", Blocklist(folder / "barred"), record=record)
        dispatcher.max_reply_bytes = lambda front: 2 * BODY_BYTES
        running = stack.enter_context(serve_link(dispatcher, own, roster, record=record))
        say(port=running.port)
        threading.Thread(target=report, args=(folder, uploads), daemon=True).start()
        dispatcher.begin_round(HONEST)
        for place in range(8):
            # One order for each upload that the bad member announces.
            front, bodies = order(BAD, (folder / "body").read_bytes())
            dispatcher.post(BAD, TRAIN, renumbered(front, BAD_ROUND + place), bodies, seconds=3600)
        number = 0
        while True:
            number += 1
            waiting = {
                name: dispatcher.post(name, TRAIN, renumbered(order(name, b"")[0], number), {}, seconds=3600)
                for name in HONEST
            }
            while waiting:
                for reply in dispatcher.collect(list(waiting.values())).values():
                    assert isinstance(reply, ReceivedParts), reply
                    dispatcher.settle(reply.client, number, None)
                    del waiting[reply.client]
                    uploads[0] += 1
                dispatcher.wait(0.05)
            dispatcher.end_round(number)


def renumbered(front: bytes, number: int) -> bytes:
    from fedtune.wire.v1 import round_pb2

    message = round_pb2.Assignment.FromString(front)
    message.round = number
    return message.SerializeToString(deterministic=True)


def report(folder: Path, uploads: list[int]) -> None:
    """Answer each line of standard input with what the server has done, holds and has written."""
    for _ in sys.stdin:
        written = sum(path.stat().st_size for path in (folder / "link").glob("audit*"))
        said = (folder / "stderr").stat().st_size
        say(uploads=uploads[0], rss=memory_mb(what="VmRSS"), written=written, said=said, at=time.monotonic())
    os._exit(0)


# ---- honest members ----


def honest(folder: Path, name: str, port: int) -> None:
    """Answer each order with an update of its own, as a site does, but without its outbox."""
    own, random = identity(folder, name), os.urandom(UPDATE_BYTES)
    calls = dial(own, JoinSettings(f"localhost:{port}"))
    hello = pb.HelloRequest(protocols=[PROTOCOL], federation="care", build="test")
    epoch = calls.hello(hello, timeout=30, wait_for_ready=True).epoch
    say(ready=True)
    while True:
        with suppress(grpc.RpcError):
            work = calls.next(pb.NextRequest(epoch=epoch), timeout=60).work
            if not work.order.header:
                continue
            task = digest(work.order)
            data = task + random
            reply = signed_reply(name, pb.Header.FromString(work.order.header), task, data)
            request = pb.SubmitRequest(envelope=seal(pb.Header.FromString(reply.header), own.key))
            while not (answered := calls.submit(request, timeout=60)).HasField("receipt"):
                for want in answered.wanted.parts:
                    for _ in calls.push(parts(digest(request.envelope), want, data)):
                        pass


def parts(reply: bytes, want: pb.Want, data: bytes) -> Iterator[pb.PushPart]:
    first = pb.PushPart(answer=reply, digest=want.digest, offset=want.offset)
    for at in range(want.offset, len(data), 2**18):
        first.data = data[at : at + 2**18]
        yield first
        first = pb.PushPart()


def dials(folder: Path, port: int, seconds: float) -> Mapping[str, float]:
    """Dial anew again and again, as a member that has just started: one that is turned away knocks again within 3 s.

    The flood has the same address: a connection that was opened in the same moment may go for being one too many.
    """
    own, good, tries, spans = identity(folder, HONEST[0]), 0, 0, list[float]()
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        calls, began = dial(own, JoinSettings(f"localhost:{port}")), time.perf_counter()
        tries += 1
        with suppress(grpc.RpcError):
            hello = pb.HelloRequest(protocols=[PROTOCOL], federation="care", build="test")
            calls.hello(hello, timeout=3, wait_for_ready=True)
            good += 1
            spans.append(time.perf_counter() - began)
        calls.close()
        # Below the quota of hellos of a member.
        time.sleep(max(0.0, 1.2 - (time.perf_counter() - began)))
    return {"share": good / tries, "ms": 1000 * median(spans) if spans else float("nan")}


# ---- floods ----


def hold_connections(port: int, first: bytes) -> None:
    """Keep 400 connections open, and open another one for each that is closed."""
    import select

    ends = list[socket.socket]()
    while True:
        while len(ends) < 400:
            with suppress(OSError):
                end = socket.create_connection(("127.0.0.1", port), timeout=2)
                end.sendall(first)
                ends.append(end)
        for end in select.select(ends, [], [], 1)[0]:
            with suppress(OSError):
                if end.recv(1 << 16):
                    continue
            end.close()
            ends.remove(end)


def arrive(port: int) -> None:
    """Open fifty connections a second, and say nothing on them."""
    ends = list[socket.socket]()
    while True:
        with suppress(OSError):
            ends.append(socket.create_connection(("127.0.0.1", port), timeout=2))
        for end in ends[:-500]:
            end.close()
        del ends[:-500]
        time.sleep(0.02)


def bad_channel(folder: Path, port: int) -> grpc.aio.Channel:
    own = identity(folder, BAD)
    secure = grpc.ssl_channel_credentials(own.ca, own.tls_key, own.certificate)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 2**22)]
    return grpc.aio.secure_channel(f"localhost:{port}", secure, options=options)


async def idle_uploads(folder: Path, port: int) -> None:
    """Announce eight parts, and send messages without bytes for each, again and again, on two connections."""
    own, calls = identity(folder, BAD), dial(identity(folder, BAD), JoinSettings(f"localhost:{port}"))
    hello = pb.HelloRequest(protocols=[PROTOCOL], federation="care", build="test")
    epoch, held, answers = calls.hello(hello, timeout=30).epoch, list[bytes](), list[pb.PushPart]()
    while len(held) < 8:
        work = calls.next(pb.NextRequest(epoch=epoch, holding=held), timeout=30).work
        held.append(digest(work.order))
        data = len(held).to_bytes(4, "big") * 2**20
        reply = signed_reply(BAD, pb.Header.FromString(work.order.header), held[-1], data)
        envelope = seal(pb.Header.FromString(reply.header), own.key)
        calls.submit(pb.SubmitRequest(envelope=envelope), timeout=30)
        answers.append(pb.PushPart(answer=digest(envelope), digest=sha256(data).digest(), data=data[:1]))

    async def messages(first: pb.PushPart) -> AsyncIterator[pb.PushPart]:
        yield first
        while True:
            await asyncio.sleep(0.01)
            yield pb.PushPart()

    channels = [bad_channel(folder, port) for _ in range(2)]

    async def keep(first: pb.PushPart, channel: grpc.aio.Channel) -> None:
        push: Any = channel.stream_stream("/fedtune.v1.Link/Push", pb.PushPart.SerializeToString, pb.PushAck.FromString)
        while True:
            with suppress(grpc.RpcError):
                async for _ in push(messages(first)):
                    first.ClearField("data")
            await asyncio.sleep(0.05)

    await asyncio.gather(*(keep(answer, channels[place % 2]) for place, answer in enumerate(answers)))


async def refused_calls(folder: Path, port: int) -> None:
    """Make calls that are refused, on four connections, sixteen at a time on each."""
    channels = [bad_channel(folder, port) for _ in range(4)]

    async def keep(channel: grpc.aio.Channel) -> None:
        call: Any = channel.unary_unary("/fedtune.v1.Link/Hello", pb.HelloRequest.SerializeToString, bytes)
        while True:
            with suppress(grpc.RpcError):
                await call(pb.HelloRequest(protocols=[99], build="x" * 200), timeout=30)

    await asyncio.gather(*(keep(channel) for channel in channels for _ in range(16)))


async def slow_readers(folder: Path, port: int) -> None:
    """Ask for the body of an order sixteen times, on four connections, and read next to nothing of it."""
    body = sha256((folder / "body").read_bytes()).digest()
    channels = [bad_channel(folder, port) for _ in range(4)]

    async def keep(channel: grpc.aio.Channel) -> None:
        fetch: Any = channel.unary_stream("/fedtune.v1.Link/Fetch", pb.FetchRequest.SerializeToString, bytes)
        while True:
            with suppress(grpc.RpcError):
                async for _ in fetch(pb.FetchRequest(digest=body)):
                    await asyncio.sleep(60)
            await asyncio.sleep(0.05)

    await asyncio.gather(*(keep(channels[place % 4]) for place in range(16)))


CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)
FLOODS: Mapping[str, Callable[[Path, int], None]] = {
    "connections": lambda folder, port: hold_connections(port, b""),
    "handshakes": lambda folder, port: hold_connections(port, CLIENT_HELLO),
    "arrivals": lambda folder, port: arrive(port),
    "uploads": lambda folder, port: asyncio.run(idle_uploads(folder, port)),
    "refused": lambda folder, port: asyncio.run(refused_calls(folder, port)),
    "readers": lambda folder, port: asyncio.run(slow_readers(folder, port)),
}
"""400 bare connections; 400 half handshakes; 50 connections a second; idle uploads, refused calls and slow readers of
one bad member."""


# ---- the run ----


def child(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def answer(process: subprocess.Popen[str], *, ask: bool = True) -> Mapping[str, Any]:
    """Return a line of a process, after it was asked for one."""
    assert process.stdin is not None
    assert process.stdout is not None
    if ask:
        process.stdin.write("\n")
        process.stdin.flush()
    line = process.stdout.readline()
    assert line, "a process of the benchmark ended"
    facts: Mapping[str, Any] = json.loads(line)
    return facts


def measure(folder: Path, server: subprocess.Popen[str], port: int, seconds: float) -> Mapping[str, float]:
    """Return what happens within so many seconds."""
    before = answer(server)
    dialled = dials(folder, port, seconds)
    after = answer(server)
    span = after["at"] - before["at"]
    rates = {name: (after[name] - before[name]) / span for name in ("uploads", "written", "said")}
    return {**rates, **dialled, "rss": after["rss"]}


def phases(folder: Path, port: int, server: subprocess.Popen[str], chosen: list[str], seconds: float) -> Iterator[str]:
    """Yield a line for each flood."""
    quiet = measure(folder, server, port, seconds)
    yield f"{'none':12s} {quiet['uploads']:6.1f} uploads/s          dials 100 %, {quiet['ms']:5.0f} ms"
    for name in chosen:
        flood = child("flood", name, str(folder), str(port))
        time.sleep(2)
        during = measure(folder, server, port, seconds)
        flood.kill()
        flood.wait()
        time.sleep(6)  # what the flood left behind is closed
        after = measure(folder, server, port, seconds)
        # Beyond what the honest uploads write.
        own = {name: during["uploads"] * quiet[name] / max(quiet["uploads"], 1e-9) for name in ("written", "said")}
        more = {name: max(0.0, during[name] - own[name]) * DAY_S / 1e6 for name in own}
        ratio = 2 * during["uploads"] / max(quiet["uploads"] + after["uploads"], 1e-9)
        yield (
            f"{name:12s} {during['uploads']:6.1f} uploads/s, {ratio:4.2f}x   "
            f"dials {during['share']:4.0%}, {during['ms']:5.0f} ms   memory {during['rss'] - quiet['rss']:+6.1f} MB   "
            f"audit {more['written']:9.1f} MB/day, stderr {more['said']:8.1f} MB/day"
        )
        quiet = after


def run(chosen: list[str], seconds: float) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        enroll_parties(folder, clients=(*HONEST, BAD))
        (folder / "body").write_bytes(os.urandom(BODY_BYTES))
        server = child("serve", str(folder))
        port = answer(server, ask=False)["port"]
        members = [child("honest", str(folder), name, str(port)) for name in HONEST]
        try:
            for member in members:
                answer(member, ask=False)
            time.sleep(2)
            for line in phases(folder, port, server, chosen, seconds):
                print(line, flush=True)
        finally:
            for process in (server, *members):
                process.kill()
                process.wait()


def main() -> None:
    match sys.argv[1:]:
        case ["serve", folder]:
            serve(Path(folder))
        case ["honest", folder, name, port]:
            honest(Path(folder), name, int(port))
        case ["flood", name, folder, port]:
            os.nice(10)
            FLOODS[name](Path(folder), int(port))
        case _:
            parser = argparse.ArgumentParser(description=__doc__)
            parser.add_argument("--seconds", type=float, default=8)
            parser.add_argument("--floods", nargs="*", default=list(FLOODS), choices=list(FLOODS))
            given = parser.parse_args()
            run(given.floods, given.seconds)


if __name__ == "__main__":
    main()
