from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.errors import ConfigError
from fedtune.link.metrics import Metrics, health
from tests.link.conftest import made


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.fixture
def ready() -> list[str]:
    return [""]


@pytest.fixture
def port(tmp_path: Path, ready: list[str]) -> Iterator[int]:
    hub, metrics = made(tmp_path).hub, Metrics()
    metrics.gauge(hub, roster_version=lambda: 7, certificate_until=1.8e9)
    for kind, fields in (
        ("round", {"round": 3}),
        ("answered", {"client": "anna", "bytes": 100}),
        ("fetched", {"client": "anna", "bytes": 30}),
        ("receipt", {"client": "anna", "verdict": "ACCEPTED"}),
        ("refused", {"client": "anna", "code": "SIGNATURE"}),
    ):
        metrics.tell(kind, **fields)
    hub.sign_of_life("anna")
    with health("127.0.0.1:0", metrics, unready=lambda: ready[0]) as found:
        yield found


def test_what_happened_is_counted_and_nobody_is_named(port: int) -> None:
    status, page = get(port, "/metrics")
    assert status == 200
    for line in (
        'fedtune_answers_total{verdict="ACCEPTED"} 1.0',
        'fedtune_refused_total{code="SIGNATURE"} 1.0',
        'fedtune_bytes_total{direction="up"} 100.0',
        'fedtune_bytes_total{direction="down"} 30.0',
        "fedtune_round 3.0",
        "fedtune_roster_version 7.0",
        "fedtune_clients_connected 1.0",
        "fedtune_spool_bytes 0.0",
    ):
        assert line in page.splitlines()
    assert "process_resident_memory_bytes" in page
    assert "anna" not in page


def test_names_appear_where_the_operator_wants_them(tmp_path: Path) -> None:
    metrics = Metrics(names=True)
    metrics.tell("receipt", client="anna", verdict="LATE")
    with health("127.0.0.1:0", metrics, unready=lambda: "") as found:
        assert 'fedtune_answers_total{client="anna",verdict="LATE"} 1.0' in get(found, "/metrics")[1]


def test_alive_is_not_ready(port: int, ready: list[str]) -> None:
    assert get(port, "/healthz") == get(port, "/readyz") == (200, "ok\n")
    ready[0] = "the disk is full"
    assert get(port, "/healthz")[0] == 200
    assert get(port, "/readyz") == (503, "the disk is full\n")
    assert get(port, "/other")[0] == 404


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "nowhere", "127.0.0.1:x"])
def test_an_address_that_cannot_be_listened_on_is_told(address: str) -> None:
    with pytest.raises(ConfigError, match=r"link\.health"), health(address, Metrics(), unready=lambda: ""):
        pass
