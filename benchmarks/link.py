"""The link against a plain gRPC stream: large transfers, tiny rounds, and what server and client hold in memory.

    python benchmarks/link.py [--mb 500] [--clients 3] [--rounds 200]

Everything is on loopback with mutual TLS, server and clients each in a process of their own; all sides are measured in
one run. The plain stream sends the same bytes in messages of the same size; once its ends keep nothing, once they write
and hash what comes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import fedtune.link  # noqa: E402, F401, I001 - before grpc, which reads its TLS settings once
import grpc  # noqa: E402

from fedtune.link.audit_log import read_audit_log  # noqa: E402
from fedtune.link.client.client import Client  # noqa: E402
from fedtune.link.client.training_process import WorkProgress  # noqa: E402
from fedtune.link.settings import Policy  # noqa: E402
from fedtune.link.envelopes import TRAIN  # noqa: E402
from fedtune.link.pki.identity import ROSTER, Identity, load_identity  # noqa: E402
from fedtune.link.pki.roster import RosterFile  # noqa: E402
from fedtune.link.server.assignments import ReceivedParts  # noqa: E402
from fedtune.link.server.blocklist import Blocklist  # noqa: E402
from fedtune.link.server.dispatcher import Dispatcher  # noqa: E402
from fedtune.link.server.run_info import RunInfo  # noqa: E402
from fedtune.link.server.server import serve_link, server_credentials  # noqa: E402
from fedtune.link.settings import JoinSettings, LinkSettings  # noqa: E402
from fedtune.messages import Assignment, Plan, Training, TrainLora  # noqa: E402
from fedtune.wire.codec import encode_assignment  # noqa: E402
from fedtune.wire.profile import ModelSpec  # noqa: E402
from fedtune.wire.v1 import link_pb2 as pb  # noqa: E402
from tests.link.ceremony import enroll_parties  # noqa: E402
from tests.link.federation import federation  # noqa: E402

PART = 256 * 1024
SITE = '[model]\nbase = "none"\n[adapter]\ntargets = ["q"]\n[data]\nsource = "none"\n'
TINY = """
name = "tiny"
[model]
base = "none"
[adapter]
rank = 1
alpha = 2
targets = ["q"]
[method]
name = "fedit"
[client]
steps = 1
batch = 1
learning_rate = 1e-3
[rounds]
count = {rounds}
min_clients = {clients}
norm_cap = 1e30
"""


def memory_mb(process: int | str = "self", *, what: str = "VmHWM") -> float:
    """Return a line of /proc/PID/status in MB."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(what)


def names(clients: int) -> Sequence[str]:
    return [f"site-{place}" for place in range(clients)]


def identity(folder: Path, name: str) -> Identity:
    role = "coordinator" if name == "server" else "client"
    return load_identity(folder / name / "identity", role=role, now=int(time.time()))


