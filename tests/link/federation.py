"""A whole federation on loopback for tests: its files, and the real processes of server and sites."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.link.ceremony import enroll_parties

ROOT = Path(__file__).parents[2]
COMMAND = "from fedtune.cli.main import main; main()"
END_S = 180.0
"""Seconds after which a test that hangs fails."""


def free_port() -> int:
    """Return a port of loopback that no server listens on; servers that are started again need the same one."""
    with socket.socket() as result:
        result.bind(("127.0.0.1", 0))
        return int(result.getsockname()[1])


@dataclass
class Federation:
    """Files of a federation, and its processes by name."""

    folder: Path
    port: int
    """Of the server."""
    places: Mapping[str, Path]
    """Identity folders by name."""
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)
    """Output of the processes, by name."""
    news: threading.Condition = field(default_factory=threading.Condition)
    readers: list[threading.Thread] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def log(self, name: str) -> str:
        return "".join(self.lines.get(name, []))

    def events(self, name: str, kind: str) -> list[Mapping[str, Any]]:
        """Return the events of one kind that a process has written."""
        result = [json.loads(line) for line in list(self.lines.get(name, [])) if line.startswith("{")]
        return [one for one in result if one.get("event") == kind]

    def until(self, happened: Callable[[], object]) -> None:
        """Wait until a condition on the output of the processes holds."""
        with self.news:
            assert self.news.wait_for(happened, END_S), {name: self.log(name) for name in self.lines}

    def start(
        self, name: str, *command: str, program: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a process whose output is added to its log.

        Args:
            name: of the party.
            command: arguments.
            program: gets them, in a group of its own, with nothing but `environment`; without one Python does, in ours.
            environment: of a program.
        """
        process = subprocess.Popen(
            [*program, *command] if program else [sys.executable, *command],
            cwd=self.folder if program else ROOT,
            env=environment if program else {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            start_new_session=bool(program),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes[name] = process
        reader = threading.Thread(target=self._read, args=(name, process), name=f"output of {process.pid}")
        reader.start()
        self.readers.append(reader)
        return process

    def _read(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as out:
            for line in out:
                with self.news:
                    self.lines.setdefault(name, []).append(line)
                    self.news.notify_all()

    def serve(self, *options: str, resume: bool = False) -> subprocess.Popen[str]:
        what = ["--resume", str(self.run)] if resume else [str(self.folder / "recipe.toml"), "--out", str(self.run)]
        common = ["--config", str(self.folder / "server.toml"), "--log", "json"]
        return self.start("server", "-c", COMMAND, "serve", *what, *common, *options)

    def join(self, name: str) -> subprocess.Popen[str]:
        return self.start(name, "-c", COMMAND, "join", str(self.folder / name / "site.toml"), "--log", "json")

    def exit_statuses(self, *names: str) -> list[int]:
        """Wait for processes to end by themselves, and return their exit statuses."""
        return [self.processes[name].wait(END_S) for name in names]

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait()

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        for reader in self.readers:
            reader.join()


@contextmanager
def federation(
    folder: Path,
    recipe: str,
    clients: Sequence[str],
    *,
    site: Mapping[str, str],
    server: Mapping[str, Any] | None = None,
    port: int | None = None,
    now: int | None = None,
) -> Iterator[Federation]:
    """Write the files of a federation; its processes end with the block.

    Args:
        folder: for everything.
        recipe: TOML.
        clients: names.
        site: by client, the site's own file but for its name and link.
        server: settings of the link.
        port: that clients dial, if it is not the server's.
        now: when certificates begin, by the clock of the CA; None for this one's.
    """
    places = enroll_parties(folder, clients=clients, now=now)
    fed = Federation(folder, free_port(), places)
    (folder / "recipe.toml").write_text(recipe)
    settings = {"listen": f"127.0.0.1:{fed.port}", "identity": str(places["server"]), "health": "", **(server or {})}
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    (folder / "server.toml").write_text("\n".join(["[link]", *lines, ""]))
    for name in clients:
        link = [f'address = "localhost:{port or fed.port}"', "backoff_s = 0.1", "backoff_cap_s = 1.0"]
        # These sites hold a few rows each.
        policy = [] if "[policy]" in site[name] else ["[policy]", "min_examples = 1"]
        text = [f'name = "{name}"', site[name], "[link]", *link, *policy, ""]
        (folder / name / "site.toml").write_text("\n".join(text))
    try:
        yield fed
    finally:
        fed.end()
