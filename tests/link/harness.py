"""A dispatcher for tests, with a clock that is set by hand, and clients that sign their replies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.link.envelopes import PROTOCOL, TRAIN, UPDATE, build_version, digest, seal
from fedtune.link.rejections import RejectionError
from fedtune.link.server.blocklist import Blocklist
from fedtune.link.server.dispatcher import Dispatcher
from fedtune.link.server.run_info import RunInfo
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
class Harness:
    """A dispatcher with its clock and the events that it has recorded."""

    dispatcher: Dispatcher
    clock: Clock
    events: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def post(self, client: str, number: int = 1, *, seconds: float = 60.0) -> tuple[str, pb.Header, bytes]:
        """Post a round's task; return the message id, the task's header and its digest."""
        task = assignment(client, number)
        message_id = self.dispatcher.post(client, TRAIN, task.header, task.blobs, seconds=seconds)
        reply = self.dispatcher.offer(client, ())
        assert reply is not None
        return message_id, pb.Header.FromString(reply.work.order.header), digest(reply.work.order)

    def submit(self, client: str, envelope: pb.Envelope, *data: bytes) -> pb.SubmitReply | None:
        header = pb.Header.FromString(envelope.header)
        return self.dispatcher.submit(client, digest(envelope), header, {sha256(one).digest(): one for one in data})


def assignment(client: str, number: int, *, seed: int = 0) -> EncodedAssignment:
    plan = Plan(client, rank=2, scale=2.0, training=Training(batch=1, learning_rate=0.1, steps=1))
    return encode_assignment(
        Assignment("flora", round=number, seed=seed, plan=plan, task=TrainLora(a_key=0), base=BASE)
    )


def signed_reply(client: str, task: pb.Header, task_digest: bytes, data: bytes, **changes: Any) -> pb.Envelope:
    """Return a client's signed reply to a task."""
    header = pb.Header(
        protocol=PROTOCOL,
        federation=task.federation,
        run=task.run,
        author=client,
        kind=pb.ANSWER,
        round=task.round,
        recipe=task.recipe,
        base=task.base,
        state=task.state,
        order=task_digest,
        parts=[pb.Part(key=UPDATE, digest=sha256(data).digest(), num_bytes=len(data))],
        build=build_version(),
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


def make_harness(folder: Path, settings: LinkSettings | None = None, **more: Any) -> Harness:
    clock, events = Clock(), list[tuple[str, Mapping[str, Any]]]()

    def record(kind: str, **fields: int | str) -> None:
        events.append((kind, fields))

    blocklist = Blocklist(folder / "barred", clock=clock)
    dispatcher = Dispatcher(
        RUN, settings or LinkSettings(), folder / "spool", blocklist, record=record, clock=clock, **more
    )
    dispatcher.max_reply_bytes = lambda front: 1000
    return Harness(dispatcher, clock, events)


def verdict(reply: pb.SubmitReply | None) -> str:
    """Return the verdict of the receipt in a response."""
    assert reply is not None
    assert reply.WhichOneof("what") == "receipt", reply
    return pb.Verdict.Name(pb.Header.FromString(reply.receipt.header).receipt.verdict)


def reason(error: pytest.ExceptionInfo[RejectionError]) -> str:
    """Return the reason code of a rejection."""
    return pb.Reason.Name(error.value.refusal.reason)
