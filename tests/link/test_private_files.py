"""What lies at rest on both sides: updates, orders and keys are for their owner alone, whatever the umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from fedtune.link.server.assignments import ReceivedParts
from tests.link.ceremony import enroll_parties
from tests.link.link_server import LinkServer
from tests.link.server.test_service import begun
from tests.link.site import collect_one, post, run_site, until


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    """Allow other users to read new files, as most machines do."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def readable_by_others(folder: Path) -> list[str]:
    """Return what in a folder other users could read; the folder itself included."""
    return sorted(str(path) for path in (folder, *folder.rglob("*")) if stat.S_IMODE(path.stat().st_mode) & 0o077)


@pytest.mark.guarantee("G6")
def test_updates_that_arrive_are_for_the_coordinator_alone(link: LinkServer) -> None:
    data = bytes(range(256)) * 400
    _, first = begun(link, "site-a", data)
    list(link.calls().push(iter([first]), timeout=10))
    assert list(link.dispatcher.folder.iterdir())
    assert not readable_by_others(link.dispatcher.folder)


@pytest.mark.guarantee("G6")
def test_orders_and_updates_of_a_site_are_for_the_site_alone(link: LinkServer) -> None:
    body = bytes(range(256)) * 1000
    with run_site(link) as running:
        result = collect_one(link, post(link, body=body))
        assert isinstance(result, ReceivedParts)
        link.dispatcher.settle("site-a", 1, None)
        until(link, lambda: list(running.state.glob("runs/*/*/receipt")))
        names = {path.name for path in running.state.glob("runs/*/*/*")}
        assert {"order", "front", "update", "answer", "receipt", sha256(body).hexdigest()} <= names
    # The state folder itself is made by `join`, and the trainer of a test writes with this umask.
    shown = readable_by_others(running.state / "runs")
    assert not shown


@pytest.mark.guarantee("G6")
def test_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    places = enroll_parties(tmp_path)
    for folder in places.values():
        assert not stat.S_IMODE(folder.stat().st_mode) & 0o077, folder
        for path in folder.glob("*.key"):
            assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
