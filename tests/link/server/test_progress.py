"""What counts as progress of a client, and when it is lost for want of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.link.envelopes import HELLO
from fedtune.link.server.assignments import Withdrawn
from fedtune.link.server.progress import LEAST_CPU_MS, Progress, TaskProgress
from fedtune.link.settings import LinkSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import Clock, Harness

WORKING, FETCHING, SENDING = pb.Progress.WORKING, pb.Progress.FETCHING, pb.Progress.SENDING
LOST_S = LinkSettings().lost_s


def idle_after(*said: tuple[int, int, int], phase: pb.Progress.Phase = WORKING) -> float:
    """Return how long a client is idle that says (done, total, cpu_ms) one second apart, of one task."""
    clock = Clock(0.0)
    progress = Progress(clock)
    for done, total, cpu_ms in said:
        clock.now += 1
        progress.hear("anna", 1, b"task", TaskProgress(phase, done, total, cpu_ms))
    return progress.idle_s("anna", since=0.0)


@pytest.mark.guarantee("G14")
@pytest.mark.parametrize(
    ("said", "idle_s"),
    [
        ([(0, 10, 0)], 1),  # to begin is no progress
        ([(1, 10, 0), (2, 10, 0)], 0),
        ([(2, 10, 0), (2, 10, 0), (2, 10, 0)], 2),  # said again
        ([(5, 10, 0), (3, 10, 0), (4, 10, 0), (5, 10, 0)], 3),  # up again to where it was
        ([(10, 10, 0), (11, 10, 0), (12, 12, 0)], 2),  # beyond the first total
        ([(1, 0, 0), (2, 0, 0)], 0),  # a total that is not known
        ([(0, 10, 500), (0, 10, 500 + LEAST_CPU_MS)], 0),  # a base is loaded
        ([(0, 10, 500), (0, 10, 499 + LEAST_CPU_MS)], 2),
        ([(0, 10, 0), (0, 10, 999), (0, 10, 1998)], 0),  # in two calls together
    ],
)
def test_only_numbers_that_rise_are_progress(said: list[tuple[int, int, int]], idle_s: float) -> None:
    assert idle_after(*said) == idle_s


@pytest.mark.guarantee("G14")
@pytest.mark.parametrize("phase", [FETCHING, SENDING, pb.Progress.PHASE_UNSET])
def test_bytes_that_travel_are_counted_by_the_server_and_not_by_what_is_said(phase: pb.Progress.Phase) -> None:
    assert idle_after((1, 9, 0), (2, 9, 5000), phase=phase) == 2


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=30))
def test_a_task_has_at_most_as_much_progress_as_steps(said: list[tuple[int, int]]) -> None:
    clock = Clock(0.0)
    progress, rises = Progress(clock), 0
    for done, total in said:
        clock.now += 1
        progress.hear("anna", 1, b"task", TaskProgress(WORKING, done, total, 0))
        rises += progress.idle_s("anna", since=0.0) == 0
    assert rises <= (said[0][1] if said else 0)


def test_the_same_bytes_again_are_no_progress() -> None:
    clock = Clock(0.0)
    progress = Progress(clock)
    for num_bytes, idle_s in ((10, 0), (10, 1), (5, 2), (11, 0)):
        clock.now += 1
        progress.note_bytes("anna", b"part", num_bytes)
        assert progress.idle_s("anna", since=0.0) == idle_s


def test_a_new_process_begins_its_task_anew_and_that_alone_is_no_progress() -> None:
    clock = Clock(0.0)
    progress = Progress(clock)
    progress.hear("anna", 1, b"task", TaskProgress(WORKING, 9, 10, 0))
    for process, done, idle_s in ((2, 0, 1), (2, 1, 0), (3, 0, 1)):
        clock.now += 1
        progress.hear("anna", process, b"task", TaskProgress(WORKING, done, 10, 0))
        assert progress.idle_s("anna", since=0.0) == idle_s


def lost(harness: Harness, message_id: str) -> str:
    """Return why a client is lost; empty if it is not."""
    result = harness.dispatcher.collect([message_id]).get(message_id)
    assert result is None or isinstance(result, Withdrawn)
    return result.reason if result else ""


def ask(harness: Harness, order: bytes, **said: int) -> None:
    progress = [pb.Progress(order=order, phase=WORKING, **said)] if said else []  # type: ignore[arg-type]
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
