"""Flower's simulation engine on Ray; every start of it takes 7 s on two idle cores, so those tests are slow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from fedtune.errors import ClientError, ConfigError, ExtraError, RoundError
from fedtune.flower.client_app import Scalar, client_app
from fedtune.flower.engine import Share, ray_transport
from fedtune.messages import Assignment, ClientScores, ClientUpdate, Failure, ScoreRequest
from fedtune.rounds.transport import Reply, Rule
from fedtune.wire.profile import ClientProfile
from tests.flower.conftest import FOUNDATION, echo, orders

ray = pytest.importorskip("ray", reason="needs the extra ray")

# Ray forgets the processes that it started, once it has ended them.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ONE = Share(threads=1)


class Scripted:
    """A client without a model that does as its name says."""

    def __init__(self, name: str) -> None:
        self.name = name

    def profile(self) -> ClientProfile:
        return ClientProfile(self.name, 10, FOUNDATION)

    def perform(self, assignment: Assignment) -> ClientUpdate:
        match self.name:
            case "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            case "fails":
                raise ClientError("fails: loss is nan")
            case "bug":
                raise KeyError("who")
            case "sleeps":
                time.sleep(3600)
        return echo(assignment)

    def with_labels(self, labels: Sequence[str]) -> Scripted:
        return self

    def score(self, request: ScoreRequest) -> ClientScores:
        raise ClientError("expected rows that are held out; got none")


def scripted(names: tuple[str, ...], node_config: Mapping[str, Scalar], run_config: Mapping[str, Scalar]) -> Scripted:
    return Scripted(names[int(node_config["partition-id"])])


def processes() -> set[str]:
    """Return what runs below this process."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False
    )
    return {line for line in listed.stdout.splitlines() if " ps" not in line}


def test_a_missing_ray_is_an_error_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ExtraError, match=r"fedtune\[ray\]"),
        ray_transport(client_app(partial(scripted, ("ann",))), clients=1, workers=1, share=ONE),
    ):
        pass


def test_a_temporary_folder_too_deep_for_sockets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 60)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with (
        pytest.raises(ConfigError, match="at most 40 characters"),
        ray_transport(client_app(partial(scripted, ("ann",))), clients=1, workers=1, share=ONE),
    ):
        pass


@pytest.mark.slow
def test_failures_are_values_and_nothing_is_left(capfd: pytest.CaptureFixture[str]) -> None:
    before = processes()
    names = ("ann", "bug", "fails")
    with ray_transport(client_app(partial(scripted, names)), clients=3, workers=1, share=ONE) as engine:
        assert [one.name for one in engine.clients()] == list(names)
        answers = {a.client: a for a in engine.exchange(orders(*names), Rule(quorum=1, deadline_s=0.001, grace_s=0))}
    assert isinstance(answers["ann"], Reply)
    assert answers["fails"] == Failure.from_text("fails", "fails: loss is nan")
    assert isinstance(answers["bug"], Failure)
    assert "KeyError" in answers["bug"].reason
    assert not ray.is_initialized()
    assert processes() == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_dead_worker_ends_the_run_with_advice(capfd: pytest.CaptureFixture[str]) -> None:
    before, names = processes(), ("ann", "dies")
    with (  # noqa: PT012
        pytest.raises(RoundError, match=r'dies: expected a living worker.*engine = "processes"'),
        ray_transport(client_app(partial(scripted, names)), clients=2, workers=1, share=ONE) as engine,
    ):
        engine.clients()
        list(engine.exchange(orders(*names), Rule(quorum=1)))
    assert processes() == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_an_interruption_does_not_wait_for_what_clients_still_do(capfd: pytest.CaptureFixture[str]) -> None:
    before = processes()
    names = ("sleeps",)
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        ray_transport(client_app(partial(scripted, names)), clients=1, workers=1, share=ONE) as engine,
    ):
        engine.clients()
        answers = engine.over.exchange(orders(*names), Rule(quorum=1, deadline_s=2.0, grace_s=0))
        assert [answer.kind for answer in answers if isinstance(answer, Failure)] == ["late"]
        raise KeyboardInterrupt
    assert processes() == before
    assert capfd.readouterr() == ("", "")
