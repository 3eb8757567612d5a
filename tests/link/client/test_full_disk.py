"""A site whose disk is full at any write of a round: it ends with one sentence, and the next start goes on."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import pytest

from fedtune.errors import StoreError
from fedtune.link.client import downloads
from fedtune.link.envelopes import UPDATE
from fedtune.link.server.assignments import ReceivedParts
from fedtune.store import files
from tests.link.link_server import LinkServer
from tests.link.site import Site, collect_one, expected_update, post, run_site, until

BODY = b"x" * 40_000
STEPS = 14
"""At least so many writes has a round; a test that has fewer tests less than it says."""


@dataclass
class Disk:
    """A disk with room for so many writes, after which each one fails, as all do on a full disk."""

    room: int = 10**9
    failures: int = 0

    def write(self) -> None:
        self.room -= 1
        if self.room < 0:
            self.failures += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class File:
    """A file on that disk."""

    def __init__(self, file: IO[Any], disk: Disk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: Any) -> int:
        self._disk.write()
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()

    def first(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            disk.write()
            return function(*arguments, **options)

        return run

    def open_file(path: Any, mode: str = "r", **options: Any) -> Any:
        file = open(path, mode, **options)  # noqa: SIM115  closed by its caller
        return File(file, disk) if set(mode) & set("wa") else file

    monkeypatch.setattr(files, "write", first(files.write))
    monkeypatch.setattr(files, "create_beside", first(files.create_beside))
    monkeypatch.setattr(files, "open", open_file, raising=False)
    monkeypatch.setattr(downloads, "open", open_file, raising=False)
    monkeypatch.setattr(shutil, "copyfile", first(shutil.copyfile))
    monkeypatch.setattr(Path, "mkdir", first(Path.mkdir))
    return disk


def run_until_full(link: LinkServer, disk: Disk, room: int, number: int) -> bool:
    """Run a site that has room for so many writes of a round; returns whether that was enough for all of it."""
    with run_site(link) as running:
        until(link, lambda: "loaded" in running.kinds())
        disk.room, disk.failures = room, 0
        message_id = post(link, number, body=BODY)
        until(link, lambda: running.ended or link.dispatcher.collect([message_id]))
        if not running.ended:
            link.dispatcher.settle("site-a", number, None)
            until(link, lambda: running.ended or "trained" in running.kinds())
        disk.room = 10**9
        if running.ended:
            check_end(running)
        return not disk.failures


def check_end(running: Site) -> None:
    (error,) = running.ended
    assert isinstance(error, StoreError)
    assert "No space left on device; free some space" in str(error)
    assert isinstance(error.__cause__, OSError)  # by which a command knows that it may succeed later
    assert "\n" not in str(error)


@pytest.mark.guarantee("G15")
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_any_write_of_a_round_costs_a_start_and_nothing_else(
    tmp_path: Path, link: LinkServer, disk: Disk, every: int
) -> None:
    state = link.folder / "state-site-a"
    for number, room in enumerate(range(0, 100, every), start=1):
        if run_until_full(link, disk, room, number):
            break
        # The same round again, with space: the same bytes, and nothing of the interruption stays.
        with run_site(link) as running:
            result = collect_one(link, post(link, number, body=BODY))
            assert isinstance(result, ReceivedParts)
            # The order may be another one after a restart: it names the cohort once the server knows the site.
            folders = [path.parent for path in state.glob(f"runs/*/{number:06}-*/front")]
            updates = [expected_update(folder, running.trainer.size) for folder in folders]
            assert bytes(result.bodies[UPDATE]) in updates
            link.dispatcher.settle("site-a", number, None)
            until(link, lambda: "receipt" in running.kinds())
        # Soon: a thread of the site that has ended may be about to remove its own.
        until(link, lambda: not list(state.rglob(f"*{files.PARTIAL}")))
        link.dispatcher.end_round(number)
    assert room > STEPS - every
