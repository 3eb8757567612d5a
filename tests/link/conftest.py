"""Fixtures of the link: a dispatcher with a clock set by hand, and a server on loopback with enrolled parties."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.link.harness import Harness, make_harness
from tests.link.link_server import LinkServer, run_link_server


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return make_harness(tmp_path)


@pytest.fixture
def link(tmp_path: Path) -> Iterator[LinkServer]:
    with run_link_server(tmp_path) as server:
        yield server
