"""Cohorts whose names a coordinator invents, repeats or takes from the past, against a site's own roster."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fedtune.link.client.cohort import cohort_violations
from fedtune.link.pki.roster import Party, Roster
from fedtune.link.rejections import veto_name
from fedtune.link.server.dispatcher import MAX_NAMES, named_members
from fedtune.wire.v1 import link_pb2 as pb


def party(name: str, org: str = "", role: str = "client", state: str = "active", until: int = 2000) -> Party:
    return Party(name, org or f"org-{name}", role, name.encode(), (), 0, until, state)  # type: ignore[arg-type]


PARTIES = [
    *(party(name) for name in "abc"),
    party("a2", org="org-a"),
    party("coordinator", role="coordinator"),
    party("gone", state="revoked"),
    party("old", until=900),
]
ROSTER = Roster("care", 7, 5000, {one.name: one for one in PARTIES})


def vetoes(names: Sequence[str], *, least: int = 3, size: int | None = None, own: str = "a") -> list[str]:
    header = pb.Header(members=names, cohort=len(names) if size is None else size)
    found = cohort_violations(header, ROSTER, own, least=least, now=1000)
    return [f"{veto_name(one.veto)} {one.note}" for one in found]


@pytest.mark.guarantee("G6")
def test_three_organisations_of_the_roster_are_three() -> None:
    assert vetoes(["a", "b", "c"]) == []
    assert vetoes(["a", "a2", "b", "c"]) == []


@pytest.mark.guarantee("G6")
@pytest.mark.parametrize("invented", ["x", "coordinator", "gone", "old", "A"])
def test_a_name_that_is_no_member_is_vetoed_by_name(invented: str) -> None:
    (found,) = vetoes(sorted(["a", "b", "c", invented]))
    assert found == f"COHORT_UNKNOWN expected clients of the roster (version 7) alone; got {invented}"


def test_two_sites_of_one_organisation_are_one() -> None:
    expected = "COHORT_TOO_SMALL policy.min_cohort: at least 3 organisations; got 2 (org-a, org-b)"
    assert vetoes(["a", "a2", "b"]) == [expected]


@pytest.mark.parametrize(
    ("names", "size"),
    [(["a", "a", "b"], 3), (["b", "a", "c"], 3), (["b", "c"], 2), (["a", "b", "c"], 2), (["a\n", "b"], 2)],
)
def test_a_list_that_no_server_makes_is_vetoed(names: list[str], size: int) -> None:
    assert vetoes(names, size=size)[0].startswith("COHORT_UNKNOWN expected a cohort of a and others")


def test_a_server_that_names_no_one_is_believed_only_where_the_policy_asks_for_no_others() -> None:
    assert vetoes([], least=1, size=3) == []
    assert vetoes([], size=3) == [
        "COHORT_UNKNOWN policy.min_cohort: at least 3 organisations, by name; got an order without names; "
        "ask the coordinator to install 0.3 or later"
    ]


def test_the_names_of_a_large_cohort_fit_a_header() -> None:
    cohort = [f"{place:0100}" for place in range(1000)]
    names = named_members(cohort, cohort[-1])
    assert len(names) == MAX_NAMES == len(set(names))
    assert list(names) == sorted(names)
    assert names[-1] == cohort[-1]
    assert pb.Header(members=names).ByteSize() < 48 * 1024
    assert named_members(["b", "a"], "a") == ["a", "b"]
