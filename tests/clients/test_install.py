"""The script that installs a program of one file: what it checks, where it puts it, and that it takes itself away."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.toy import EDGE, load, run_file, toy_file

PROGRAM = '#!/bin/sh\n[ "${1-}" = version ] && exit 0\necho runs\n'


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    """A folder as `make edge` leaves it."""
    path = toy_file(tmp_path, program=PROGRAM, name="fedtune-edge")
    for name in ("install.sh", "fedtune-edge.service"):
        shutil.copy(EDGE / name, path.parent)
    load("pack").write_sums(path.parent, [path.name, "install.sh", "fedtune-edge.service"])
    return path.parent


def install(downloads: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    home = downloads.parent / "me"
    bare = {"PATH": os.environ["PATH"], "HOME": str(home), "FEDTUNE_UNITS": str(home / "units"), **environment}
    command = ["sh", str(downloads / "install.sh"), *arguments]
    return subprocess.run(command, env=bare, cwd=downloads, capture_output=True, text=True, check=False)


def test_it_installs_replaces_and_removes_the_program_and_leaves_the_state(downloads: Path, tmp_path: Path) -> None:
    to, home = tmp_path / "bin", tmp_path / "me" / ".local" / "share" / "fedtune"
    for _ in range(2):
        done = install(downloads, "--to", str(to))
        assert (done.returncode, done.stderr) == (0, "")
        assert f"installed {to}/fedtune-edge" in done.stdout
        assert [path.name for path in to.iterdir()] == ["fedtune-edge"]
    assert run_file(to / "fedtune-edge", home).stdout == "runs\n"
    (home / "identity").mkdir()
    removed = install(downloads, "--uninstall", "--to", str(to))
    assert removed.returncode == 0
    assert not list(to.iterdir())
    assert sorted(path.name for path in home.iterdir()) == ["bin", "identity"]
    assert not list((home / "bin").iterdir())


def test_it_removes_a_program_whose_download_has_gone(downloads: Path, tmp_path: Path) -> None:
    assert install(downloads, "--to", "../bin").returncode == 0
    next(downloads.glob("fedtune-edge-1*")).unlink()
    assert install(downloads, "--uninstall", "--to", str(tmp_path / "bin")).returncode == 0
    assert not list((tmp_path / "bin").iterdir())


def change(path: Path, old: bytes, new: bytes) -> None:
    body = path.read_bytes()
    assert old in body
    path.write_bytes(body.replace(old, new, 1))


def renew_sums(downloads: Path) -> None:
    load("pack").write_sums(downloads, [path.name for path in downloads.iterdir() if path.name != "SHA256SUMS"])


def test_a_file_that_is_damaged_or_not_of_this_system_is_refused(downloads: Path, tmp_path: Path) -> None:
    (path,) = downloads.glob("fedtune-edge-1*")
    sums, machine = (downloads / "SHA256SUMS").read_text(), os.uname().machine

    def refusal(*arguments: str) -> str:
        done = install(downloads, *arguments, "--to", str(tmp_path / "bin"))
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
        assert not (tmp_path / "bin").exists()
        return done.stderr

    change(path, b"glibc=2.17", b"glibc=2.18")
    assert "it is damaged or another: copy it anew" in refusal()
    (downloads / "SHA256SUMS").write_text(sums.splitlines()[-1] + "\n")
    assert f"expected {path.name} in" in refusal()
    (downloads / "SHA256SUMS").unlink()
    assert "expected SHA256SUMS beside" in refusal()
    change(path, b"glibc=2.18", b"glibc=2.99")
    renew_sums(downloads)
    assert "expected glibc 2.99 or newer; got glibc 2." in refusal()
    other = path.rename(downloads / "fedtune-edge-1.0-riscv128")
    renew_sums(downloads)
    assert f"expected a file for {machine}; got {other.name}; take" in refusal(other.name)
    assert "expected a file to install; got" in refusal()
    assert "expected --to FOLDER, --service or --uninstall; got --too" in refusal("--too")


@pytest.mark.skipif(os.getuid() != 0, reason="only root writes units")
def test_root_gets_a_unit_that_starts_what_was_installed(downloads: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("systemctl", "useradd"):  # stand-ins: no account and no service of this machine is changed
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{tmp_path}/calls\n')
        (tools / name).chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    done = install(downloads, "--service", "--to", str(tmp_path / "bin"), PATH=path)
    assert (done.returncode, done.stderr) == (0, "")
    unit = tmp_path / "me" / "units" / "fedtune-edge.service"
    assert f"ExecStart={tmp_path}/bin/fedtune-edge join /var/lib/fedtune-edge/site.toml --log json" in unit.read_text()
    calls = (tmp_path / "calls").read_text()
    assert "useradd --system --home-dir /var/lib/fedtune-edge" in calls
    assert "systemctl daemon-reload" in calls
    install(downloads, "--uninstall", "--to", str(tmp_path / "bin"), PATH=path)
    assert not unit.exists()
    assert "systemctl disable --now fedtune-edge" in (tmp_path / "calls").read_text()


def test_the_unit_starts_once_more_but_not_where_somebody_must_change_something() -> None:
    rows = [line for line in (EDGE / "fedtune-edge.service").read_text().splitlines() if not line.startswith("#")]
    assert {
        "RestartPreventExitStatus=2",
        "Restart=on-failure",
        "Environment=FEDTUNE_HOME=/var/lib/fedtune-edge",
    } <= set(rows)
    assert {"User=fedtune-edge", "StateDirectory=fedtune-edge", "ProtectSystem=strict", "NoNewPrivileges=yes"} <= set(
        rows
    )
