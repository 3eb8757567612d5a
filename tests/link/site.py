"""A client of the link for tests, in a thread, with a trainer that writes known bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.errors import ClientError, FedtuneError
from fedtune.link.client.client import Client
from fedtune.link.client.training_process import WorkProgress
from fedtune.link.envelopes import EVALUATE, TRAIN
from fedtune.link.pki.roster import RosterFile
from fedtune.link.server.assignments import ReceivedParts, Withdrawn
from fedtune.link.settings import JoinSettings, Policy
from fedtune.messages import ScoreRequest
from fedtune.wire.scores import encode_score_request
from tests.link.harness import BASE, assignment
from tests.link.link_server import LinkServer

END_S = 60.0


@dataclass
class RecordingTrainer:
    """Writes bytes that depend on the task, and remembers the folders that it worked in."""

    fails: str = ""
    size: int = 300_000
    gate: threading.Event = field(default_factory=threading.Event)
    done: list[Path] = field(default_factory=list)
    kills: int = 0
    steps: int = 0
    obstacle: str = ""

    def profile(self, into: Path, labels: Sequence[str] = ()) -> None:
        into.mkdir(parents=True, exist_ok=True)
        (into / "front").write_bytes(b" ".join([b"profile", *(label.encode() for label in labels)]))
        (into / sha256(b"body").hexdigest()).write_bytes(b"body")

    def perform(self, folder: Path, bodies: Sequence[str], into: Path) -> Mapping[str, float]:
        self.gate.wait(END_S)
        if self.fails:
            raise ClientError(self.fails)
        assert all(sha256((folder / one).read_bytes()).hexdigest() == one for one in bodies)
        self.done.append(folder)
        into.write_bytes(expected_update(folder, self.size))
        return {"loss_before": 3.0, "loss_after": 2.5, "seconds": 0.25}

    def score(self, folder: Path, bodies: Sequence[str], into: Path) -> Mapping[str, float]:
        if self.fails:
            raise ClientError(self.fails)
        assert all(sha256((folder / one).read_bytes()).hexdigest() == one for one in bodies)
        into.write_bytes(b"scores")
        return {"loss": 2.75, "examples": 4.0}

    def progress(self) -> WorkProgress:
        return WorkProgress(done=self.steps, total=100, obstacle=self.obstacle)

    def kill(self) -> None:
        self.kills += 1
        self.gate.set()


def expected_update(folder: Path, size: int) -> bytes:
    return (sha256((folder / "front").read_bytes()).digest() * (size // 32 + 1))[:size]


@dataclass
class Site:
    """A client in a thread, and what it has recorded."""

    client: Client
    trainer: RecordingTrainer
    state: Path
    events: list[tuple[str, dict[str, Any]]]
    thread: threading.Thread
    ended: list[object] = field(default_factory=list)

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


@contextmanager
def run_site(
    link: LinkServer,
    rules: Policy | None = None,
    trainer: RecordingTrainer | None = None,
    *,
    name: str = "site-a",
    bandwidth: Mapping[str, Any] | None = None,
    **more: Any,
) -> Iterator[Site]:
    """Run a client in a thread until the block ends, which stops it."""
    events: list[tuple[str, dict[str, Any]]] = []
    identity, worker, state = link.identities[name], trainer or RecordingTrainer(), link.folder / f"state-{name}"
    state.mkdir(exist_ok=True)
    settings = JoinSettings(f"localhost:{link.port}", backoff_s=0.05, backoff_cap_s=0.2, **(bandwidth or {}))
    roster = RosterFile(identity.folder / "roster", identity.root)

    def record(kind: str, **fields: int | str) -> None:
        events.append((kind, dict(fields)))

    # These servers have no recipe that could be bound: what an order may ask is tested in tests/deployment.
    more.setdefault("check", lambda greeting, header, front: ())
    client = Client(identity, roster, settings, rules or Policy(), state, worker, record=record, **more)
    ended: list[object] = []

    def run() -> None:
        try:
            ended.append(client.run())
        except FedtuneError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    site = Site(client, worker, state, events, thread, ended)
    thread.start()
    if trainer is None:
        worker.gate.set()
    try:
        yield site
    finally:
        worker.gate.set()
        client.stop()
        thread.join(END_S)
        assert not thread.is_alive()


def until(link: LinkServer, happened: Callable[[], Any]) -> Any:
    """Return the first true result, for which the test waits."""
    ends = time.monotonic() + END_S
    while not (result := happened()):
        assert time.monotonic() < ends, "it never happened"
        link.dispatcher.wait(0.02)
    return result


def collect_one(link: LinkServer, message_id: str) -> ReceivedParts | Withdrawn:
    """Wait for the result of a message id."""
    result: ReceivedParts | Withdrawn = until(link, lambda: link.dispatcher.collect([message_id]).get(message_id))
    return result


def post_scores(link: LinkServer, number: int = 0, name: str = "site-a") -> str:
    """Post a request for scores; return the message id."""
    adapter = {"q.a": np.ones((1, 3), np.float32), "q.b": np.ones((2, 1), np.float32)}
    request = encode_score_request(ScoreRequest(name, "flora", number, BASE, batch=1, blobs={"global": adapter}))
    return link.dispatcher.post(name, EVALUATE, request.header, request.blobs, seconds=60)


def post(link: LinkServer, number: int = 1, name: str = "site-a", body: bytes = b"") -> str:
    """Post a round's task to one of two clients; return the message id."""
    task = assignment(name, number)
    bodies = {sha256(body).hexdigest(): body} if body else {}
    link.dispatcher.begin_round(["site-a", "site-b"])
    return link.dispatcher.post(name, TRAIN, task.header, bodies, seconds=60)
