from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.model import machine


def test_memory_of_machine_and_process_are_stated() -> None:
    assert 0 < machine.resident_bytes() <= machine.peak_bytes()
    assert machine.available_bytes() > 0


def test_a_peak_begins_anew_where_the_system_lets_it() -> None:
    ballast = bytearray(64 * 2**20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    before = machine.peak_bytes()
    del ballast
    if machine.forget_peak():
        assert machine.peak_bytes() < before


def test_a_container_bounds_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(machine, "CGROUPS", ((str(limit), str(used)),))
    limit.write_text("max\n")
    used.write_text("1000000\n")
    free = machine.available_bytes()
    limit.write_text("5000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 400000\n")
    assert machine.available_bytes() == 5_000_000 - 600_000 < free


def test_lines_that_a_file_lacks_are_none(tmp_path: Path) -> None:
    file = tmp_path / "status"
    file.write_text("VmRSS:\t  12 kB\n")
    assert machine.field_of(str(file), "VmRSS") == 12 * 1024
    assert machine.field_of(str(file), "VmHWM") is None
    assert machine.field_of(str(tmp_path / "none"), "VmRSS") is None
