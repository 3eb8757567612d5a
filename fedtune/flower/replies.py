"""What a client's reply to an assignment is, as far as its outer form says: an update, or a failure with its reason."""

from __future__ import annotations

from flwr.app import Message

from fedtune.errors import WireError
from fedtune.flower.records import ERROR, UPDATE, unpack
from fedtune.messages import Failure
from fedtune.rounds.transport import Reply

LONGEST_REASON = 500


def decode_reply(client: str, reply: Message) -> Reply | Failure:
    """Return what a client's reply to an assignment is; only its outer form is looked at."""
    if reply.has_error():
        dead = reply.error.code != ERROR and "ActorDiedError" in (reply.error.reason or "")
        return Failure.from_text(client, error_reason(reply), code="WORKER_DIED" if dead else "")
    try:
        content = unpack(reply.content)
    except WireError as error:
        return Failure.from_text(client, str(error), kind="refused")
    if content.blobs.keys() != {UPDATE}:
        got = f"{sorted(content.blobs)[:5]}"
        return Failure(client, expected=f"one body, {UPDATE!r}", got=got, kind="refused")
    return Reply(client, content.blobs[UPDATE])


def error_reason(reply: Message) -> str:
    """Return the reason of an error reply: fedtune's own as it is, Flower's with its code, and both ends if long."""
    reason = one_line(reply.error.reason or "no reason given")
    if reply.error.code == ERROR:
        return reason[:LONGEST_REASON]
    if len(reason) > LONGEST_REASON:  # a traceback: its kind is at the front, the error at the end
        reason = f"{reason[: LONGEST_REASON // 2]} ... {reason[-LONGEST_REASON // 2 :]}"
    return f"Flower error {reply.error.code}: {reason}"


def one_line(text: str) -> str:
    """Return a client's text as one line without control characters: errors carry it to logs that escape nothing."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())
