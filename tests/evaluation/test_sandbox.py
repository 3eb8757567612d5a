from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from fedtune.errors import ConfigError
from fedtune.evaluation import confined
from fedtune.evaluation.sandbox import Limits, check_confinement, read_outcome, run_program

LOOSE = Limits(seconds=5, confined=False)


@pytest.fixture
def limits() -> Limits:
    """Limits with confinement, where this machine has it."""
    try:
        check_confinement(Limits())
    except ConfigError as error:
        pytest.skip(f"needs user namespaces: {error}")
    return Limits()


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("assert 1 + 1 == 2", "passed"),
        ("assert 1 + 1 == 3", "failed"),
        ("def f(:", "failed"),
        # What ends itself has not run its tests.
        ("import sys; sys.exit(0)", "failed"),
        ("import os; os._exit(0)", "failed"),
        ("def f(): return f()\nf()", "failed"),
        ("import ctypes; ctypes.string_at(0)", "failed"),
        ("x = bytearray(2 ** 31)", "memory"),
        # What it prints, and to where, is no outcome.
        (
            "import os\nfor n in range(3, 32):\n  try: os.write(n, b'passed')\n  except OSError: pass\nos._exit(0)",
            "failed",
        ),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n  x: int\nassert A(1).x == 1", "passed"),
    ],
)
def test_a_program_passes_only_by_running_to_its_end(program: str, outcome: str) -> None:
    assert run_program(program, LOOSE) == outcome


def test_a_program_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    program = (
        f"import os, time\nos.fork()\nos.fork()\nos.mkdir({str(tmp_path)!r} + f'/{{os.getpid()}}')\ntime.sleep(60)"
    )
    assert run_program(program, Limits(clock_seconds=1.5, confined=False)) == "timeout"
    started = [int(folder.name) for folder in tmp_path.iterdir()]
    assert started
    deadline = time.monotonic() + 10  # the kernel ends them one by one
    while any(map(is_running, started)) and time.monotonic() < deadline:
        pass
    assert not [pid for pid in started if is_running(pid)]


def is_running(pid: int) -> bool:
    """Return whether a process of this test is there, and not only waits to be buried."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"confined.py" in command and status.rpartition(")")[2].split()[0] != "Z"


def test_a_program_that_only_computes_is_ended_by_its_processor_time() -> None:
    assert run_program("while True: pass", Limits(seconds=1, clock_seconds=60, confined=False)) == "timeout"


def test_a_confined_program_reaches_no_server_and_writes_no_file(limits: Limits, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        assert run_program(connect, LOOSE) == "passed"
        assert run_program(connect, limits) == "failed"
    for program in (
        f"open({str(victim)!r}, 'w').write('x')",
        f"import os; os.unlink({str(victim)!r})",
        f"import os; os.rename({str(victim)!r}, {str(tmp_path / 'other')!r})",
        f"import os; os.chmod({str(victim)!r}, 0)",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        "open('here', 'w').write('x')",
    ):
        assert run_program(program, limits) == "failed", program
    assert victim.read_text() == "whole"
    assert victim.stat().st_mode & 0o777 == 0o644 & ~umask()
    assert run_program(f"assert open({str(victim)!r}).read() == 'whole'", limits) == "passed"


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_confined_program_cannot_undo_its_confinement(limits: Limits) -> None:
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "assert libc.mount(None, b'/', None, 0x20 | 0x1000, None) != 0\n"  # writable again
        "assert libc.unshare(0x10000000 | 0x20000) != 0 or libc.mount(None, b'/', None, 0x20 | 0x1000, None) != 0\n"
        "import os; assert os.getpid() == 1"
    )
    assert run_program(program, limits) == "passed"


def test_limits_hold_inside_the_confinement_too(limits: Limits) -> None:
    assert run_program("x = bytearray(2 ** 31)", limits) == "memory"
    assert run_program("import os; [os.open('/dev/null', 0) for _ in range(99)]", limits) == "failed"
    assert run_program("while True: pass", Limits(clock_seconds=0.5)) == "timeout"


def test_nothing_runs_where_programs_cannot_be_confined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refuses = tmp_path / "confined.py"
    refuses.write_text("import sys; sys.exit(77)")
    monkeypatch.setattr(confined, "__file__", str(refuses))
    with pytest.raises(ConfigError, match=r"user namespaces.*accept that generated programs may .*: --unconfined"):
        check_confinement(Limits())
    refuses.write_text("import nothing_like_this")
    with pytest.raises(ConfigError, match="an empty program runs within the limits"):
        check_confinement(LOOSE)


def test_an_outcome_needs_its_mark() -> None:
    assert read_outcome(b"abc passed", "abc", 0) == "passed"
    assert read_outcome(b"passed", "abc", 0) == "failed"
    assert read_outcome(b"abc passed twice", "abc", 0) == "failed"
    assert read_outcome(b"\xff", "abc", 0) == "failed"
    assert read_outcome(b"", "abc", confined.OUT_OF_TIME) == "timeout"
    assert read_outcome(b"", "abc", confined.OUT_OF_MEMORY) == "memory"  # the kernel's, which no program can catch


def test_the_program_gets_no_environment() -> None:
    os.environ["FEDTUNE_SECRET"] = "x"
    try:
        assert run_program("import os; assert 'FEDTUNE_SECRET' not in os.environ", LOOSE) == "passed"
    finally:
        del os.environ["FEDTUNE_SECRET"]
    assert sys.executable
