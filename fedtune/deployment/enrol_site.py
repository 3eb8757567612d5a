"""A site that enrols with a code: what is said meanwhile, and what it has afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fedtune.link.client import enrolment
from fedtune.link.pki import codes, invitations
from fedtune.link.pki.identity import format_time
from fedtune.link.pki.signing import fingerprint


def enrol(
    given: str,
    folder: Path,
    *,
    lines: Iterable[str] = (),
    proxy: str = "",
    wait: Callable[[float], bool],
    say: Callable[[str], None],
    now: Callable[[], float] = time.time,
) -> Sequence[str] | None:
    """Enrol a site, and return what it has to know of that; None if `wait` gave up before it was signed.

    Args:
        given: the code, a file with it, or `-` for lines to read.
        folder: of the site's keys.
        lines: read for `-`.
        proxy: see `link.client.enrolment.enrol`.
        wait: see there.
        say: receives what happens meanwhile, a line at a time.
        now: seconds since 1970.

    Raises:
        FedtuneError: in one sentence, if it cannot be enrolled so.
    """
    code = invitations.decode(codes.read_given("invitation", given, "fedtune enroll invite", lines))
    request = enrolment.own_request(folder, name=code.name, org=code.org)
    say(f"{code.name} of {code.org}; the keys stay in {folder}")
    say(f"fingerprint, to compare by voice with the person who signs: {fingerprint(request)}")
    accepted = enrolment.enrol(code, folder, proxy=proxy, wait=wait, say=say, now=now)
    if accepted is None:
        return None
    return (
        f"{accepted.name} of {accepted.org} is enrolled as {accepted.role} in {accepted.federation}, "
        f"until {format_time(accepted.not_after)}",
        f"fingerprint of the federation's anchors, to compare with the CA's: {code.anchors}",
    )
