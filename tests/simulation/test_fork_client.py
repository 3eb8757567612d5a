"""A fork server that is asked from outside: what it cannot load is said, and how it ended is put into words."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import ConfigError, RoundError
from fedtune.simulation.fork_client import ForkServer, exit_reason

COMMAND = (sys.executable, str(Path(__file__).with_name("scripted.py")))


def loaded(fork_server: ForkServer, **spec: Any) -> ForkServer:
    fork_server.load(spec, {"data": b"shared"})
    return fork_server


@pytest.mark.parametrize(
    ("start", "error", "text"),
    [
        ("fault", ConfigError, "a.toml: 1 fault\n  model.base: expected a base; got none; give one"),
        (
            "die",
            RoundError,
            "expected a process that loads the base for the workers; got one that was killed by signal 9",
        ),
        ("break", RoundError, "expected a process that loads the base for the workers; got MemoryError: no room"),
        ("threads", RoundError, "expected one thread in the process that forks the workers; got 2"),
    ],
)
def test_what_cannot_be_loaded_is_told_and_waited_for_by_nobody(start: str, error: type[Exception], text: str) -> None:
    with loaded(ForkServer(COMMAND), start=start) as fork_server:
        with pytest.raises(error) as caught:
            fork_server.devices()
        assert text in str(caught.value)


def test_a_command_that_is_none_is_told() -> None:
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    with loaded(ForkServer(command)) as fork_server, pytest.raises(RoundError, match="one that ended with status 7"):
        fork_server.devices()


def test_an_end_is_put_into_words() -> None:
    assert exit_reason(1) == "ended with status 1"
    assert exit_reason(-signal.SIGSEGV) == "was killed by signal 11 (SIGSEGV)"
    assert "memory" in exit_reason(-signal.SIGKILL)
    assert exit_reason(-60) == "was killed by signal 60 (without a name)"


def test_another_system_is_told_to_use_the_engine_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="expected Linux for worker processes that share memory; got 'darwin'"):
        ForkServer(COMMAND)


def test_a_loaded_server_says_where_its_workers_compute_and_forks_them() -> None:
    with loaded(ForkServer(COMMAND), devices=["cuda:0", "cuda:1"]) as fork_server:
        assert fork_server.devices() == ("cuda:0", "cuda:1")
        workers = [fork_server.fork(place) for place in (0, 1)]
        assert len({worker.pid for worker in workers}) == 2
        assert fork_server.end(workers[0]).startswith("was killed by signal 9 (SIGKILL")
