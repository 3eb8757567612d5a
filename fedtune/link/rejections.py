"""Rejections as they travel: a reason code of the schema, with what was expected and what came."""

from __future__ import annotations

from fedtune.errors import WireError, expected_and_got
from fedtune.wire.v1 import link_pb2 as pb

MAX_TEXT_CHARS = 256
"""In each text of a refusal."""
TRANSIENT = frozenset(
    {
        pb.STALE_EPOCH,
        pb.TOO_MANY_CALLS,
        pb.NAME_IN_USE,
        pb.DISK_LOW,
        pb.STALLED,
        pb.BUSY,
        pb.ROSTER_OLD,
        pb.QUOTA,
        pb.OFFSET,
        pb.QUEUE_FULL,
        pb.RENEWAL_OFF,
    }
)
"""After these the same bytes may be taken later; after any other they never will."""
FATAL = frozenset(
    {
        pb.NOT_IN_ROSTER,
        pb.REVOKED,
        pb.WRONG_ROLE,
        pb.SERIAL_UNKNOWN,
        pb.CERTIFICATE_ENDED,
        pb.BARRED,
        pb.PROTOCOL,
        pb.WRONG_FEDERATION,
        pb.BUILD_DIFFERS,
        pb.SITE_DIFFERS,
    }
)
"""After these no further try of a client can succeed: a person must act."""
ADVICE = {
    pb.NOT_IN_ROSTER: "ask the coordinator to enrol this site",
    pb.REVOKED: "ask the coordinator why this site was revoked",
    pb.WRONG_ROLE: "enrol again with --role client",
    pb.SERIAL_UNKNOWN: "install the newest certificate of this site, or ask for a newer roster on the server",
    pb.CERTIFICATE_ENDED: "enrol this site again (fedtune enroll request, sign, accept), and check both clocks",
    pb.BARRED: "ask the coordinator to readmit this site",
    pb.PROTOCOL: "install the fedtune of the server",
    pb.BUILD_DIFFERS: "install the fedtune of the server",
    pb.NAME_IN_USE: "end one of the two, or enrol this site under a name of its own; it waits until the other has gone",
    pb.SITE_DIFFERS: "mend this site's file, and start join again",
    pb.WRONG_FEDERATION: "check link.address and link.identity",
}


class RejectionError(WireError):
    """Something from outside is rejected; carries the refusal that is sent back."""

    def __init__(self, refusal: pb.Refusal) -> None:
        self.refusal = refusal
        super().__init__(describe(refusal))


def rejection(reason: pb.Reason, field: str, expected: object, got: object) -> RejectionError:
    """Return the error for a refusal; texts are cut and put on one line."""
    return RejectionError(
        pb.Refusal(
            reason=reason,
            field=one_line(field),
            expected=one_line(str(expected)),
            found=one_line(str(got)),
            # Sent along, since a client may be of an earlier release that does not know the reason.
            passing=reason in TRANSIENT,
        )
    )


def one_line(text: str, *, longest: int = MAX_TEXT_CHARS) -> str:
    """Return a text from outside as one printable line of at most `longest` characters."""
    # Cut first, so that a huge text costs no time; four times, since runs of spaces shrink to one.
    plain = "".join(char if char.isprintable() else " " for char in text[: 4 * longest])
    return " ".join(plain.split())[:longest]


def reason_name(reason: int) -> str:
    """Return the name of a reason code; of one that only a later release knows, its number."""
    return str(pb.Reason.Name(pb.Reason.ValueType(reason))) if reason in pb.Reason.values() else f"reason {reason}"


def veto_name(veto: int) -> str:
    """Return the name of a veto, without the prefix that tells some from a reason; of a later release, VETO_UNKNOWN."""
    if veto not in pb.Veto.values():
        return "VETO_UNKNOWN"
    return str(pb.Veto.Name(pb.Veto.ValueType(veto))).removeprefix("VETO_") if veto else "VETO_UNSET"


def describe(refusal: pb.Refusal) -> str:
    """Return a refusal as one printable sentence."""
    field = f"{one_line(refusal.field)}: " if refusal.field else ""
    advice = ADVICE.get(refusal.reason, "")
    return (
        # Cut again: a refusal may come from a peer that does not hold to the limits.
        f"{reason_name(refusal.reason)}: {field}"
        f"{expected_and_got(one_line(refusal.expected), one_line(refusal.found))}"
        f"{f'; {advice}' if advice else ''}"
    )
