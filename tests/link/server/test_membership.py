from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.link.rejections import rejection
from fedtune.link.settings import LinkSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import Harness, make_harness

REFUSAL = rejection(pb.SITE_DIFFERS, "base", "ab", "cd").refusal


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return make_harness(tmp_path, LinkSettings(lease_s=10))


def kinds(harness: Harness) -> list[str]:
    return [kind for kind, _ in harness.events]


def test_the_first_process_under_a_name_is_served_until_it_has_gone(harness: Harness) -> None:
    dispatcher = harness.dispatcher
    assert dispatcher.claim("anna", 1)
    dispatcher.hold("anna", 1)
    assert [dispatcher.claim("anna", process) for process in (2, 2, 1)] == [False, False, True]
    assert kinds(harness) == ["rival"]
    dispatcher.hold("anna", -1)
    assert dispatcher.claim("anna", 2)
    dispatcher.hold("anna", 1)
    assert not dispatcher.claim("anna", 1)


def test_a_process_of_an_earlier_release_has_no_number_and_is_served(harness: Harness) -> None:
    harness.dispatcher.hold("anna", 1)
    assert harness.dispatcher.claim("anna", 0)
    assert harness.dispatcher.claim("anna", 5)
    assert harness.dispatcher.claim("anna", 0)


def test_a_client_that_is_refused_hears_why_and_counts_no_more_until_its_next_hello(harness: Harness) -> None:
    dispatcher = harness.dispatcher
    dispatcher.greet("anna")
    assert dispatcher.fleet() == {"anna": 0}
    dispatcher.refuse("anna", REFUSAL)
    assert not dispatcher.fleet()
    offer = dispatcher.offer("anna", ())
    assert offer is not None
    assert offer.refusal == REFUSAL
    dispatcher.stop(pb.Stop.FINISHED)
    assert dispatcher.uninformed_clients() == []
    dispatcher.greet("anna")
    assert dispatcher.fleet() == {"anna": 1}


def test_the_end_is_for_all_that_are_enrolled_and_is_recorded_once(harness: Harness) -> None:
    dispatcher = harness.dispatcher
    dispatcher.set_enrolled(lambda: ["anna", "bob"])
    assert dispatcher.uninformed_clients() == []
    dispatcher.stop(pb.Stop.FINISHED)
    assert dispatcher.uninformed_clients() == ["anna", "bob"]
    for _ in range(2):
        last = dispatcher.offer("bob", ())
        assert last is not None
        assert last.stop.why == pb.Stop.FINISHED
    assert dispatcher.uninformed_clients() == ["anna"]
    assert harness.events == [("informed", {"client": "bob"})]


def test_who_knew_of_the_end_before_a_restart_is_not_waited_for(tmp_path: Path) -> None:
    dispatcher = make_harness(tmp_path, informed=["anna"]).dispatcher
    dispatcher.set_enrolled(lambda: ["anna", "bob"])
    dispatcher.stop(pb.Stop.FINISHED)
    assert dispatcher.uninformed_clients() == ["bob"]


def test_a_client_that_has_gone_is_recorded_once(harness: Harness) -> None:
    harness.dispatcher.greet("anna")
    harness.dispatcher.fleet()
    harness.clock.now += 11
    for _ in range(2):
        harness.dispatcher.collect([])
    assert harness.events == [("left", {"client": "anna"})]