def told(process: subprocess.Popen[str]) -> Mapping[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "a process of the benchmark ended"
    found: Mapping[str, Any] = json.loads(line)
    return found


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def child(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


# ---- the link ----


def link_server(folder: Path, clients: int, mb: int) -> None:
    """Serve one round of a body down and an update up for each client; each update is taken one after the other."""
    own = identity(folder, "server")
    roster = RosterFile(own.folder / "roster", own.root)
    run = RunInfo(own.federation, "0123456789abcdef", b'name = "x"\n', own.name, own.key)
    settings = LinkSettings(listen="127.0.0.1:0", health="", drain_s=5)
    dispatcher = Dispatcher(run, settings, folder / "spool", Blocklist(folder / "barred"))
    dispatcher.max_reply_bytes = lambda front: 2 * mb * 10**6
    with serve_link(dispatcher, own, roster) as running:
        say(port=running.port)
        while len(dispatcher.fleet()) < clients:
            dispatcher.wait(0.05)
        idle = memory_mb(what="VmRSS")
        body = (folder / "body").read_bytes()
        dispatcher.begin_round(names(clients))
        began = time.perf_counter()
        ids = {name: dispatcher.post(name, TRAIN, *order(name, body), seconds=3600) for name in names(clients)}
        waiting = dict(ids)
        while waiting:
            for found in dispatcher.collect(list(waiting.values())).values():
                assert isinstance(found, ReceivedParts), found
                dispatcher.settle(found.client, 1, None)
                del waiting[found.client]
            dispatcher.wait(0.05)
        seconds = time.perf_counter() - began
        dispatcher.stop(pb.Stop.FINISHED)
    say(seconds=seconds, idle=idle, peak=memory_mb(), anonymous=memory_mb(what="RssAnon"))


def order(name: str, body: bytes) -> tuple[bytes, dict[str, bytes]]:
    plan = Plan(name, rank=2, scale=2.0, training=Training(batch=1, learning_rate=0.1, steps=1))
    front = encode_assignment(
        Assignment("flora", round=1, seed=0, plan=plan, task=TrainLora(a_key=0), base="9f3c" * 16)
    ).header
    return front, {"body": body}


class Copying:
    """A trainer whose update lies ready."""

    def __init__(self, update: Path) -> None:
        self._update = update

    def profile(self, into: Path, labels: Sequence[str] = ()) -> None:
        into.mkdir(parents=True, exist_ok=True)

    def perform(self, folder: Path, bodies: Sequence[str], into: Path) -> Mapping[str, float]:
        os.link(self._update, into)
        return {}

    def score(self, folder: Path, bodies: Sequence[str], into: Path) -> Mapping[str, float]:
        return {}

    def progress(self) -> WorkProgress:
        return WorkProgress()

    def kill(self) -> None: ...


def link_client(folder: Path, name: str, port: int) -> None:
    state = folder / name / "state"
    state.mkdir()
    own = identity(folder, name)
    roster = RosterFile(own.folder / "roster", own.root)
    settings = JoinSettings(f"localhost:{port}", backoff_s=0.1)
    client = Client(own, roster, settings, Policy(), state, Copying(folder / "body"), check=lambda *order: ())
    client.greet()
    say(idle=memory_mb(what="VmRSS"))
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()  # ends with the benchmark
    client.run()
    say(peak=memory_mb())


# ---- the floor: gRPC streams with the same certificates ----


class Sink:
    """Where a plain stream's bytes go: nowhere, or into a file and a hash, as the link's do."""

    def __init__(self, path: Path | None) -> None:
        self.taken, self._hash = 0, sha256()
        self._file = path.open("wb") if path is not None else None

    def take(self, data: bytes) -> None:
        self.taken += len(data)
        if self._file is not None:
            self._file.write(data)
            self._hash.update(data)


def plain_server(folder: Path, mb: int, keep: bool) -> None:
    body = (folder / "body").read_bytes()

    async def down(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for at in range(0, len(body), PART):
            yield body[at : at + PART]

    async def up(requests: AsyncIterator[bytes], context: Any) -> bytes:
        sink = Sink(folder / f"plain-{id(context)}" if keep else None)
        async for data in requests:
            sink.take(data)
        return str(sink.taken).encode()

    async def serve() -> None:
        server = grpc.aio.server()
        handlers: dict[str, Any] = {
            "Down": grpc.unary_stream_rpc_method_handler(down),
            "Up": grpc.stream_unary_rpc_method_handler(up),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("plain", handlers),))
        own = identity(folder, "server")
        roster = RosterFile(own.folder / ROSTER, own.root)
        port = server.add_secure_port("127.0.0.1:0", server_credentials(own, roster))
        await server.start()
        say(port=port)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        await server.stop(None)

    asyncio.run(serve())
    say(peak=memory_mb())


def plain_client(folder: Path, name: str, port: int, keep: bool) -> None:
    own, body = identity(folder, name), (folder / "body").read_bytes()
    secure = grpc.ssl_channel_credentials(own.ca, own.tls_key, own.certificate)
    with grpc.secure_channel(f"localhost:{port}", secure) as channel:
        grpc.channel_ready_future(channel).result()
        say(ready=True)
        sys.stdin.readline()
        sink = Sink(folder / name / "plain" if keep else None)
        down: Any = channel.unary_stream("/plain/Down")
        for data in down(b""):
            sink.take(data)

        def parts() -> Iterator[bytes]:
            for at in range(0, len(body), PART):
                yield body[at : at + PART]

        up: Any = channel.stream_unary("/plain/Up")
        assert sink.taken == int(up(parts())) == len(body)
    say(done=True)


def start(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def plain(folder: Path, clients: int, mb: int, *, keep: bool) -> float:
    """Return the seconds in which plain streams carry the bytes down and up; `keep`: into files and hashes."""
    server = child("plain-server", str(folder), str(mb), str(int(keep)))
    port = told(server)["port"]
    others = [child("plain-client", str(folder), name, str(port), str(int(keep))) for name in names(clients)]
    for one in others:
        told(one)
    began = time.perf_counter()
    for one in others:
        start(one)
    for one in others:
        told(one)
    seconds = time.perf_counter() - began
    start(server)
    told(server)
    for one in [server, *others]:
        one.wait()
    return seconds


def linked(folder: Path, clients: int, mb: int) -> Mapping[str, float]:
    """Return how the link does, and what it holds."""
    server = child("link-server", str(folder), str(clients), str(mb))
    port = told(server)["port"]
    others = [child("link-client", str(folder), name, str(port)) for name in names(clients)]
    idle = max(told(one)["idle"] for one in others)
    found = dict(told(server))
    found["client_idle"], found["client_peak"] = idle, max(told(one)["peak"] for one in others)
    for one in [server, *others]:
        one.wait()
    return found


def transfers(clients: int, mb: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        for place in range(2):
            folder = Path(temporary) / str(place)
            enroll_parties(folder, clients=names(clients))
            (folder / "body").write_bytes(os.urandom(mb * 10**6))
            floor, equal = (plain(folder, clients, mb, keep=keep) for keep in (False, True))
            found = linked(folder, clients, mb)
            seconds = found["seconds"]
            print(
                f"{clients} clients x {mb} MB down and up: link {seconds:.1f} s, plain gRPC stream {floor:.1f} s, "
                f"ratio {seconds / floor:.2f} (target 1.3);\n"
                f"  a stream whose ends keep and hash what comes {equal:.1f} s, ratio {seconds / equal:.2f}"
            )
            above = found["peak"] - found["idle"]
            print(
                f"  server memory: idle {found['idle']:.0f} MB, peak {found['peak']:.0f} MB, {above / mb:.2f} of an "
                f"update above idle (target 1.5; the body that goes down is 1.00)"
            )
            print(
                f"  client memory: idle {found['client_idle']:.0f} MB (target 90), peak {found['client_peak']:.0f} MB"
            )


def tiny(clients: int, rounds: int) -> None:
    """Time rounds of `fedtune serve` whose clients have next to nothing to do.

    The link's part lasts from the first order to the last answer; the whole round makes everything durable too.
    """
    with tempfile.TemporaryDirectory() as temporary:
        recipe, sites = TINY.format(rounds=rounds, clients=clients), names(clients)
        with federation(Path(temporary), recipe, sites, site=dict.fromkeys(sites, SITE)) as made:
            made.serve()
            for name in sites:
                made.start(name, __file__, "tiny-client", str(made.folder / name / "site.toml"))
            made.exit_statuses("server", *sites)
            whole = [one["ms"] for one in made.events("server", "committed")][5:]
            asked, answered = dict[int, int](), dict[int, int]()
            for entry in read_audit_log(made.run / "link" / "audit").entries:
                if entry.kind == "asked":
                    asked.setdefault(entry.fields["round"], entry.unix_ms)
                elif entry.kind == "answered":
                    answered[entry.fields["round"]] = entry.unix_ms
        spans = [answered[number] - asked[number] for number in range(5, rounds + 1)]
        print(
            f"tiny rounds, {clients} clients, {rounds} rounds: {spread(spans)} from the first order to the last answer"
        )
        print(f"  (target 10 ms); {spread(whole)} with journal, aggregation and receipts")


def spread(spans: Sequence[int]) -> str:
    return f"median {median(spans):.0f} ms, nine of ten within {sorted(spans)[len(spans) * 9 // 10]:.0f} ms"


def tiny_client(site: str) -> None:
    from fedtune.cli.event_log import event_writer
    from fedtune.deployment.join import join
    from tests.link import scripted

    scripted.MODULES = {"q": (8, 8)}
    scripted.MODEL = ModelSpec(base="9f3c" * 16, modules=scripted.MODULES, parameters=64)
    join(Path(site), record=event_writer("json"), trainer=scripted.ScriptedTrainer(Path(site).parent.name, 0.0))


def main() -> None:
    match sys.argv[1:]:
        case ["link-server", folder, clients, mb]:
            link_server(Path(folder), int(clients), int(mb))
        case ["link-client", folder, name, port]:
            link_client(Path(folder), name, int(port))
        case ["plain-server", folder, mb, keep]:
            plain_server(Path(folder), int(mb), keep == "1")
        case ["plain-client", folder, name, port, keep]:
            plain_client(Path(folder), name, int(port), keep == "1")
        case ["tiny-client", site]:
            tiny_client(site)
        case _:
            parser = argparse.ArgumentParser(description=__doc__)
            parser.add_argument("--mb", type=int, default=500)
            parser.add_argument("--clients", type=int, default=3)
            parser.add_argument("--rounds", type=int, default=200)
            given = parser.parse_args()
            transfers(given.clients, given.mb)
            tiny(given.clients, given.rounds)


if __name__ == "__main__":
    main()
