from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.errors import StoreError
from fedtune.store.lock import holder, lock_run

OTHER = """
import sys
from pathlib import Path
from fedtune.store.lock import lock_run
with lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.guarantee("G20")
def test_a_second_writer_is_told_which_process_writes(tmp_path: Path) -> None:
    with lock_run(tmp_path):
        with (
            pytest.raises(StoreError, match=rf"no other process writes it; process {os.getpid()} does"),
            lock_run(tmp_path),
        ):
            pass
        assert holder(tmp_path) == str(os.getpid())
    assert holder(tmp_path) is None
    with lock_run(tmp_path):
        pass


@pytest.mark.guarantee("G20")
def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert holder(tmp_path) == str(other.pid)
        with pytest.raises(StoreError, match=f"process {other.pid} does; wait for it, or end it"), lock_run(tmp_path):
            pass
        other.kill()
        other.wait()
    assert holder(tmp_path) is None
    with lock_run(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_folder_without_a_lock_is_held_by_nobody(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_lock_is_given_back_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock_run(tmp_path):
        raise KeyError
    assert holder(tmp_path) is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"missing/lock: expected to read or write it"), lock_run(tmp_path / "missing"):
        pass
