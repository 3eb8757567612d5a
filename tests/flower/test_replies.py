"""What a reply is as far as its outer form says, and how the reason of an error is shortened to one line."""

from __future__ import annotations

import pytest
from flwr.app import Error, Message, MessageType, RecordDict

from fedtune.flower.records import ERROR, UPDATE, pack
from fedtune.flower.replies import LONGEST_REASON, decode_reply, error_reason
from fedtune.flower.shim import stamp
from fedtune.messages import Failure
from fedtune.rounds.transport import Reply


def reply(content: RecordDict | Error) -> Message:
    assignment = Message(RecordDict(), 1, MessageType.TRAIN)
    stamp(assignment, "message")
    return Message(content, reply_to=assignment)


def test_one_body_named_update_is_an_update() -> None:
    assert decode_reply("ann", reply(pack(b"", {UPDATE: b"bytes"}))) == Reply("ann", b"bytes")


@pytest.mark.parametrize("content", [RecordDict(), pack(b"", {}), pack(b"", {UPDATE: b"", "more": b""})])
def test_anything_else_is_refused(content: RecordDict) -> None:
    failure = decode_reply("ann", reply(content))
    assert isinstance(failure, Failure)
    assert (failure.client, failure.kind) == ("ann", "refused")


def test_a_worker_that_died_has_a_code_of_its_own_and_a_client_cannot_claim_it() -> None:
    codes = [decode_reply("ann", reply(Error(code, "ActorDiedError"))) for code in (2, ERROR)]
    assert [failure.code for failure in codes if isinstance(failure, Failure)] == ["WORKER_DIED", ""]


def test_a_reason_is_one_line_without_control_characters() -> None:
    assert error_reason(reply(Error(ERROR, "a\x1b[2J\nb\u202e c"))) == "a [2J b c"


def test_of_a_long_error_of_flower_both_ends_are_left() -> None:
    text = error_reason(reply(Error(2, "KeyError " + "x" * 2000 + " the end")))
    assert text.startswith("Flower error 2: KeyError x")
    assert text.endswith("x the end")
    assert len(text) < LONGEST_REASON + 30
    assert len(error_reason(reply(Error(ERROR, "x" * 2000)))) == LONGEST_REASON
