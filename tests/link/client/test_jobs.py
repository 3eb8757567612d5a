"""Jobs that are given up, and the first fault of a client's threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from fedtune.errors import ConfigError, WireError
from fedtune.link.client.jobs import Job, StoppedError, ThreadGuard
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.site import END_S


def test_a_job_is_given_up_when_it_is_over_or_the_client_ends() -> None:
    for name in ("stop", "over"):
        job = Job(b"task", pb.Header(), threading.Event())
        job.check()
        getattr(job, name).set()
        with pytest.raises(StoppedError):
            job.check()
        with pytest.raises(StoppedError):
            job.wait(END_S)


def test_the_first_fault_is_kept_and_closes_the_channel() -> None:
    closed, first = list[bool](), ConfigError([])
    guard = ThreadGuard(threading.Event(), lambda: closed.append(True))

    def fail(error: Exception) -> Callable[[], None]:
        def work() -> None:
            raise error

        return work

    guard.start(fail(StoppedError("over")), name="a").join()
    assert (guard.fault, closed) == (None, [])
    guard.start(fail(first), name="b").join()
    guard.start(fail(WireError("later")), name="c").join()
    guard.start(fail(ValueError("the channel is closed")), name="d").join()
    assert guard.fault is first
    assert closed == [True, True]
