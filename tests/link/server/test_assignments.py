"""Open tasks: the bytes that belong to them, and the results that the round loop collects."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import pytest

from fedtune.link.envelopes import HELLO, TRAIN
from fedtune.link.rejections import RejectionError
from fedtune.link.server.assignments import Assignments, Task, Withdrawn
from fedtune.link.settings import LinkSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import Harness, assignment, make_harness, part, reason, signed_reply

DATA = b"update of anna"


def task(client: str, body: bytes) -> tuple[Task, Mapping[str, bytes]]:
    contents = {"": b"front", "body": body}
    header = pb.Header(to=client, task=TRAIN, round=1, parts=[part(key, contents[key]) for key in sorted(contents)])
    return Task(client, sha256(client.encode() + body).digest(), pb.Envelope(), header, 1000, 60.0, 0.0), contents


def test_bodies_are_kept_as_long_as_any_open_task_needs_them(tmp_path: Path) -> None:
    tasks = Assignments(tmp_path, inline_bytes=0)
    first, second = (tasks.add(*task(client, b"shared")) for client in ("anna", "bob"))
    shared = sha256(b"shared").digest()
    tasks.close(first)
    assert tasks.body("bob", shared) == b"shared"
    tasks.close(second)
    with pytest.raises(RejectionError):
        tasks.body("bob", shared)
    assert tasks.all() == []


def test_a_result_is_for_every_message_id_and_collected_once(tmp_path: Path) -> None:
    tasks = Assignments(tmp_path, inline_bytes=0)
    posted = tasks.add(*task("anna", b"body"))
    ids = [tasks.new_message_id(posted) for _ in range(2)]
    tasks.set_result(posted, Withdrawn("anna", "why"))
    assert tasks.waiting_task(ids[0]) is None
    assert tasks.collect(ids) == dict.fromkeys(ids, Withdrawn("anna", "why"))
    assert tasks.collect(ids) == {}
    tasks.set_result(posted, Withdrawn("anna", "again"))
    assert tasks.collect(ids) == {}


def test_parts_travel_with_their_task_up_to_the_limits_of_one_and_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posted, contents = task("anna", b"b" * 10)
    for inline_bytes, expected in ((4, []), (5, [5]), (10, [5, 10])):
        tasks = Assignments(tmp_path, inline_bytes=inline_bytes)
        tasks.add(posted, contents)
        work = tasks.work(posted, left_s=1.5)
        assert ([len(one.data) for one in work.inline], work.left_ms) == (expected, 1500)
    monkeypatch.setattr("fedtune.link.server.assignments.MAX_INLINE_BYTES", 14)
    assert [len(one.data) for one in tasks.work(posted, left_s=0).inline] == [5]


def test_a_body_is_given_to_whom_it_was_sent_and_kept_as_long(harness: Harness) -> None:
    for client in ("anna", "bob"):
        harness.dispatcher.post(client, HELLO, b"front", {"k": b"shared"}, seconds=60)
    wanted = sha256(b"shared").digest()
    assert harness.dispatcher.body("anna", wanted) == harness.dispatcher.body("bob", wanted) == b"shared"
    for client, digested in (("carl", wanted), ("anna", sha256(b"other").digest())):
        with pytest.raises(RejectionError) as caught:
            harness.dispatcher.body(client, digested)
        assert reason(caught) == "NOT_WANTED"


def test_small_parts_travel_with_their_task_and_large_ones_are_fetched(tmp_path: Path) -> None:
    harness = make_harness(tmp_path, LinkSettings(inline_kib=1))
    bodies = {sha256(data).hexdigest(): data for data in (b"s" * 1024, b"l" * 1025)}
    harness.dispatcher.post("anna", TRAIN, assignment("anna", 1).header, bodies, seconds=60)
    offered = harness.dispatcher.offer("anna", ())
    assert offered is not None
    result = {one.digest.hex(): one.data for one in offered.work.inline}
    assert sha256(b"s" * 1024).hexdigest() in result
    assert sha256(b"l" * 1025).hexdigest() not in result
    assert all(sha256(data).hexdigest() == key for key, data in result.items())


def test_two_questions_never_have_the_same_id(harness: Harness) -> None:
    """Else the decline of the first, not collected yet, is taken for the reply to the second."""
    first, task, task_digest = harness.post("anna")
    said = pb.Decline(veto=pb.OUTSIDE_HOURS, note="at night")
    harness.submit("anna", signed_reply("anna", task, task_digest, b"", kind=pb.DECLINE, parts=[], decline=said))
    second, _, _ = harness.post("anna")
    assert first != second
    assert harness.dispatcher.collect([second]) == {}
