"""A site that enrols with a code: what is said meanwhile, and what it has afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fedtune.link.client import enrolment
from fedtune.link.client.http_proxy import settle_proxy
from fedtune.link.pki import codes, invitations
from fedtune.link.pki.identity import format_time
from fedtune.link.pki.signing import fingerprint
from fedtune.link.settings import JoinSettings


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
        proxy: HTTP proxy through which it dials, "environment" for that of the environment; empty: none.
        wait: see there.
        say: receives what happens meanwhile, a line at a time.
        now: seconds since 1970.

    Raises:
        FedtuneError: in one sentence, if it cannot be enrolled so.
    """
    code = read_code(given, lines)
    proxy = settle_proxy(JoinSettings(code.address, proxy=proxy), Path.cwd(), os.environ).proxy
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
        f"next: fedtune site init --server {code.server}, then fedtune join site.toml --dry-run",
    )


def read_code(given: str, lines: Iterable[str] = ()) -> invitations.Code:
    """Return the invitation that a site was given: as a code, as a file with it, or as `-` for lines to read.

    Raises:
        FedtuneError: if it is none.
    """
    return invitations.decode(codes.read_given("invitation", given, "fedtune enroll invite", lines))
