"""Signed replies: what they repeat of their task, and which parts travel within the call."""

from __future__ import annotations

import threading
import time
from hashlib import sha256
from pathlib import Path

import pytest

from fedtune.link.client.jobs import Job
from fedtune.link.client.replies import (
    MAX_INLINE_BYTES,
    is_decline,
    reply_bytes,
    reply_header,
    sample_statement,
    sign_decline,
    sign_reply,
)
from fedtune.link.envelopes import verify_envelope
from fedtune.link.pki.identity import Identity, load_identity
from fedtune.link.pki.roster import Party
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import enroll_parties


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    places = enroll_parties(tmp_path_factory.mktemp("care"))
    return load_identity(places["site-a"], role="client", now=int(time.time()))


def job() -> Job:
    header = pb.Header(federation="care", run="0" * 16, round=3, recipe=b"r", base=b"b", state=b"s")
    return Job(b"d" * 32, header, threading.Event())


def test_a_reply_repeats_what_was_asked(identity: Identity) -> None:
    header = reply_header(identity, job(), [])
    assert (header.author, header.kind, header.order) == ("site-a", pb.ANSWER, b"d" * 32)
    for name in ("federation", "run", "round", "recipe", "base", "state"):
        assert getattr(header, name) == getattr(job().header, name)


def test_a_sample_has_the_fields_and_the_size_of_a_real_statement(identity: Identity, tmp_path: Path) -> None:
    (tmp_path / "update").write_bytes(data := b"u" * 76)
    part = pb.Part(key="update", digest=sha256(data).digest(), num_bytes=76)
    task = pb.Header(federation="care", run="0" * 16, round=3, recipe=bytes(32), base=bytes(32), state=bytes(32))
    header = reply_header(identity, Job(b"d" * 32, task, threading.Event()), [part])
    real = sign_reply(identity, header, {part.digest: tmp_path / "update"}, inline_bytes=1000)
    sample, around = sample_statement("site-a", "care", data)
    assert around == len(real.SerializeToString()) - len(data)
    shown = {field.name for field, _ in pb.Header.FromString(sample).ListFields()}
    assert shown == {field.name for field, _ in header.ListFields()}


def test_small_parts_travel_within_the_call_up_to_its_limit(identity: Identity, tmp_path: Path) -> None:
    sizes = {"a": 10, "b": 11, "c": MAX_INLINE_BYTES}
    paths, parts = dict[bytes, Path](), list[pb.Part]()
    for key, size in sizes.items():
        path = tmp_path / key
        path.write_bytes(key.encode() * size)
        name = sha256(path.read_bytes()).digest()
        paths[name] = path
        parts.append(pb.Part(key=key, digest=name, num_bytes=size))
    header = reply_header(identity, job(), parts)
    small = sign_reply(identity, header, paths, inline_bytes=10)
    assert [len(part.data) for part in small.inline] == [10]
    large = sign_reply(identity, header, paths, inline_bytes=2 * MAX_INLINE_BYTES)
    assert [len(part.data) for part in large.inline] == [10, 11]  # together with the third they exceed one message
    assert reply_bytes(small) == sum(sizes.values())
    assert not is_decline(small)


def test_a_decline_is_signed_and_its_note_is_one_short_line(identity: Identity) -> None:
    request = sign_decline(identity, job(), pb.WORK_FAILED, "out of\nmemory " * 100)
    header = pb.Header.FromString(request.envelope.header)
    assert is_decline(request)
    assert (header.decline.veto, len(header.decline.note)) == (pb.WORK_FAILED, 500)
    assert "\n" not in header.decline.note
    party = Party("site-a", "a", "client", identity.public, ("1",), 0, 1)
    assert verify_envelope(request.envelope, lambda key: party)[1] is party
