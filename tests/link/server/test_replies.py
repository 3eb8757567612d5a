"""What clients reply to their tasks: what is refused before a byte is taken, and what becomes of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from fedtune.link import uploads
from fedtune.link.envelopes import HELLO, digest
from fedtune.link.rejections import RejectionError
from fedtune.link.server.assignments import ReceivedParts, Withdrawn
from fedtune.link.settings import LinkSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import RUN, Harness, make_harness, part, reason, signed_reply, verdict

DATA = b"update of anna"


def test_what_differs_from_the_task_is_refused_before_a_byte_is_taken(harness: Harness) -> None:
    _, task, task_digest = harness.post("anna")
    big = pb.Part(key="update", digest=b"d" * 32, num_bytes=1001)
    cases: Mapping[str, Mapping[str, Any]] = {
        "WRONG_FEDERATION": {"federation": "other"},
        "WRONG_RUN": {"run": "another"},
        "KIND_NOT_EXPECTED": {"kind": pb.ORDER},
        "ORDER_UNKNOWN": {"order": b"o" * 32},
        "ROUND_DIFFERS": {"round": 2},
        "RECIPE_DIFFERS": {"recipe": b"r" * 32},
        "BASE_DIFFERS": {"base": b"b" * 32},
        "STATE_DIFFERS": {"state": b"s" * 32},
        "PARTS": {"parts": []},
        "BODY_SIZE": {"parts": [big]},
    }
    for expected, changes in cases.items():
        with pytest.raises(RejectionError) as caught:
            harness.submit("anna", signed_reply("anna", task, task_digest, DATA, **changes), DATA)
        assert reason(caught) == expected
    assert not list(harness.dispatcher.folder.iterdir())
    assert harness.submit("anna", signed_reply("anna", task, task_digest, DATA), DATA) is None  # nothing of it stuck


def test_a_task_is_answered_by_its_own_client_alone(harness: Harness) -> None:
    _, task, task_digest = harness.post("anna")
    harness.post("bob")
    with pytest.raises(RejectionError) as caught:
        harness.submit("bob", signed_reply("bob", task, task_digest, DATA), DATA)
    assert reason(caught) == "ORDER_UNKNOWN"


def test_the_first_whole_reply_wins(harness: Harness) -> None:
    message_id, task, task_digest = harness.post("anna")
    harness.submit("anna", signed_reply("anna", task, task_digest, DATA), DATA)
    with pytest.raises(RejectionError) as caught:
        harness.submit("anna", signed_reply("anna", task, task_digest, b"another"), b"another")
    assert reason(caught) == "CONFLICT"
    harness.dispatcher.settle("anna", 1, None)
    with pytest.raises(RejectionError) as caught:
        harness.submit("anna", signed_reply("anna", task, task_digest, b"another"), b"another")
    assert reason(caught) == "CONFLICT"
    assert harness.dispatcher.collect([message_id])[message_id] == ReceivedParts("anna", {"update": DATA})


def test_a_reply_that_has_not_come_whole_may_be_replaced(harness: Harness) -> None:
    message_id, task, task_digest = harness.post("anna")
    reply = harness.submit("anna", signed_reply("anna", task, task_digest, b"never pushed"))
    assert reply is not None
    assert [one.offset for one in reply.wanted.parts] == [0]
    harness.submit("anna", signed_reply("anna", task, task_digest, DATA), DATA)
    assert harness.dispatcher.collect([message_id])[message_id] == ReceivedParts("anna", {"update": DATA})


def test_inline_bytes_of_another_digest_are_refused(harness: Harness) -> None:
    _, task, task_digest = harness.post("anna")
    sent = signed_reply("anna", task, task_digest, DATA)
    with pytest.raises(RejectionError) as caught:
        harness.dispatcher.submit(
            "anna", digest(sent), pb.Header.FromString(sent.header), {sha256(DATA).digest(): b"other"}
        )
    assert reason(caught) == "DIGEST"


def test_a_pushed_part_is_delivered_as_a_view_of_its_file(harness: Harness) -> None:
    message_id, task, task_digest = harness.post("anna")
    sent = signed_reply("anna", task, task_digest, DATA)
    reply = harness.submit("anna", sent)
    assert reply is not None
    wanted = reply.wanted.parts[0].digest
    part = harness.dispatcher.missing_part("anna", digest(sent), wanted)
    incoming = uploads.IncomingUpload(uploads.part_path(harness.dispatcher.folder, "anna", wanted), part, 0)
    incoming.append(DATA)
    assert incoming.finish()
    incoming.close()
    harness.dispatcher.add_pushed_part("anna", digest(sent), wanted)
    assert harness.submit("anna", sent) is None
    (result,) = harness.dispatcher.collect([message_id]).values()
    assert isinstance(result, ReceivedParts)
    harness.dispatcher.settle("anna", 1, None)
    assert not list(harness.dispatcher.folder.iterdir())
    assert bytes(result.bodies["update"]) == DATA  # also after the file has gone
    with pytest.raises(RejectionError) as caught:
        harness.dispatcher.missing_part("anna", digest(sent), wanted)
    assert reason(caught) == "NOT_WANTED"


def test_what_comes_after_its_round_is_late_and_no_byte_of_it_is_taken(harness: Harness) -> None:
    message_id, task, task_digest = harness.post("anna")
    harness.dispatcher.end_round(1)
    assert harness.dispatcher.collect([message_id]) == {message_id: Withdrawn("anna", "its round has ended")}
    assert verdict(harness.submit("anna", signed_reply("anna", task, task_digest, DATA))) == "LATE"
    offered = harness.dispatcher.offer("anna", [task_digest])
    assert offered is not None
    assert offered.withdrawn.order == task_digest


def test_a_task_that_is_about_to_be_asked_again_is_waited_for(tmp_path: Path) -> None:
    harness = make_harness(tmp_path, ended=1)
    front = pb.Header(federation="care", run=RUN.run, round=2)
    reply = harness.submit("anna", signed_reply("anna", front, b"o" * 32, DATA))
    assert reply is not None
    assert reply.WhichOneof("what") == "busy"
    harness.post("anna", 2)
    with pytest.raises(RejectionError) as caught:
        harness.submit("anna", signed_reply("anna", front, b"o" * 32, DATA))
    assert reason(caught) == "ORDER_UNKNOWN"


def test_a_decline_names_its_veto_and_the_client_may_be_asked_again(harness: Harness) -> None:
    message_id, task, task_digest = harness.post("anna")
    note = pb.Decline(veto=pb.RANK_TOO_LARGE, note="policy.max_rank: allowed 1;\x1b[2J got 2")
    no = signed_reply("anna", task, task_digest, b"", kind=pb.DECLINE, parts=[], decline=note)
    assert verdict(harness.submit("anna", no)) == "NOTED"
    (gone,) = harness.dispatcher.collect([message_id]).values()
    assert gone == Withdrawn("anna", "declined, RANK_TOO_LARGE: policy.max_rank: allowed 1; [2J got 2")
    again, task, task_digest = harness.post("anna")
    harness.submit("anna", signed_reply("anna", task, task_digest, DATA), DATA)
    assert harness.dispatcher.collect([again])[again] == ReceivedParts("anna", {"update": DATA})


@pytest.mark.parametrize(
    ("limits", "free", "expected"),
    [(LinkSettings(day_gib=1e-8), 10**12, "QUOTA"), (LinkSettings(free_mib=1), 2**20, "DISK_LOW")],
)
def test_quota_and_disk_are_looked_at_first_and_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: LinkSettings, free: int, expected: str
) -> None:
    harness = make_harness(tmp_path, limits)
    monkeypatch.setattr(uploads, "free_bytes", lambda folder: free)
    _, task, task_digest = harness.post("anna")
    with pytest.raises(RejectionError) as caught:
        harness.submit("anna", signed_reply("anna", task, task_digest, DATA), DATA)
    assert reason(caught) == expected
    assert caught.value.refusal.passing


def test_a_quota_is_of_the_last_24_hours(tmp_path: Path) -> None:
    harness = make_harness(tmp_path, LinkSettings(day_gib=20 / 2**30))
    for hours in (0, 25):
        harness.clock.now += 3600 * hours
        number = 1 if not hours else 2
        _, task, task_digest = harness.post("anna", number)
        harness.submit("anna", signed_reply("anna", task, task_digest, DATA), DATA)
    assert harness.dispatcher.status()["anna"].num_bytes == len(DATA)


def test_another_build_is_refused_where_one_is_pinned(tmp_path: Path) -> None:
    harness = make_harness(tmp_path, LinkSettings(build="fedtune 0.0.1"))
    _, task, task_digest = harness.post("anna")
    with pytest.raises(RejectionError) as caught:
        harness.submit("anna", signed_reply("anna", task, task_digest, DATA), DATA)
    assert reason(caught) == "BUILD_DIFFERS"


def test_a_late_reply_is_late_on_every_repeat_and_none_of_its_bytes_are_kept(harness: Harness) -> None:
    _, task, task_digest = harness.post("anna")
    sent = signed_reply("anna", task, task_digest, DATA)
    harness.dispatcher.end_round(1)
    first = harness.submit("anna", sent, DATA)
    assert verdict(first) == "LATE"
    assert harness.submit("anna", sent, DATA) == first
    assert not list(harness.dispatcher.folder.iterdir())
    with pytest.raises(RejectionError) as caught:
        harness.dispatcher.missing_part("anna", digest(sent), sha256(DATA).digest())
    assert reason(caught) == "NOT_WANTED"
    harness.dispatcher.sign_of_life("anna")
    assert harness.dispatcher.status()["anna"].num_bytes == 0


def test_a_whole_reply_that_no_round_took_is_late_when_the_round_ends(harness: Harness) -> None:
    _, task, task_digest = harness.post("anna")
    sent = signed_reply("anna", task, task_digest, DATA)
    assert harness.submit("anna", sent, DATA) is None
    harness.dispatcher.end_round(1)
    assert verdict(harness.submit("anna", sent)) == "LATE"
    harness.dispatcher.settle("anna", 1, None)  # nothing changes what has been said
    assert verdict(harness.submit("anna", sent)) == "LATE"


def test_a_decline_has_one_receipt_and_cannot_be_taken_back(harness: Harness) -> None:
    message_id, task, task_digest = harness.post("anna")
    said = pb.Decline(veto=pb.WORK_FAILED, note="out of memory")
    no = signed_reply("anna", task, task_digest, b"", kind=pb.DECLINE, parts=[], decline=said)
    first = harness.submit("anna", no)
    assert verdict(first) == "NOTED"
    assert harness.submit("anna", no) == first
    with pytest.raises(RejectionError) as caught:
        harness.submit("anna", signed_reply("anna", task, task_digest, DATA), DATA)
    assert reason(caught) == "CONFLICT"
    assert harness.dispatcher.collect([message_id]) == {message_id: Withdrawn("anna", "out of memory")}


def test_a_decline_after_the_whole_reply_is_a_conflict(harness: Harness) -> None:
    message_id, task, task_digest = harness.post("anna")
    harness.submit("anna", signed_reply("anna", task, task_digest, DATA), DATA)
    said = pb.Decline(veto=pb.OPERATOR, note="no")
    with pytest.raises(RejectionError) as caught:
        harness.submit("anna", signed_reply("anna", task, task_digest, b"", kind=pb.DECLINE, parts=[], decline=said))
    assert reason(caught) == "CONFLICT"
    assert harness.dispatcher.collect([message_id]) == {message_id: ReceivedParts("anna", {"update": DATA})}


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [part("other", DATA)],
        [part("", DATA)],
        [part("", DATA), part("update", DATA)],
        [part("update", DATA), part("update2", DATA)],
    ],
)
def test_an_update_is_one_part_of_one_name(harness: Harness, parts: list[pb.Part]) -> None:
    _, task, task_digest = harness.post("anna")
    with pytest.raises(RejectionError) as caught:
        harness.submit("anna", signed_reply("anna", task, task_digest, DATA, parts=parts), DATA)
    assert reason(caught) == "PARTS"


def test_a_hello_is_answered_by_a_profile_of_no_more_than_its_limit(tmp_path: Path) -> None:
    harness = make_harness(tmp_path, LinkSettings(hello_mib=1))
    harness.dispatcher.post("anna", HELLO, b"", {}, seconds=60)
    offered = harness.dispatcher.offer("anna", ())
    assert offered is not None
    task, task_digest = pb.Header.FromString(offered.work.order.header), digest(offered.work.order)
    large = pb.Part(key="", digest=b"d" * 32, num_bytes=2**20 + 1)
    for parts, expected in (([part("body", DATA)], "PARTS"), ([large], "BODY_SIZE")):
        with pytest.raises(RejectionError) as caught:
            harness.submit("anna", signed_reply("anna", task, task_digest, DATA, parts=parts), DATA)
        assert reason(caught) == expected
