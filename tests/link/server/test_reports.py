"""What clients say of their tasks, and when one is lost for want of progress."""

from __future__ import annotations

import pytest

from fedtune.link.envelopes import HELLO
from fedtune.link.server.assignments import Withdrawn
from fedtune.link.settings import LinkSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import Harness

LOST_S = LinkSettings().lost_s


def lost(harness: Harness, message_id: str) -> str:
    """Return why a client is lost; empty if it is not."""
    result = harness.dispatcher.collect([message_id]).get(message_id)
    assert result is None or isinstance(result, Withdrawn)
    return result.reason if result else ""


def ask(harness: Harness, order: bytes, **said: int) -> None:
    progress = [pb.Progress(order=order, phase=pb.Progress.WORKING, **said)] if said else []
    harness.dispatcher.sign_of_life("anna")
    harness.dispatcher.hear("anna", 1, progress, [])


@pytest.mark.guarantee("G14")
def test_a_client_that_asks_and_comes_no_further_is_lost(harness: Harness) -> None:
    message_id, _, order = harness.post("anna")
    for _ in range(int(LOST_S // 20)):
        harness.clock.now += 20
        ask(harness, order, done=3, total=100)
        assert not lost(harness, message_id)
    harness.clock.now += 21
    ask(harness, order, done=3, total=100)
    assert lost(harness, message_id) == "no progress for 601 s, though it asks (working step 3 of 100)"


@pytest.mark.guarantee("G14")
def test_a_client_that_waits_for_its_device_is_waited_for_no_longer_than_another(harness: Harness) -> None:
    message_id, _, order = harness.post("anna")
    for minute in range(11):
        assert not lost(harness, message_id)
        harness.clock.now += 60
        # What it computes by looking at the time is no progress.
        said = pb.Progress(order=order, phase=pb.Progress.WAITING, done=3 + minute, total=100, cpu_ms=5000 * minute)
        harness.dispatcher.sign_of_life("anna")
        harness.dispatcher.hear("anna", 1, [said], [])
    assert lost(harness, message_id) == "no progress for 660 s, though it asks (paused at step 13 of 100)"
    assert harness.dispatcher.fleet().keys() == {"anna"}  # it is asked again in the next round


@pytest.mark.guarantee("G14")
def test_a_held_call_alone_is_no_progress(harness: Harness) -> None:
    message_id, *_ = harness.post("anna")
    harness.dispatcher.hold("anna", 1)
    harness.clock.now += LOST_S + 1
    assert "it says nothing of its work" in lost(harness, message_id)


@pytest.mark.guarantee("G14")
def test_a_slow_client_is_waited_for_as_long_as_it_comes_further(harness: Harness) -> None:
    message_id, _, order = harness.post("anna")
    for step in range(1, 50):
        harness.clock.now += LOST_S - 1
        ask(harness, order, done=step, total=50)
        assert not lost(harness, message_id)


def test_a_client_whose_tasks_wait_for_the_server_is_not_lost(harness: Harness) -> None:
    message_id, *_ = harness.post("anna")
    for _ in range(5):
        harness.clock.now += LOST_S - 1
        harness.dispatcher.excuse("anna")
        assert not lost(harness, message_id)


def test_a_hello_may_take_as_long_as_its_base_is_loaded(harness: Harness) -> None:
    message_id = harness.dispatcher.post("anna", HELLO, b"", {}, seconds=60)
    for _ in range(5):
        harness.clock.now += LOST_S - 1
        harness.dispatcher.sign_of_life("anna")
        assert not lost(harness, message_id)


@pytest.mark.guarantee("G6")
def test_a_client_that_drops_its_order_is_named_once_and_lost_with_the_reason(harness: Harness) -> None:
    message_id, _, order = harness.post("anna")
    for _ in range(3):
        harness.dispatcher.sign_of_life("anna")
        dropped = [pb.Dropped(order=order, reason=pb.KEY_UNKNOWN), pb.Dropped(order=b"other", reason=pb.SIGNATURE)]
        harness.dispatcher.hear("anna", 1, [], dropped)
        harness.clock.now += LOST_S / 2
    assert [fields["code"] for kind, fields in harness.events if kind == "dropped"] == ["KEY_UNKNOWN"]
    assert lost(harness, message_id) == "it drops its tasks for 900 s (KEY_UNKNOWN)"


def test_what_is_said_of_a_task_that_is_not_open_is_forgotten(harness: Harness) -> None:
    _, _, order = harness.post("anna")
    ask(harness, order, done=1, total=2)
    assert harness.dispatcher.status()["anna"].work == "working step 1 of 2"
    harness.dispatcher.end_round(1)
    ask(harness, order, done=2, total=2)
    assert harness.dispatcher.status()["anna"].work == ""


def test_numbers_beyond_all_reason_are_cut(harness: Harness) -> None:
    _, _, order = harness.post("anna")
    ask(harness, order, done=2**64 - 1, total=2**64 - 1)
    assert harness.dispatcher.status()["anna"].work == f"working step {2**53} of {2**53}"
