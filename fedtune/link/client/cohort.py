"""The cohort that an order names, held against the roster that this site has: members, and distinct organisations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedtune.link.client.policy import PolicyViolation
from fedtune.link.pki.roster import SKEW_S, Roster
from fedtune.link.rejections import one_line
from fedtune.wire.v1 import link_pb2 as pb


def cohort_violations(
    header: pb.Header, roster: Roster, own: str, *, least: int, now: float
) -> Sequence[PolicyViolation]:
    """Return what is wrong with the cohort of a round's order; the server's word alone counts for nothing.

    Args:
        header: of the order, verified.
        roster: of this site; the federation's authority has signed it, not the server.
        own: name of this site.
        least: distinct organisations without which the site takes no part; 1: it asks for no others.
        now: seconds since 1970.
    """
    names = list(header.members)
    # Servers before 0.3 name no one; a cohort that is too small by its number has been vetoed for that.
    if not names and (least == 1 or header.cohort < least):
        return ()
    return list(violations(names, header.cohort, roster, own, least, now))


def violations(
    names: Sequence[str], size: int, roster: Roster, own: str, least: int, now: float
) -> Iterator[PolicyViolation]:
    if not names:
        note = f"policy.min_cohort: at least {least} organisations, by name; got an order without names"
        yield PolicyViolation(pb.COHORT_UNKNOWN, f"{note}; ask the coordinator to install 0.3 or later")
        return
    if list(names) != sorted(set(names)) or len(names) > size or own not in names:
        expected = f"{own} and others, each once and in order, of {size} clients"
        yield PolicyViolation(pb.COHORT_UNKNOWN, f"expected a cohort of {expected}; got {one_line(', '.join(names))}")
        return
    known = {name: party for name in names if (party := roster.parties.get(name)) is not None}
    members = {
        name: party
        for name, party in known.items()
        if party.role == "client" and party.state == "active" and party.not_before - SKEW_S <= now <= party.not_after
    }
    if strange := [name for name in names if name not in members]:
        text = f"expected clients of the roster (version {roster.version}) alone; got {one_line(', '.join(strange))}"
        yield PolicyViolation(pb.COHORT_UNKNOWN, text)
    organisations = sorted({party.org for party in members.values()})
    # A cohort that is too small by its number alone has been vetoed for that.
    if len(organisations) < least <= size:
        got = f"{len(organisations)} ({one_line(', '.join(organisations))})"
        yield PolicyViolation(pb.COHORT_TOO_SMALL, f"policy.min_cohort: at least {least} organisations; got {got}")
