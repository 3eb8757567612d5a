"""A federation for minutes under kills, partitions and bad clients: no memory grows, and every round is right."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import grpc
import numpy as np
import pytest

from fedtune.link.client.channel import dial
from fedtune.link.pki.identity import load_identity
from fedtune.link.settings import JoinSettings
from fedtune.seeds import derive, generator
from fedtune.store.history import replay_journal
from fedtune.store.verify import verify
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.federation import Federation, federation
from tests.link.link_server import greeting
from tests.link.proxy import Fate, Fault, proxy
from tests.test_link import FLORA, SITE, SITES, reference_rounds, scripted

BAD = "site-x"
"""An enrolled party that sends nothing but what is refused."""
STRANGER = "127.0.0.2"
"""Another source than the sites': connections are limited by source."""
FAULTS: dict[Fault, float] = {"none": 0.4, "cut": 0.3, "delay": 0.15, "flip": 0.1, "silence": 0.05}
EXPECT = ("--expect", str(len(SITES)))
KILL_EVERY_S = 15.0
SERVER_KILLS = 3
"""All in the first quarter: after that, one process of the server is watched."""
SAMPLE_S = 1.0


@dataclass
class Watched:
    """What a process of the server used, second by second."""

    at_s: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def sample(self, pid: int, at_s: float) -> None:
        with suppress(OSError):  # it has ended meanwhile
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            descriptors = len([*Path(f"/proc/{pid}/fd").iterdir()])
            self.at_s.append(at_s)
            self.rss_mib.append(pages * 4096 / 2**20)
            self.descriptors.append(descriptors)

    def slope(self) -> float:
        """MiB per hour over the second half, by least squares."""
        half = len(self.at_s) // 2
        return float(np.polyfit(self.at_s[half:], self.rss_mib[half:], 1)[0] * 3600)


def fate(rng: np.random.Generator) -> Fate:
    kind = list(FAULTS)[int(rng.choice(len(FAULTS), p=list(FAULTS.values())))]
    after, seconds = int(rng.integers(1, 20_000_000)), float(rng.uniform(0.005, 0.05))
    return Fate(kind, after, up=bool(rng.integers(2)), seconds=3.0 if kind == "silence" else seconds)


@contextmanager
def repeated(act: Callable[[], object], every_s: float) -> Iterator[list[int]]:
    """Do something again and again in a thread until the block ends; give how often it was done."""
    over, done = threading.Event(), [0]

    def loop() -> None:
        while not over.wait(every_s):
            with suppress(OSError, grpc.RpcError):  # the server is away just then, or has had enough
                act()
            done[0] += 1

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def knock(port: int, held: list[socket.socket]) -> None:
    """Connect without TLS, and say nothing or what is none; at most twenty of these connections stay."""
    plain = socket.create_connection(("127.0.0.1", port), timeout=5, source_address=(STRANGER, 0))
    held.append(plain)
    if len(held) % 2:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
    while len(held) > 20:
        held.pop(0).close()


def misbehave(fed: Federation, rng: np.random.Generator) -> None:
    """Call as a member who sends what is refused: unknown digests, forged answers, streams of nothing."""
    calls = dial(
        load_identity(fed.places[BAD], role="client", now=int(time.time())), JoinSettings(f"localhost:{fed.port}")
    )
    try:
        greeting(calls)
        forged = pb.Envelope(header=rng.bytes(300), signature=rng.bytes(64), key_id=rng.bytes(16))
        calls.submit(pb.SubmitRequest(envelope=forged), timeout=5)
        list(calls.fetch(pb.FetchRequest(digest=rng.bytes(32)), timeout=5))
        list(
            calls.push(
                iter([pb.PushPart(answer=rng.bytes(32), digest=rng.bytes(32), data=rng.bytes(10_000))]), timeout=5
            )
        )
    finally:
        calls.close()


def strike(fed: Federation, rng: np.random.Generator, *, server: bool) -> str:
    """Kill a process, or have it stop, and start it again; return its name."""
    victim = "server" if server else str(rng.choice(SITES))
    fed.kill(victim, signal.SIGKILL if rng.integers(4) else signal.SIGTERM)
    if victim == "server":
        fed.serve(*EXPECT, resume=(fed.run / "recipe.toml").exists())
    else:
        scripted(fed, victim, seconds=0.05)
    return victim


@pytest.mark.slow
@pytest.mark.guarantee("G21")
def test_a_federation_under_attack_for_minutes_grows_no_memory_and_commits_the_right_rounds(
    tmp_path: Path, pytestconfig: pytest.Config, cases: Callable[[int], None]
) -> None:
    minutes = pytestconfig.getoption("--soak-minutes")
    rng, faults, knocking = (generator(derive(0, f"soak {name}")) for name in ("strikes", "faults", "knocks"))
    recipe = FLORA.partition("[[override]]")[0].replace("count = 4", "count = 1000000").replace('"flora"', '"fedit"')
    sites = dict.fromkeys((*SITES, BAD), SITE)
    settings = {"inline_kib": 64, "window_mib": 1, "part_kib": 64, "drain_s": 2.0, "hold_s": 2.0}
    watched, held, kills = Watched(), list[socket.socket](), dict.fromkeys(("server", *SITES), 0)
    with (
        proxy(lambda number: fate(faults)) as between,
        federation(tmp_path, recipe, (*SITES, BAD), site=sites, server=settings, port=between.port) as fed,
    ):
        between.target = fed.port
        fed.serve(*EXPECT)
        scripted(fed, *SITES, seconds=0.05)
        fed.until(lambda: fed.events("server", "committed"))
        began, ends = time.monotonic(), time.monotonic() + 60 * minutes
        with (
            repeated(lambda: knock(fed.port, held), 0.2) as knocks,
            repeated(lambda: misbehave(fed, knocking), 1.0) as calls,
        ):
            next_kill, last_server_kill = began + KILL_EVERY_S, began + 15 * minutes
            while (now := time.monotonic()) < ends:
                if now >= next_kill:
                    server = kills["server"] < SERVER_KILLS and now < last_server_kill and bool(rng.integers(2))
                    kills[strike(fed, rng, server=server)] += 1
                    watched = Watched() if server else watched
                    next_kill = now + KILL_EVERY_S
                watched.sample(fed.processes["server"].pid, now - began)
                threading.Event().wait(SAMPLE_S)
        for one in held:
            one.close()
        for name in ("server", *SITES):
            fed.kill(name, signal.SIGTERM)
        committed = replay_journal(fed.run)[0].digests
        verify(fed.run)
        right = [result.digest for result in islice(reference_rounds(recipe), len(committed))]
    numbers = {
        "minutes": minutes,
        "rounds": len(committed),
        "kills": kills,
        "faulty connections": sum(one.fault != "none" for one in between.fates),
        "bare connections": knocks[0],
        "calls of a bad member": calls[0],
        "MiB per hour": round(watched.slope(), 1),
        "MiB at first and last": [round(watched.rss_mib[0], 1), round(watched.rss_mib[-1], 1)],
        "descriptors at most": max(watched.descriptors),
    }
    print(json.dumps(numbers))
    assert committed == right, "another state than in one process"
    assert kills["server"] or minutes < 2
    assert max(watched.descriptors) < 200
    half = len(watched.rss_mib) // 2
    earlier, later = (
        float(np.median(part)) for part in (watched.rss_mib[half : half + half // 2], watched.rss_mib[-half // 2 :])
    )
    assert later < 1.05 * earlier + 8, numbers
    cases(len(committed))
