"""Which clients are here: signs of life, held calls, and the bytes of a day."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.link.rejections import RejectionError
from fedtune.link.server.presence import Presence
from fedtune.link.server.traffic import DAY_S
from fedtune.link.settings import LinkSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import Clock, Harness, make_harness, reason

DATA = b"update of anna"


def presence(clock: Clock, **more: float) -> tuple[Presence, list[str]]:
    arrivals = list[str]()
    return Presence(LinkSettings(**more), clock, lambda: arrivals.append("arrival")), arrivals  # type: ignore[arg-type]


def test_a_client_arrives_when_it_is_new_and_after_its_lease() -> None:
    clock = Clock()
    here, arrivals = presence(clock, lease_s=10)
    for seconds, total in ((0, 1), (9, 1), (9, 1), (10, 2)):
        clock.now += seconds
        here.sign_of_life("anna")
        assert len(arrivals) == total
    clock.now += 100
    here.count_bytes("anna", 5)  # a sign of life, and no arrival: the client never went away
    assert (len(arrivals), here.clients()) == (2, ["anna"])


def test_a_client_is_lost_only_without_a_held_call() -> None:
    clock = Clock()
    here, _ = presence(clock, lost_s=30)
    assert not here.is_lost("anna", since=clock.now - 30)
    assert here.is_lost("anna", since=clock.now - 31)
    here.hold("anna", 1)
    clock.now += 1000
    assert not here.is_lost("anna", since=0.0)
    here.hold("anna", -1)
    clock.now += 31
    assert here.is_lost("anna", since=0.0)


def test_bytes_count_for_a_day() -> None:
    clock = Clock()
    here, _ = presence(clock)
    here.count_bytes("anna", 5)
    clock.now += DAY_S - 1
    here.count_bytes("anna", 7)
    assert here.day_bytes("anna") == 12
    clock.now += 1
    assert here.day_bytes("anna") == 7
    assert here.day_bytes("bob") == 0


def test_only_bytes_that_are_fetched_once_more_count_towards_the_day(tmp_path: Path) -> None:
    """Two downloads at a time, again and again, took what the server's line had."""
    harness = make_harness(tmp_path, LinkSettings(day_gib=1000 / 2**30))
    _, task, _ = harness.post("anna")
    part, dispatcher = task.parts[0].digest, harness.dispatcher
    dispatcher.note_fetched("anna", part, 0, 800)
    dispatcher.note_fetched("anna", part, 400, 1400)  # after a cut: 400 of them again
    assert dispatcher.body("anna", part)
    dispatcher.note_fetched("anna", part, 0, 600)
    assert dispatcher.body("anna", part)
    dispatcher.note_fetched("anna", part, 0, 1)
    with pytest.raises(RejectionError, match="at most 1000 bytes a day that were fetched before") as caught:
        dispatcher.body("anna", part)
    assert (reason(caught), caught.value.refusal.passing) == ("QUOTA", True)
    harness.clock.now += DAY_S
    assert dispatcher.body("anna", part)


def test_a_held_call_is_a_sign_of_life(tmp_path: Path) -> None:
    harness = make_harness(tmp_path, LinkSettings(lease_s=10))
    harness.dispatcher.hold("anna", 1)
    harness.clock.now += 1000
    assert list(harness.dispatcher.fleet()) == ["anna"]
    harness.dispatcher.hold("anna", -1)
    harness.clock.now += 11
    assert not harness.dispatcher.fleet()
    assert not harness.dispatcher.status()["anna"].connected


def test_listeners_hear_of_their_own_client_alone_until_they_leave(harness: Harness) -> None:
    heard = list[str]()
    leave = harness.dispatcher.listen("anna", lambda: heard.append("anna"))
    harness.post("bob")
    assert heard == []
    harness.post("anna")
    assert heard
    heard.clear()
    leave()
    harness.dispatcher.stop(pb.Stop.FINISHED)
    assert heard == []
