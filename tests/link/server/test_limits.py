"""Limits by hand: a clock that is set, calls that are numbers, and who must make room for whom."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from fedtune.link.rejections import RejectionError, rejection
from fedtune.link.server.limits import (
    END_S,
    HELLOS_PER_MIN,
    MAX_NAMES,
    MOST,
    REFUSALS_PER_MIN,
    TURN_S,
    CallQuota,
    Kind,
    OpenCall,
    OpenCalls,
)
from fedtune.link.settings import LinkSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import Clock, reason

SETTINGS = LinkSettings(stall_s=60, part_kib=1, max_concurrent_uploads=2, max_concurrent_downloads=3)


@dataclass
class Doors:
    """Open calls, with the names of those that were interrupted and abandoned."""

    settings: LinkSettings = SETTINGS
    clock: Clock = field(default_factory=Clock)
    interrupted: list[str] = field(default_factory=list)
    abandoned: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.open = OpenCalls(self.settings, self.clock)

    def begin(self, client: str, kind: Kind = "upload") -> OpenCall:
        return self.open.begin(
            client,
            kind,
            interrupt=lambda: self.interrupted.append(client),
            abandon=lambda: self.abandoned.append(client),
        )

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.open.look()


@pytest.mark.guarantee("G14")
def test_a_client_has_one_upload_and_two_downloads_at_once() -> None:
    doors = Doors()
    first = doors.begin("anna")
    with pytest.raises(RejectionError, match="at most 1 of one client") as caught:
        doors.begin("anna")
    assert reason(caught) == "BUSY"
    doors.begin("anna", "download")
    doors.begin("anna", "download")
    with pytest.raises(RejectionError, match="at most 2 of one client"):
        doors.begin("anna", "download")
    assert doors.open.transfers == 3
    doors.open.finish(first)
    doors.begin("anna")
    doors.begin("bert")


@pytest.mark.guarantee("G14")
def test_of_five_held_calls_the_oldest_makes_room() -> None:
    """A connection that broke off unnoticed still has its call: the client must get in over the next one."""
    doors, calls = Doors(), list[OpenCall]()
    for _ in range(MOST["held"] + 2):
        calls.append(doors.begin("anna", "held"))
        doors.clock.now += 1
    assert [call.displaced for call in calls] == [True, True, False, False, False, False]
    assert doors.interrupted == ["anna", "anna"]
    assert not any(call.error for call in calls)
    assert not doors.open.transfers


@pytest.mark.guarantee("G14")
@pytest.mark.parametrize(("gained", "ends"), [(0, True), (1, True), (1023, True), (1024, False)])
def test_a_transfer_must_gain_a_parts_worth_of_bytes_within_stall_s(gained: int, ends: bool) -> None:
    doors = Doors()
    call = doors.begin("anna")
    call.left_bytes = 10_000
    doors.pass_time(30)
    call.move(gained)
    doors.pass_time(29.9)
    assert not call.ending
    doors.pass_time(0.1)
    assert call.ending == ends
    if call.error is not None:
        assert call.error.refusal.reason == pb.STALLED
        assert call.error.refusal.passing
    assert doors.interrupted == ["anna"] * ends


def test_a_transfer_whose_last_bytes_are_few_is_no_stalled_one() -> None:
    doors = Doors()
    call = doors.begin("anna")
    call.left_bytes = 10
    call.move(10)
    doors.pass_time(60)
    assert not call.ending


def test_every_minute_counts_anew() -> None:
    doors = Doors()
    call = doors.begin("anna")
    call.left_bytes = 10**9
    call.move(10**6)
    doors.pass_time(60)
    assert not call.ending
    doors.pass_time(60)  # a million bytes of the minute before do not excuse this one
    assert call.ending


@pytest.mark.guarantee("G14")
def test_the_slowest_transfer_makes_room_after_its_turn() -> None:
    doors = Doors()
    slow, fast = doors.begin("slow"), doors.begin("fast")
    slow.move(10)
    fast.move(100_000)
    with pytest.raises(RejectionError, match="at most 2 at once"):
        doors.begin("honest")
    doors.clock.now += TURN_S
    honest = doors.begin("honest")
    assert slow.error is not None
    assert slow.error.refusal.reason == pb.BUSY
    assert not fast.ending
    assert not honest.ending
    with pytest.raises(RejectionError):
        doors.begin("slow again")  # the others: one moves, one has only begun


def test_a_client_with_a_place_pushes_no_other_out() -> None:
    doors = Doors(replace(SETTINGS, max_concurrent_downloads=2))
    other = doors.begin("bert", "download")
    doors.begin("anna", "download")
    doors.clock.now += TURN_S
    with pytest.raises(RejectionError, match="at most 2 at once"):
        doors.begin("anna", "download")
    assert not other.ending


@pytest.mark.guarantee("G14")
def test_eight_tries_of_one_client_leave_the_places_of_others() -> None:
    doors = Doors(LinkSettings())
    doors.begin("bad")
    for _ in range(8):
        with pytest.raises(RejectionError):
            doors.begin("bad")
    for place in range(7):
        doors.begin(f"honest-{place}")


def test_a_call_whose_client_is_no_longer_admitted_ends_at_the_next_look() -> None:
    doors = Doors()
    call, other = doors.begin("anna", "held"), doors.begin("bert", "held")

    def refuse() -> None:
        raise rejection(pb.REVOKED, "roster", "an active party", "anna, revoked")

    call.check = refuse
    doors.pass_time(0.1)
    assert call.error is not None
    assert call.error.refusal.reason == pb.REVOKED
    assert not other.ending


def test_a_call_that_does_not_end_by_itself_is_abandoned() -> None:
    doors = Doors()
    doors.begin("anna", "download")
    doors.pass_time(60)
    assert (doors.interrupted, doors.abandoned) == (["anna"], [])
    doors.pass_time(0.1)
    assert not doors.abandoned
    doors.pass_time(END_S)
    assert doors.abandoned == ["anna"]
    assert doors.interrupted == ["anna"]


@pytest.mark.guarantee("G14")
def test_calls_hellos_and_refusals_have_a_quota_each() -> None:
    clock = Clock()
    quota = CallQuota(1000, clock)
    for _ in range(1000):
        quota.count("anna")
        quota.check("anna")
    quota.count("anna")
    with pytest.raises(RejectionError, match="calls: expected at most 1000 a minute") as caught:
        quota.check("anna")
    assert reason(caught) == "TOO_MANY_CALLS"
    quota.check("bert")
    for _ in range(HELLOS_PER_MIN + 1):
        quota.count("bert", "hellos")
    quota.check("bert")
    with pytest.raises(RejectionError, match="hellos"):
        quota.check("bert", hello=True)
    for _ in range(REFUSALS_PER_MIN):
        quota.check("carl")
        quota.count("carl", "refusals")
    with pytest.raises(RejectionError, match="refusals"):
        quota.check("carl")
    clock.now += 60
    for client in ("anna", "bert", "carl"):
        quota.check(client, hello=True)


def test_names_beyond_any_roster_share_one_count() -> None:
    quota = CallQuota(10, Clock())
    for place in range(MAX_NAMES + 11):
        quota.count(f"name-{place}")
    quota.check("name-0")
    with pytest.raises(RejectionError):
        quota.check("another")
