"""What it takes to enrol sites by files and with a code: commands, files that people carry, and seconds.

    python benchmarks/enrolment.py [SITES]

Both ways are run with the real commands on loopback, for the same number of sites; people's time is not in the seconds.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path


class Ceremony:
    """Runs the commands of a party, and counts them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands, self.files = folder, Counter[str](), 0

    def run(self, party: str, *words: str, counts: bool = True) -> str:
        command = [sys.executable, "-m", "fedtune", *words]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=True)
        if counts:
            self.commands[party] += 1
        return done.stdout + done.stderr

    def found(self) -> None:
        """Make a CA and a coordinator, which both ways need."""
        self.run("ca", "ca", "init", "ca", "--federation", "care", counts=False)
        words = ("--name", "server", "--org", "consortium", "--role", "coordinator", "--host", "localhost")
        read_out = fingerprint(self.run("server", "enroll", "request", *words, counts=False))
        self.run("ca", "enroll", "sign", "server.request.json", "--fingerprint", read_out, counts=False)
        self.run("server", "enroll", "accept", "server.bundle.json", counts=False)


def fingerprint(text: str) -> str:
    line = next(line for line in text.splitlines() if line.startswith("fingerprint, to compare by voice"))
    return line.partition(": ")[2]


def by_files(folder: Path, sites: int) -> Ceremony:
    ceremony = Ceremony(folder)
    ceremony.found()
    for n in range(sites):
        name = f"site-{n}"
        identity = ("--identity", f"{name}/identity")
        asked = ceremony.run("site", "enroll", "request", "--name", name, "--org", f"o{n}", *identity)
        ceremony.run("ca", "enroll", "sign", f"{name}.request.json", "--fingerprint", fingerprint(asked))
        ceremony.run("site", "enroll", "accept", f"{name}.bundle.json", *identity)
        ceremony.files += 2
    ceremony.run("server", "roster", "install", "ca/roster")
    ceremony.files += 1
    return ceremony


def by_code(folder: Path, sites: int) -> Ceremony:
    ceremony = Ceremony(folder)
    ceremony.found()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "server.toml").write_text(f'[enrolment]\nlisten = "127.0.0.1:{port}"\n')
    command = [sys.executable, "-m", "fedtune", "enroll", "serve", "--config", "server.toml"]
    service = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    ceremony.commands["server"] += 1
    try:
        assert service.stderr is not None
        assert "enrolment on" in service.stderr.readline()
        waiting = [enrol(ceremony, n) for n in range(sites)]
        read_out = [fingerprint("".join(next(lines) for _ in range(2))) for lines, _ in waiting]
        while len(list((folder / "enrolment" / "queue").glob("*.request.json"))) < sites:
            time.sleep(0.1)
        shutil.copytree(folder / "enrolment" / "queue", folder / "stick")
        compared = [word for text in read_out for word in ("--fingerprint", text)]
        ceremony.run("ca", "enroll", "sign", "stick", *compared)
        shutil.copytree(folder / "stick", folder / "enrolment" / "queue", dirs_exist_ok=True)
        ceremony.files += 2  # the queue, to the CA and back
        for _, process in waiting:
            assert process.wait() == 0
    finally:
        service.terminate()
        service.wait()
    return ceremony


def enrol(ceremony: Ceremony, n: int) -> tuple[Iterator[str], subprocess.Popen[str]]:
    words = ("--name", f"site-{n}", "--org", f"o{n}", "--config", "server.toml")
    code = ceremony.run("server", "enroll", "invite", *words).splitlines()[-1]
    command = [sys.executable, "-m", "fedtune", "enroll", "--code", code, "--identity", f"site-{n}/identity"]
    process = subprocess.Popen(command, cwd=ceremony.folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ceremony.commands["site"] += 1
    assert process.stderr is not None
    return iter(process.stderr), process


def main() -> None:
    sites = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"{sites} sites; commands at all sites, at the CA, at the coordinator; files that people carry; seconds")
    for name, way in (("by files", by_files), ("with a code", by_code)):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            done = way(Path(folder), sites)
            total = time.perf_counter() - begin
        counts = ", ".join(str(done.commands[party]) for party in ("site", "ca", "server"))
        print(f"{name:12} {counts:12} {done.files:3} {total:6.1f} s")


if __name__ == "__main__":
    main()
