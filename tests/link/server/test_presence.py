"""Which clients are here: signs of life, held calls, and the bytes of a day."""

from __future__ import annotations

from pathlib import Path

from fedtune.link.server.presence import DAY_S, Presence
from fedtune.link.settings import LinkSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import Clock, Harness, make_harness

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
