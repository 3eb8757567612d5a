"""Limits on how fast a site sends and receives: by hand, and over a line whose server gives up what does not move."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ConfigError
from fedtune.link.client.bandwidth import Bandwidth, check_limits
from fedtune.link.client.channel import lookahead_bytes
from fedtune.link.client.jobs import Job, StoppedError
from fedtune.link.server.assignments import ReceivedParts
from fedtune.link.settings import JoinSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import Clock
from tests.link.link_server import SETTINGS, LinkServer, run_link_server
from tests.link.proxy import Fate, proxy
from tests.link.site import collect_one, post, run_site, until

KIB = 1024


def test_what_travels_beyond_a_second_of_the_limit_waits() -> None:
    clock = Clock()
    line = Bandwidth(10, clock=clock)
    assert line.take(10 * KIB) == 0
    assert line.take(5 * KIB) == 0.5
    assert line.take(5 * KIB) == 1.0  # a second thread waits behind the first
    clock.now += 1.0
    assert line.take(0) == 0
    clock.now += 1000.0
    assert line.take(10 * KIB) == 0  # what was not used before does not add up
    assert line.take(1) > 0


def test_without_a_limit_nothing_waits() -> None:
    line = Bandwidth(None)
    assert line.take(10**12) == 0
    assert line.piece(256 * KIB) == 256 * KIB
    assert not line.is_limited


@given(
    st.floats(0.01, 1e5),
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 100)), min_size=1, max_size=50),
)
def test_no_order_of_bytes_and_pauses_is_faster_than_the_limit(rate: float, steps: list[tuple[int, float]]) -> None:
    clock = Clock()
    line, began, total = Bandwidth(rate, clock=clock), clock.now, 0
    for num_bytes, idle_s in steps:
        clock.now += line.take(num_bytes)
        total += num_bytes
        assert total <= rate * KIB * (clock.now - began + 1.0) * (1 + 1e-6) + 1
        clock.now += idle_s


@pytest.mark.parametrize(("kib_s", "piece"), [(None, 262_144), (5.7, 5836), (1, 4096), (1000, 262_144)])
def test_a_message_of_an_upload_takes_a_second_at_most(kib_s: float | None, piece: int) -> None:
    assert Bandwidth(kib_s).piece(256 * KIB) == piece


def test_a_limit_below_what_the_server_waits_for_is_refused_with_the_least() -> None:
    limits = pb.Limits(part_bytes=256 * KIB, stall_ms=60_000)
    settings = JoinSettings("localhost:1", max_up_kib_s=2, max_down_kib_s=3)
    with pytest.raises(
        ConfigError, match=r"link\.max_up_kib_s: expected at least 5\.7, .* 256 KiB in 60 s; got 2"
    ) as caught:
        check_limits(settings, limits)
    assert len(caught.value.faults) == 2
    check_limits(replace(settings, max_up_kib_s=5.7, max_down_kib_s=None), limits)


def test_transfers_take_turns_and_one_that_ends_waits_no_longer() -> None:
    line, order = Bandwidth(10), pb.Header()
    first, second = (Job(name, order, threading.Event()) for name in (b"a", b"b"))
    with line.turn(first):
        second.over.set()
        with pytest.raises(StoppedError), line.turn(second):
            raise AssertionError("two at once")
    with line.turn(first), Bandwidth(None).turn(first), Bandwidth(None).turn(first):
        pass


def test_little_more_than_a_second_of_a_limited_download_is_received_before_it_is_read() -> None:
    assert [lookahead_bytes(kib_s) // KIB for kib_s in (None, 1, 500, 10**6)] == [4096, 64, 500, 4096]


def test_an_upload_and_a_download_are_as_slow_as_their_limits(link: LinkServer) -> None:
    """400 KiB/s, a second of it at once: 100 KiB more take a quarter of a second each way."""
    rate = 400 * KIB
    with run_site(link, bandwidth={"max_up_kib_s": 400, "max_down_kib_s": 400}) as running:
        until(link, lambda: "loaded" in running.kinds())
        running.trainer.size, began = 500 * KIB, time.monotonic()
        message_id = post(link, body=b"x" * 500 * KIB)
        until(link, lambda: "pushed" in running.kinds())
        assert time.monotonic() - began >= 2 * 100 * KIB / rate * 0.98
        assert isinstance(collect_one(link, message_id), ReceivedParts)


def test_what_a_limited_site_has_not_read_yet_is_not_on_its_line_either(link: LinkServer) -> None:
    """Read slowly alone, all of it would be received at once, into the memory of gRPC and of the system."""
    with proxy(lambda number: Fate()) as between:
        between.target, link.port = link.port, between.port
        with run_site(link, bandwidth={"max_down_kib_s": 100}) as running:
            until(link, lambda: "loaded" in running.kinds())
            before, began = between.carried[1], time.monotonic()
            post(link, body=b"x" * 3 * 2**20)
            until(link, lambda: time.monotonic() - began > 0.4)
            received, elapsed_s = between.carried[1] - before, time.monotonic() - began
            assert 100 * KIB < received < (100 * (elapsed_s + 1) + 2 * 100 + 64) * KIB


@pytest.mark.slow
def test_at_the_least_legal_limit_no_transfer_is_given_up_and_signs_of_life_go_on(tmp_path: Path) -> None:
    """The server waits a second for 16 KiB: 22 KiB/s are enough, for the whole of an upload and of a download."""
    with run_link_server(tmp_path, replace(SETTINGS, stall_s=1.0)) as link:
        with run_site(link, bandwidth={"max_up_kib_s": 22, "max_down_kib_s": 22}) as running:
            until(link, lambda: "loaded" in running.kinds())
            running.trainer.size, began = 100 * KIB, time.monotonic()
            seen = list[float]()
            message_id = post(link, body=b"y" * 100 * KIB)
            while "pushed" not in running.kinds() and time.monotonic() - began < 60:
                link.dispatcher.wait(0.02)
                seen.append(link.dispatcher.status()["site-a"].seen_s)
            assert isinstance(collect_one(link, message_id), ReceivedParts)
            assert time.monotonic() - began >= 2 * 78 / 22 * 0.9
            assert not {"cut", "put off", "spoilt"} & set(running.kinds())
            assert max(seen) < 1.5
        with run_site(link, bandwidth={"max_up_kib_s": 21}, name="site-b") as running:
            until(link, lambda: running.ended)
            assert "link.max_up_kib_s: expected at least 21.3" in str(running.ended[0])
