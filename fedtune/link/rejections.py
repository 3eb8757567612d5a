"""Why something is not taken, as it travels: a reason of the schema, with what was expected and what was found."""

from __future__ import annotations

from fedtune.errors import WireError
from fedtune.wire.v1 import link_pb2 as pb

LONGEST = 256
"""Characters of each text of a refusal."""
PASSING = frozenset(
    {pb.STALE_EPOCH, pb.TOO_MANY_CALLS, pb.DISK_LOW, pb.STALLED, pb.BUSY, pb.ROSTER_OLD, pb.QUOTA, pb.OFFSET}
)
"""After these the same bytes may be taken later; after any other they never will."""
FATAL = frozenset(
    {
        pb.NOT_IN_ROSTER,
        pb.REVOKED,
        pb.WRONG_ROLE,
        pb.SERIAL_UNKNOWN,
        pb.BARRED,
        pb.PROTOCOL,
        pb.WRONG_FEDERATION,
        pb.BUILD_DIFFERS,
    }
)
"""After these there is nothing that a client can do by trying again: somebody must act."""
ADVICE = {
    pb.NOT_IN_ROSTER: "ask the coordinator to enrol this site",
    pb.REVOKED: "ask the coordinator why this site was revoked",
    pb.WRONG_ROLE: "enrol again with --role client",
    pb.SERIAL_UNKNOWN: "install the newest certificate of this site, or ask for a newer roster on the server",
    pb.BARRED: "ask the coordinator to readmit this site",
    pb.PROTOCOL: "install the fedtune of the server",
    pb.BUILD_DIFFERS: "install the fedtune of the server",
    pb.WRONG_FEDERATION: "check link.address and link.identity",
}


class RejectionError(WireError):
    """Something is not taken; carries the refusal."""

    def __init__(self, refusal: pb.Refusal) -> None:
        self.refusal = refusal
        super().__init__(describe(refusal))


def rejection(reason: pb.Reason, field: str, expected: object, found: object) -> RejectionError:
    """Return the error of a refusal; texts are cut and put on one line."""
    return RejectionError(
        pb.Refusal(
            reason=reason,
            field=one_line(field),
            expected=one_line(str(expected)),
            found=one_line(str(found)),
            passing=reason in PASSING,
        )
    )


def one_line(text: str, *, longest: int = LONGEST) -> str:
    """Return a text of somebody else's as one printable line of at most so many characters."""
    plain = "".join(one if one.isprintable() else " " for one in text[: 4 * longest])
    return " ".join(plain.split())[:longest]


def code(reason: int) -> str:
    """Return the name of a reason, also of one that only a later release knows."""
    return str(pb.Reason.Name(pb.Reason.ValueType(reason))) if reason in pb.Reason.values() else f"reason {reason}"


def describe(refusal: pb.Refusal) -> str:
    """Return a refusal as one sentence; what came from elsewhere is made one printable line."""
    field = f"{one_line(refusal.field)}: " if refusal.field else ""
    advice = ADVICE.get(refusal.reason, "")
    return (
        f"{code(refusal.reason)}: {field}expected {one_line(refusal.expected)}; got {one_line(refusal.found)}"
        f"{f'; {advice}' if advice else ''}"
    )
