"""What counts as progress of a client."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.link.server.progress import LEAST_CPU_MS, Progress, TaskProgress
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import Clock

WORKING, FETCHING, SENDING = pb.Progress.WORKING, pb.Progress.FETCHING, pb.Progress.SENDING


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
