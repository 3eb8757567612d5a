from __future__ import annotations

import errno
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ConfigError, StoreError
from fedtune.link.client.pause import (
    Clocks,
    Pause,
    parse_duration,
    parse_pause,
    pause,
    read_pause,
    resume,
    seconds_until,
)

NOON = Clocks(wall_s=1_800_000_000.0, boot_s=5_000.0, boot_id="first")
HOUR_S = 3600.0
YEAR_S = 365 * 86_400.0


def test_a_pause_lasts_until_it_is_ended(tmp_path: Path) -> None:
    assert read_pause(tmp_path) is None
    assert not resume(tmp_path)
    pause(tmp_path, None)
    assert read_pause(tmp_path) == math.inf
    # Root may order it for a service that runs as another user; the folder is private.
    assert (tmp_path / "pause").stat().st_mode & 0o777 == 0o644
    assert tmp_path.stat().st_mode & 0o077 == 0
    assert resume(tmp_path)
    assert read_pause(tmp_path) is None


def test_a_pause_of_two_hours_ends_after_two_hours(tmp_path: Path) -> None:
    pause(tmp_path, 2 * HOUR_S, now=NOON)
    assert read_pause(tmp_path, clocks=lambda: replace(NOON, boot_s=NOON.boot_s + HOUR_S)) == HOUR_S
    assert read_pause(tmp_path, clocks=lambda: replace(NOON, boot_s=NOON.boot_s + 2 * HOUR_S)) is None


@pytest.mark.parametrize("wall_s", [0.0, 3.8e9, NOON.wall_s - 60, NOON.wall_s + 3 * HOUR_S])
def test_a_clock_that_is_set_ends_no_pause_and_makes_none_longer(tmp_path: Path, wall_s: float) -> None:
    """1970, 2090 and back: within one start of the machine only the time that has passed counts."""
    pause(tmp_path, 2 * HOUR_S, now=NOON)
    later = Clocks(wall_s, NOON.boot_s + HOUR_S, "first")
    assert read_pause(tmp_path, clocks=lambda: later) == HOUR_S


def test_after_a_restart_the_wall_clock_counts_as_far_as_it_has_gone_forward(tmp_path: Path) -> None:
    pause(tmp_path, 2 * HOUR_S, now=NOON)
    for wall_s, boot_s, left in (
        (NOON.wall_s + HOUR_S, 60.0, HOUR_S),
        (0.0, 60.0, 2 * HOUR_S - 60.0),  # a board without a battery for its clock
        (0.0, 3 * HOUR_S, None),
    ):
        fresh = tmp_path / f"{wall_s}-{boot_s}"
        fresh.mkdir()
        (fresh / "pause").write_bytes((tmp_path / "pause").read_bytes())
        now = Clocks(wall_s, boot_s, "second")
        assert read_pause(fresh, clocks=partial(lambda given: given, now)) == left


def test_a_pause_that_is_over_does_not_come_back_with_another_clock(tmp_path: Path) -> None:
    pause(tmp_path, 2 * HOUR_S, now=NOON)
    assert read_pause(tmp_path, clocks=lambda: replace(NOON, boot_s=NOON.boot_s + 3 * HOUR_S)) is None
    assert read_pause(tmp_path, clocks=lambda: Clocks(0.0, 1.0, "second")) is None
    pause(tmp_path, 2 * HOUR_S, now=NOON)  # the next one is not over
    assert read_pause(tmp_path, clocks=lambda: NOON) == 2 * HOUR_S


@given(
    seconds=st.floats(1, YEAR_S),
    wall_s=st.floats(-1e12, 1e12),
    boot_s=st.floats(0, 1e9),
    boot_id=st.sampled_from(["first", "second", ""]),
)
def test_no_clock_makes_a_pause_longer_than_it_was_ordered(
    seconds: float, wall_s: float, boot_s: float, boot_id: str
) -> None:
    order = Pause("a", seconds, NOON.wall_s, NOON.boot_s, "first")
    assert 0 <= order.left_s(Clocks(wall_s, boot_s, boot_id)) <= seconds


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"null", b"[]", b"{}", b"\xff\xfe", b'{"id": ""}', b"[" * 100_000),
        b'{"id": "a", "seconds": 1, "wall_s": "x", "boot_s": 0, "boot_id": ""}',
        b'{"id": "a", "seconds": 1, "wall_s": [], "boot_s": 0, "boot_id": ""}',
        b'{"id": "a", "seconds": 1e999, "wall_s": 0, "boot_s": 0, "boot_id": ""}',
    ],
)
def test_a_damaged_file_is_a_pause_until_the_owner_ends_it(tmp_path: Path, data: bytes) -> None:
    assert parse_pause(data) is None
    (tmp_path / "pause").write_bytes(data)
    assert read_pause(tmp_path) == math.inf
    assert resume(tmp_path)


def test_without_space_a_pause_is_refused_and_the_one_before_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause(tmp_path, None)
    before = (tmp_path / "pause").read_bytes()

    def full(descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fedtune.store.files.write", full)
    with pytest.raises(StoreError, match="No space left on device; free some space"):
        pause(tmp_path, 60.0)
    assert (tmp_path / "pause").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("text", "seconds"), [("90m", 5400), ("2h", 7200), ("1d", 86_400), ("1.5h", 5400), ("30s", 30)]
)
def test_a_duration_has_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "-2h", "0h", "1e9h", "400d", "2 hours", "2h30m", "\u0661h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r'expected a time of at most 366 days, such as "90m", "2h" or "1d"; got'):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("22:00", 10 * HOUR_S), ("06:30", 18.5 * HOUR_S), ("12:00", 24 * HOUR_S)]
)
def test_a_time_of_day_is_the_next_one(text: str, seconds: float) -> None:
    assert seconds_until(text, datetime(2026, 11, 30, 12)) == seconds


@pytest.mark.parametrize("text", ["24:00", "22", "22:60", "10pm", ""])
def test_what_is_no_time_of_day_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r'expected a time of day, such as "22:00"; got'):
        seconds_until(text, datetime(2026, 11, 30, 12))


def test_the_file_of_a_pause_names_nothing_of_the_device_but_its_clocks(tmp_path: Path) -> None:
    pause(tmp_path, 60.0)
    value: Mapping[str, Any] = json.loads((tmp_path / "pause").read_bytes())
    assert set(value) == {"id", "seconds", "wall_s", "boot_s", "boot_id"}
