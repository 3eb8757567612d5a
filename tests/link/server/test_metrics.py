from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.errors import ConfigError
from fedtune.link.pki.roster import Roster
from fedtune.link.server.metrics import Metrics, serve_health
from tests.link.harness import make_harness

ROSTER = Roster("care", 1, 2_000_000_000, {})


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
    dispatcher, metrics = make_harness(tmp_path).dispatcher, Metrics()
    metrics.add_gauges(dispatcher, roster=lambda: replace(ROSTER, version=7), certificate_until=lambda: 1.8e9)
    for kind, fields in (
        ("round", {"round": 3}),
        ("answered", {"client": "anna", "bytes": 100}),
        ("fetched", {"client": "anna", "bytes": 30}),
        ("receipt", {"client": "anna", "verdict": "ACCEPTED"}),
        ("refused", {"client": "anna", "code": "SIGNATURE"}),
    ):
        metrics.record(kind, **fields)
    dispatcher.sign_of_life("anna")
    with serve_health("127.0.0.1:0", metrics, unready=lambda: ready[0]) as result:
        yield result


def test_events_are_counted_without_names_of_clients(port: int) -> None:
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
    metrics.record("receipt", client="anna", verdict="LATE")
    with serve_health("127.0.0.1:0", metrics, unready=lambda: "") as result:
        assert 'fedtune_answers_total{client="anna",verdict="LATE"} 1.0' in get(result, "/metrics")[1]


def test_alive_is_not_ready(port: int, ready: list[str]) -> None:
    assert get(port, "/healthz") == get(port, "/readyz") == (200, "ok\n")
    ready[0] = "the disk is full"
    assert get(port, "/healthz")[0] == 200
    assert get(port, "/readyz") == (503, "the disk is full\n")
    assert get(port, "/other")[0] == 404


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "nowhere", "127.0.0.1:x"])
def test_an_address_that_cannot_be_listened_on_is_told(address: str) -> None:
    with pytest.raises(ConfigError, match=r"link\.health"), serve_health(address, Metrics(), unready=lambda: ""):
        pass


def test_a_health_port_that_is_taken_is_told(port: int) -> None:
    with pytest.raises(ConfigError, match=str(port)), serve_health(f"127.0.0.1:{port}", Metrics(), unready=lambda: ""):
        pass


def test_counters_add_up_by_verdict_code_and_direction() -> None:
    metrics = Metrics()
    for verdict in ("ACCEPTED", "ACCEPTED", "LATE"):
        metrics.record("receipt", client="anna", verdict=verdict)
    for size in (1, 20, 300):
        metrics.record("answered", client="anna", bytes=size)
    metrics.record("note", text="anything else is counted by its kind alone")
    with serve_health("127.0.0.1:0", metrics, unready=lambda: "") as result:
        lines = get(result, "/metrics")[1].splitlines()
    for line in (
        'fedtune_answers_total{verdict="ACCEPTED"} 2.0',
        'fedtune_answers_total{verdict="LATE"} 1.0',
        'fedtune_bytes_total{direction="up"} 321.0',
        'fedtune_events_total{kind="note"} 1.0',
        'fedtune_events_total{kind="receipt"} 3.0',
    ):
        assert line in lines


def test_bytes_that_are_arriving_are_shown_as_they_come(tmp_path: Path) -> None:
    dispatcher, metrics = make_harness(tmp_path).dispatcher, Metrics()
    metrics.add_gauges(dispatcher, roster=lambda: ROSTER, certificate_until=lambda: 0.0)
    with serve_health("127.0.0.1:0", metrics, unready=lambda: "") as result:
        for size in (0, 1000):
            (dispatcher.folder / "part").write_bytes(bytes(size))
            assert f"fedtune_spool_bytes {size}.0" in get(result, "/metrics")[1].splitlines()


def test_the_port_is_free_again_when_the_block_ends() -> None:
    with serve_health("127.0.0.1:0", Metrics(), unready=lambda: "") as first:
        pass
    with serve_health(f"127.0.0.1:{first}", Metrics(), unready=lambda: "") as second:
        assert second == first
