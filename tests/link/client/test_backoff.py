"""Pauses after failed calls, and when a client gives up."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from fedtune.errors import ConfigError, TemporaryError, may_pass
from fedtune.link.client.backoff import REPORT_INTERVAL_S, STABLE_S, Backoff
from fedtune.link.client.jobs import Job, StoppedError
from fedtune.link.client.route import Diagnosis
from fedtune.link.pki.identity import load_identity
from fedtune.link.rejections import rejection
from fedtune.link.settings import JoinSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import enroll_parties
from tests.link.link_server import run_link_server
from tests.link.site import END_S, run_site


class Failed(grpc.RpcError):
    """What a call raises that has ended with a status."""

    def __init__(self, status: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        self._status = status

    def code(self) -> grpc.StatusCode:
        return self._status

    def details(self) -> str:
        return "no details"


class Waits(threading.Event):
    """An event that notes how long it was waited for, and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout or 0.0)
        return self.is_set()


class Rig:
    """A backoff with a clock that is set by hand."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, permanent: bool = False, **more: Any) -> None:
        identity = load_identity(enroll_parties(folder)["site-a"], role="client", now=int(time.time()))
        monkeypatch.setattr("fedtune.link.client.backoff.os", SimpleNamespace(urandom=lambda count: b"\xff" * count))
        monkeypatch.setattr("fedtune.link.client.backoff.diagnose", lambda *_: Diagnosis("why", permanent))
        self.now, self.stop, self.events = 0.0, Waits(), list[str]()
        self.backoff = Backoff(
            identity,
            JoinSettings("localhost:1", backoff_s=1.0, backoff_cap_s=5.0, **more),
            stop=self.stop,
            record=lambda kind, **fields: self.events.append(kind),
            clock=lambda: self.now,
        )


def test_pauses_double_up_to_the_cap_and_start_anew_after_a_minute_of_good_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, monkeypatch)
    for _ in range(5):
        rig.backoff.wait_after_error(Failed())
    assert [round(seconds) for seconds in rig.stop.seconds] == [1, 2, 4, 5, 5]
    rig.now += STABLE_S - 1
    rig.backoff.note_success()
    rig.backoff.wait_after_error(Failed())
    assert round(rig.stop.seconds[-1]) == 5
    rig.now += STABLE_S + 1
    rig.backoff.note_success()
    rig.backoff.wait_after_error(Failed())
    assert round(rig.stop.seconds[-1]) == 1


def test_a_pause_is_a_random_share_of_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, monkeypatch)
    quarter = SimpleNamespace(urandom=lambda count: (2**30).to_bytes(count, "little"))
    monkeypatch.setattr("fedtune.link.client.backoff.os", quarter)
    for _ in range(2):
        rig.backoff.wait_after_error(Failed())
    assert rig.stop.seconds == [0.25, 0.5]


def test_a_lost_connection_is_reported_once_in_a_while_and_its_return_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, monkeypatch)
    for _ in range(3):
        rig.backoff.wait_after_error(Failed())
    assert rig.events == ["unreached"]
    rig.now += REPORT_INTERVAL_S
    rig.backoff.wait_after_error(Failed())
    rig.backoff.note_success()
    rig.backoff.note_success()
    assert rig.events == ["unreached", "unreached", "reached"]


def test_a_client_gives_up_where_waiting_cannot_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, monkeypatch, patience_s=10.0)
    with pytest.raises(ConfigError, match="UNIMPLEMENTED: no details"):
        rig.backoff.wait_after_error(Failed(grpc.StatusCode.UNIMPLEMENTED))
    assert rig.backoff.unreachable_s == 0
    rig.backoff.wait_after_error(Failed())
    rig.now += 11
    assert rig.backoff.unreachable_s == 11
    with pytest.raises(TemporaryError, match="11 s without a connection") as caught:
        rig.backoff.wait_after_error(Failed())
    assert may_pass(caught.value)
    with pytest.raises(ConfigError, match="why"):
        Rig(tmp_path / "b", monkeypatch, permanent=True).backoff.wait_after_error(Failed())


def test_a_final_refusal_ends_the_client_and_a_passing_one_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, monkeypatch)
    rig.backoff.wait_after_refusal(rejection(pb.BUSY, "uploads", "8", "9").refusal)
    rig.backoff.wait_after_refusal(rejection(pb.BUSY, "uploads", "8", "9").refusal)
    assert rig.stop.seconds == [1.0, 1.0]
    assert rig.events == ["refused"]  # the same one, which is repeated every second
    with pytest.raises(ConfigError, match="REVOKED"):
        rig.backoff.wait_after_refusal(rejection(pb.REVOKED, "roster", "active", "revoked").refusal)


def test_a_call_is_repeated_until_it_gives_something_or_its_job_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, monkeypatch)
    job = Job(b"task", pb.Header(), rig.stop, over=Waits())
    results: Iterator[Failed | str] = iter([Failed(), Failed(), "response"])

    def call() -> str:
        result = next(results)
        if isinstance(result, Failed):
            raise result
        return result

    assert rig.backoff.retry(job, call) == "response"
    assert rig.events == []  # only the main loop reports
    job.over.set()
    with pytest.raises(StoppedError):
        rig.backoff.retry(job, call)


def test_a_way_that_ends_on_this_side_is_waited_for_unless_a_person_must_act(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, monkeypatch)
    for _ in range(2):
        rig.backoff.wait_without_way(Diagnosis("the proxy is down", False))
    assert rig.events == ["unreached"]
    assert [round(seconds) for seconds in rig.stop.seconds] == [1, 2]
    with pytest.raises(ConfigError, match="a wrong password"):
        rig.backoff.wait_without_way(Diagnosis("a wrong password", True))


def test_an_address_without_a_server_is_reported_once_and_tried_again(tmp_path: Path) -> None:
    with run_link_server(tmp_path) as link:
        port = link.port
        gone = link
    with run_site(gone) as running:
        ends = time.monotonic() + END_S
        while "unreached" not in running.kinds():
            assert time.monotonic() < ends
            running.thread.join(0.05)
        assert f"no server listens on localhost:{port}" in dict(running.events)["unreached"]["reason"]
        assert running.thread.is_alive()
