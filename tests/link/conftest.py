"""A hub with a clock that is turned by hand, and clients that sign what they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.link.envelopes import PROTOCOL, TRAIN, UPDATE, build, digest, seal
from fedtune.link.server.blocklist import Blocklist
from fedtune.link.server.dispatcher import Dispatcher, RunInfo
from fedtune.link.settings import LinkSettings
from fedtune.messages import Assignment, Plan, Training, TrainLora
from fedtune.wire.codec import EncodedAssignment, encode_assignment
from fedtune.wire.v1 import link_pb2 as pb

KEY = Ed25519PrivateKey.from_private_bytes(b"\7" * 32)
RUN = RunInfo("care", "0123456789abcdef", b'name = "x"\n', "server", KEY)
BASE = "9f3c" * 16


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Desk:
    """A hub, and everything that is done to it."""

    hub: Dispatcher
    clock: Clock
    told: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def post(self, client: str, number: int = 1, *, seconds: float = 60.0) -> tuple[str, pb.Header, bytes]:
        """Ask a client for a round; return the message id, the order's header and its digest."""
        order = assignment(client, number)
        message_id = self.hub.post(client, TRAIN, order.header, order.blobs, seconds=seconds)
        reply = self.hub.offer(client, ())
        assert reply is not None
        return message_id, pb.Header.FromString(reply.work.order.header), digest(reply.work.order)

    def submit(self, client: str, envelope: pb.Envelope, *data: bytes) -> pb.SubmitReply | None:
        header = pb.Header.FromString(envelope.header)
        return self.hub.submit(client, digest(envelope), header, {sha256(one).digest(): one for one in data})


def assignment(client: str, number: int, *, seed: int = 0) -> EncodedAssignment:
    plan = Plan(client, rank=2, scale=2.0, training=Training(batch=1, learning_rate=0.1, steps=1))
    return encode_assignment(
        Assignment("flora", round=number, seed=seed, plan=plan, task=TrainLora(a_key=0), base=BASE)
    )


def answer(client: str, asked: pb.Header, asked_digest: bytes, data: bytes, **changes: Any) -> pb.Envelope:
    """Return a client's signed answer to an order."""
    header = pb.Header(
        protocol=PROTOCOL,
        federation=asked.federation,
        run=asked.run,
        author=client,
        kind=pb.ANSWER,
        round=asked.round,
        recipe=asked.recipe,
        base=asked.base,
        state=asked.state,
        order=asked_digest,
        parts=[pb.Part(key=UPDATE, digest=sha256(data).digest(), num_bytes=len(data))],
        build=build(),
    )
    for name, value in changes.items():
        if name == "parts":
            del header.parts[:]
            header.parts.extend(value)
        elif name == "decline":
            header.decline.CopyFrom(value)
        else:
            setattr(header, name, value)
    return seal(header, KEY)


def part(key: str, data: bytes) -> pb.Part:
    return pb.Part(key=key, digest=sha256(data).digest(), num_bytes=len(data))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return made(tmp_path)


def made(folder: Path, settings: LinkSettings | None = None, **more: Any) -> Desk:
    clock, told = Clock(), list[tuple[str, Mapping[str, Any]]]()

    def tell(kind: str, **fields: int | str) -> None:
        told.append((kind, fields))

    bars = Blocklist(folder / "barred", clock=clock)
    hub = Dispatcher(RUN, settings or LinkSettings(), folder / "spool", bars, tell=tell, clock=clock, **more)
    hub.limit = lambda front: 1000
    return Desk(hub, clock, told)
