from __future__ import annotations

import errno
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.link.client import pause
from fedtune.link.client.site_status import STATUS, SiteStatus, StatusFile, load_status, next_status, read_standing
from fedtune.link.client.socket_bytes import SocketBytes, SocketMeter
from fedtune.link.settings import JoinSettings, Policy
from fedtune.store.lock import lock_run
from tests.link.harness import Clock

LINK = JoinSettings("localhost:9000")
DAY_S = 86_400.0
ROUND: list[tuple[str, Mapping[str, int | str]]] = [
    ("hello", {"server": "localhost:9000", "run": "0123456789abcdef", "recipe": "ab", "going_on": 0}),
    ("asked", {"round": 3, "order": "00", "bytes": 100}),
    ("trained", {"round": 3, "work": "own loss 3.0 to 2.5, 1.2 s", "up": 60, "down": 900, "verdict": "used"}),
    ("scored", {"round": 3, "scores": "loss 2.400 on 4 held-out rows"}),
]


class Meter(SocketMeter):
    def __init__(self) -> None:
        self.total: SocketBytes | None = SocketBytes()

    def read(self) -> SocketBytes | None:
        return self.total


def test_what_a_site_does_is_in_its_folder_within_a_second(tmp_path: Path) -> None:
    meter, now = Meter(), Clock(1_800_000_000.0)
    status = StatusFile(tmp_path, meter, now=now)
    for kind, fields in ROUND:
        status.record(kind, **fields)
    meter.total = SocketBytes(1900, 5200)
    status.look()
    with lock_run(tmp_path):
        facts = read_standing(tmp_path, LINK, Policy(), now=now).facts
    assert facts["running"]
    assert not facts["paused"]
    assert (facts["connection"], facts["server"], facts["run"]) == ("connected", "localhost:9000", "0123456789abcdef")
    assert (facts["round"], facts["trained"], facts["work"]) == (3, 3, "own loss 3.0 to 2.5, 1.2 s")
    assert facts["scored"] == "round 3: loss 2.400 on 4 held-out rows"
    assert (facts["up_bytes"], facts["down_bytes"]) == (1900, 5200)
    assert facts["next_check"] == "at once, when the server has work"
    assert (tmp_path / STATUS).stat().st_mode & 0o077 == 0
    json.dumps(facts)


def test_bytes_are_those_of_the_day_over_several_processes(tmp_path: Path) -> None:
    now = Clock(1_800_000_000.0)
    for _ in range(2):
        meter = Meter()
        status = StatusFile(tmp_path, meter, now=now)
        meter.total = SocketBytes(100, 10)
        status.look()
    assert (load_status(tmp_path).up_bytes, load_status(tmp_path).down_bytes) == (200, 20)
    now.now += DAY_S
    assert read_standing(tmp_path, LINK, Policy(), now=now).status.up_bytes == 0
    status.record("asked", round=1)
    status.look()
    assert load_status(tmp_path).up_bytes == 0
    meter.total = None  # a system that does not count
    status.record("asked", round=2)
    status.look()
    assert load_status(tmp_path).up_bytes == 0


def test_the_disk_is_written_for_news_and_for_bytes_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, written = Clock(), list[Path]()
    monkeypatch.setattr("fedtune.store.files.write_bytes", lambda path, data, mode: written.append(path))
    status = StatusFile(tmp_path, Meter(), clock=clock)
    for _ in range(10):
        status.look()
        clock.now += 1
    status.record("receipt", round=1)  # says nothing that the file holds
    status.look()
    assert len(written) == 1
    status.record("waits", reason="not on mains power")
    status.look()
    assert len(written) == 2
    clock.now += 301
    status.look()
    assert len(written) == 3


def test_on_a_full_disk_the_site_goes_on_and_the_file_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = StatusFile(tmp_path, Meter())
    status.record("asked", round=1)
    status.look()

    def full(descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("fedtune.store.files.write", full)
        status.record("asked", round=2)
        status.look()
        assert load_status(tmp_path).round == 1
    status.record("asked", round=3)
    status.look()
    assert load_status(tmp_path).round == 3


def test_a_pause_and_its_end_are_shown_whether_or_not_the_site_runs(tmp_path: Path) -> None:
    pause.pause(tmp_path, None)
    standing = read_standing(tmp_path, LINK, Policy())
    assert (standing.process, standing.paused_s, standing.next_check) == (None, math.inf, "when it is started")
    with lock_run(tmp_path):
        assert read_standing(tmp_path, LINK, Policy()).next_check == "after resume"
        pause.pause(tmp_path, 7200.0)
        standing = read_standing(tmp_path, LINK, Policy())
        assert (standing.next_check, standing.status.waits) == ("in 120 min", "paused by its owner")
        pause.resume(tmp_path)
        assert read_standing(tmp_path, LINK, Policy(hours="20:00-06:00")).next_check == (
            "at once, when the server has work; work begins within 20:00-06:00 alone"
        )


def test_what_a_dead_process_wrote_last_is_not_shown_as_the_present(tmp_path: Path) -> None:
    status = StatusFile(tmp_path, Meter())
    status.record("hello", server="localhost:9000", run="0123456789abcdef")
    status.record("waits", reason="not on mains power")
    status.look()
    shown = read_standing(tmp_path, LINK, Policy()).status
    assert (shown.connection, shown.waits, shown.run) == ("no connection", "", "0123456789abcdef")


def test_errors_last_until_a_round_goes_well() -> None:
    status = next_status(SiteStatus(), "unreached", {"server": "x", "reason": "no server listens"})
    assert (status.connection, status.error) == ("no connection", "no server listens")
    status = next_status(status, "declined", {"round": 2, "veto": "RANK_TOO_LARGE", "reason": "8"})
    assert status.error == "round 2: declined, RANK_TOO_LARGE: 8"
    assert next_status(status, *ROUND[2]).error == ""
    # Not ready is no error: `waits` says it.
    assert next_status(SiteStatus(), "declined", {"round": 2, "veto": "DEVICE_NOT_READY", "reason": "x"}).error == ""


@given(st.binary(max_size=200) | st.dictionaries(st.text(max_size=8), st.integers() | st.text() | st.none()))
def test_no_file_is_an_error(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    folder = tmp_path_factory.mktemp("state")
    (folder / STATUS).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    read_standing(folder, LINK, Policy())


@pytest.mark.parametrize(
    "change",
    [{"round": "3"}, {"up_bytes": "many"}, {"server": 5}, {"connection": "x"}, {"written_at": []}, {"later": {"a": 1}}],
)
def test_fields_that_hold_something_else_are_left_out(tmp_path: Path, change: Mapping[str, Any]) -> None:
    (tmp_path / STATUS).write_text(json.dumps({"work": "own loss", **change}))
    assert load_status(tmp_path) == SiteStatus(work="own loss")


def test_a_file_that_is_too_long_is_none(tmp_path: Path) -> None:
    (tmp_path / STATUS).write_text(json.dumps({"work": "x" * 10**6}))
    assert load_status(tmp_path) == SiteStatus()
