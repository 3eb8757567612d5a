"""A file that unpacks itself: once, whole or not at all, in any POSIX shell, and started in place of the script."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.clients.toy import DIGEST, run_file, toy_file

SHELLS = [[], ["dash"], ["bash", "--posix"], ["busybox", "sh"]]
"""What the first line names, and others."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def trees(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "bin").iterdir())


@pytest.mark.parametrize("shell", SHELLS, ids=lambda words: " ".join(words) or "first line")
def test_a_file_unpacks_once_and_becomes_the_program(shell: Sequence[str], tmp_path: Path, home: Path) -> None:
    if shell and shutil.which(shell[0]) is None:
        pytest.skip(f"needs {shell[0]}")
    path = toy_file(tmp_path)
    process = subprocess.Popen(
        [*shell, path, "a", "b c", "*"], env={"FEDTUNE_HOME": str(home), "PATH": os.environ["PATH"]}, stdout=-1
    )
    out, _ = process.communicate()
    # Its process number is the script's: killing the file kills the program.
    assert out.decode().splitlines() == [str(process.pid), "a", "b c", "*"]
    (tree,) = trees(home)
    assert DIGEST.fullmatch(tree)
    program = home / "bin" / tree / "toy"
    before = program.stat()
    assert run_file(path, home, "again").stdout.splitlines()[1:] == ["again"]
    assert (program.stat().st_ino, program.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert trees(home) == [tree]


def test_the_second_start_runs_no_other_program(tmp_path: Path, home: Path) -> None:
    path = toy_file(tmp_path)
    run_file(path, home)
    done = subprocess.run(
        ["/bin/sh", path, "x"], env={"FEDTUNE_HOME": str(home), "PATH": "/nowhere"}, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr, done.stdout.split()[1:]) == (0, b"", [b"x"])


def test_the_state_folder_is_that_of_the_user_where_none_is_named(tmp_path: Path) -> None:
    path = toy_file(tmp_path)
    done = subprocess.run([path], env={"HOME": str(tmp_path / "me"), "PATH": os.environ["PATH"]}, check=False)
    assert done.returncode == 0
    assert len(trees(tmp_path / "me" / ".local" / "share" / "fedtune")) == 1
    lost = subprocess.run([path], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False)
    assert (lost.returncode, lost.stderr.count("\n")) == (2, 1)
    assert "got neither FEDTUNE_HOME nor HOME; set one of them" in lost.stderr


def test_first_starts_at_once_leave_one_tree(tmp_path: Path, home: Path) -> None:
    path = toy_file(tmp_path, size=2_000_000)
    results: list[subprocess.CompletedProcess[str]] = []
    threads = [threading.Thread(target=lambda: results.append(run_file(path, home, "x"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done.returncode for done in results] == [0] * 6, [done.stderr for done in results]
    (tree,) = trees(home)
    assert sorted(path.name for path in (home / "bin" / tree).iterdir()) == [".boot", ".sha256sums", "_internal", "toy"]


def damaged_archive(path: Path, home: Path) -> None:
    body = bytearray(path.read_bytes())
    body[-9] ^= 1
    path.write_bytes(body)


def short_archive(path: Path, home: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def file_for_a_folder(path: Path, home: Path) -> None:
    home.write_text("")


FAULTS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "a changed byte": (damaged_archive, "it is damaged: copy it again"),
    "a short file": (short_archive, "it is damaged: copy it again"),
    "no folder": (file_for_a_folder, "set FEDTUNE_HOME to a folder of yours"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_unpacked_is_one_sentence_and_status_2(fault: str, tmp_path: Path, home: Path) -> None:
    break_it, sentence = FAULTS[fault]
    path = toy_file(tmp_path)
    break_it(path, home)
    done = run_file(path, home)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("toy: expected ")
    assert done.stderr.endswith(sentence + "\n")
    assert not home.is_dir() or not any((home / "bin").iterdir())


def test_another_architecture_is_named(tmp_path: Path, home: Path) -> None:
    done = run_file(toy_file(tmp_path, arch="riscv128"), home)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"expected a machine of architecture riscv128; got {os.uname().machine}; take the file" in done.stderr


def test_a_command_that_is_missing_is_named(tmp_path: Path, home: Path) -> None:
    (tmp_path / "few").mkdir()
    for tool in ("tail", "gzip", "tar", "mkdir", "mv", "rm", "ls", "grep", "sync", "uname"):
        (tmp_path / "few" / tool).symlink_to(str(shutil.which(tool)))
    done = subprocess.run(
        ["/bin/sh", toy_file(tmp_path)],
        env={"FEDTUNE_HOME": str(home), "PATH": str(tmp_path / "few")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "expected the command sha256sum; got none on PATH" in done.stderr


def test_a_full_disk_leaves_nothing_and_is_one_sentence(tmp_path: Path, home: Path) -> None:
    """No file may grow beyond half of the program's: what tar meets where a disk is full."""
    path = toy_file(tmp_path, size=400_000)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(
        [path],
        env={"FEDTUNE_HOME": str(home), "PATH": os.environ["PATH"]},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "expected to unpack 1 MB to" in done.stderr
    assert done.stderr.endswith("free some space, or set FEDTUNE_HOME to a folder on another disk\n")
    assert trees(home) == []
    assert run_file(path, home).returncode == 0


@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        ("version `GLIBC_2.38' not found", "expected glibc 2.17 or newer; got an older one"),
        ("Illegal instruction", "expected a program that runs on this system; got Illegal instruction"),
    ],
)
def test_a_program_that_does_not_start_is_never_taken_for_installed(
    says: str, sentence: str, tmp_path: Path, home: Path
) -> None:
    done = run_file(toy_file(tmp_path, program=f"#!/bin/sh\ncat >&2 <<'E'\n{says}\nE\nexit 1\n"), home)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert sentence in done.stderr
    assert trees(home) == []


def test_a_file_system_that_runs_nothing_is_named(tmp_path: Path) -> None:
    folder = next((path for path in noexec_folders() if os.access(path, os.W_OK)), None)
    made = None
    if folder is None:
        made = tmp_path / "noexec"
        made.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "noexec", "none", made], check=False, capture_output=True
        ).returncode:
            pytest.skip("needs a file system mounted with noexec, or the right to mount one")
        folder = made
    home = folder / f"fedtune-{os.getpid()}"
    try:
        done = run_file(toy_file(tmp_path), home)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "expected a file system that runs programs; got noexec at" in done.stderr
        assert trees(home) == []
    finally:
        shutil.rmtree(home, ignore_errors=True)
        if made is not None:
            subprocess.run(["umount", made], check=True)


def noexec_folders() -> list[Path]:
    rows = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(row[1]) for row in rows if "noexec" in row[3].split(",") and row[2] == "tmpfs"]


def test_a_killed_start_leaves_nothing_that_is_taken_for_whole(tmp_path: Path, home: Path) -> None:
    # Its gzip writes half of the archive, and waits: the moment at which the group is killed.
    path = toy_file(tmp_path, size=2_000_000)
    tools = tmp_path / "tools"
    tools.mkdir()
    news, wait = tmp_path / "news", tmp_path / "wait"
    os.mkfifo(news)
    os.mkfifo(wait)
    real = shutil.which("gzip")
    (tools / "gzip").write_text(f"#!/bin/sh\n{real} -dc | head -c 900000\necho half >{news}\nexec cat {wait}\n")
    (tools / "gzip").chmod(0o755)
    environment = {"FEDTUNE_HOME": str(home), "PATH": f"{tools}:{os.environ['PATH']}"}
    process = subprocess.Popen([path], env=environment, start_new_session=True)
    assert news.read_text() == "half\n"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (left,) = trees(home)
    assert left.startswith(".new-")
    assert run_file(path, home, "x").returncode == 0
    (tree,) = trees(home)
    assert DIGEST.fullmatch(tree)


def test_a_tree_is_verified_after_a_boot_and_unpacked_anew_if_it_is_damaged(tmp_path: Path, home: Path) -> None:
    path = toy_file(tmp_path)
    run_file(path, home)
    (tree,) = (home / "bin").iterdir()
    library = tree / "_internal" / "lib.so"
    whole = library.read_bytes()
    library.write_bytes(whole[:100])
    (tree / ".boot").write_text("another boot\n")
    assert run_file(path, home, "x").stdout.splitlines()[1:] == ["x"]
    assert library.read_bytes() == whole
    assert trees(home) == [tree.name]


def test_other_versions_go_when_nothing_runs_from_them(tmp_path: Path, home: Path) -> None:
    sleeper = shutil.which("sleep")
    assert sleeper is not None
    new, other = toy_file(tmp_path / "2"), toy_file(tmp_path / "3", name="another")
    run_file(other, home)
    # A program that runs, whose file is the tree's own.
    stopped = home / "bin" / ("0" * 64)
    stopped.mkdir()
    shutil.copy(sleeper, stopped / "toy")
    process = subprocess.Popen([stopped / "toy", "1000"])
    try:
        assert run_file(new, home).returncode == 0
        assert stopped.name in trees(home)
    finally:
        process.kill()
        process.wait()
    newer = toy_file(tmp_path / "4", size=77)
    assert run_file(newer, home).returncode == 0
    assert stopped.name not in trees(home)
    # That of the other program stays, and of this one the newest.
    assert sorted(path.name for tree in (home / "bin").iterdir() for path in tree.glob("[a-z]*")) == ["another", "toy"]
