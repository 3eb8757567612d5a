"""What stands in the way of joining, each in one line with what to do: a device's owner sees nothing else."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from fedtune.cli.edge import main
from fedtune.cli.edge_options import RETRY, USAGE
from fedtune.link.client import session
from fedtune.link.pki.roster import Party
from fedtune.link.rejections import FATAL, reason_name, rejection
from fedtune.link.server.callers import Callers
from fedtune.link.server.run_info import RunInfo
from fedtune.store import manifest
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import enroll_parties
from tests.link.link_server import LinkServer, run_link_server
from tests.link.site import RecordingTrainer

SITE = """\
name = "site-a"
[model]
base = "bundle"
[adapter]
targets = ["q_proj"]
[data]
source = "rows.jsonl"
fields = {{ text = "text" }}
[policy]
min_examples = 1
{policy}
[link]
address = "{address}"
backoff_s = 0.01
patience_s = 0.02
{link}
"""


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """These devices never begin: a trainer takes the place of the process that would load their base."""
    trainer = RecordingTrainer()
    trainer.close = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr("fedtune.deployment.join.make_trainer", lambda *arguments, **options: trainer)


def write_site(folder: Path, address: str = "localhost:1", *, policy: str = "", link: str = "") -> Path:
    site = folder / "site-a" / "site.toml"
    (site.parent / "bundle").mkdir(exist_ok=True)
    (site.parent / "bundle" / manifest.NAME).touch()
    (site.parent / "rows.jsonl").touch()
    site.write_text(SITE.format(address=address, policy=policy, link=link))
    return site


def last_line(site: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Join, and return the exit status with the one line that says why it ended; the lines before it are events."""
    status = main(["join", str(site)])
    lines = capsys.readouterr().err.splitlines()
    assert not [line for line in lines if "Traceback" in line]
    ends = [line for line in lines if line.startswith("fedtune-edge: ")]
    assert ends == lines[-1:], lines
    return status, ends[0]


@dataclass(frozen=True)
class Case:
    """One thing that is wrong with a device's own files, what is said of it, and the exit status."""

    name: str
    harm: Callable[[Path], object]
    """Gets the identity folder."""
    text: str
    status: int = USAGE


def of_another(name: str) -> Callable[[Path], None]:
    """Return what puts a file of another federation into an identity."""

    def harm(place: Path) -> None:
        other = enroll_parties(place.parent / "other")
        (place / name).write_bytes((other["site-a"] / name).read_bytes())

    return harm


def clock_at(seconds: float) -> Callable[[Path], None]:
    def harm(place: Path) -> None:
        time.time = lambda: seconds  # put back by the test

    return harm


FILES = [
    Case(
        "no identity",
        lambda place: place.rename(place.with_name("gone")),
        "expected keys of this device in ",
    ),
    Case("a key for all", lambda place: (place / "tls.key").chmod(0o644), "got one that others can read; chmod 600 it"),
    Case("no certificate", lambda place: (place / "tls.crt").unlink(), "then: fedtune-edge enroll CODE"),
    Case("a damaged key", lambda place: (place / "sign.key").write_bytes(b"x"), "that can be read; got "),
    Case("another key", of_another("tls.key"), "got one of another key; enrol again"),
    Case("another CA", of_another("ca.crt"), "got one of another CA; enrol again"),
    Case("another roster", of_another("roster"), "expected a roster of this federation"),
    Case("another signer", of_another("sign.key"), "with this key; got none, or another key; enrol again"),
    Case("a clock in 1970", clock_at(0.0), "check this clock (1970-01-01 00:00 UTC)", RETRY),
    Case("a clock in 2090", clock_at(3.8e9), "or check this clock (2090-06-01 11:33 UTC)"),
]


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.name)
def test_what_is_wrong_with_its_own_files(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = enroll_parties(tmp_path)
    site = write_site(tmp_path)
    monkeypatch.setattr(time, "time", time.time)  # which puts the real one back
    case.harm(places["site-a"])
    status, line = last_line(site, capsys)
    assert case.text in line
    assert status == case.status
    # Nothing was begun: a device that is set right starts as if it had never been wrong.
    assert not (tmp_path / "site-a" / "state").exists()


def test_mains_power_that_this_machine_does_not_tell_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    enroll_parties(tmp_path)
    monkeypatch.setattr("fedtune.link.client.conditions.read_power", lambda folder: (None, None))
    status, line = last_line(write_site(tmp_path, policy='power = "mains"'), capsys)
    assert (status, "expected a machine that tells whether it is on mains power" in line) == (USAGE, True), line


def test_a_name_that_is_not_the_enrolled_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enroll_parties(tmp_path)
    site = write_site(tmp_path)
    site.write_text(site.read_text().replace('name = "site-a"', 'name = "site-b"'))
    assert last_line(site, capsys)[1].endswith(
        "expected 'site-a', as this site is enrolled; got 'site-b'; "
        'set name = "site-a", or enrol under the other name'
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LinkServer]:
    with run_link_server(tmp_path_factory.mktemp("federation")) as link:
        yield link


def join_server(running: LinkServer, capsys: pytest.CaptureFixture[str], **change: str) -> tuple[int, str, str]:
    """Join a server; returns the exit status, the last line, and all that was said before."""
    site = write_site(running.folder, change.pop("address", f"localhost:{running.port}"), **change)
    status = main(["join", str(site)])
    lines = capsys.readouterr().err.splitlines()
    assert not [line for line in lines if "Traceback" in line]
    assert len([line for line in lines if line.startswith("fedtune-edge: ")]) == 1
    return status, lines[-1], "\n".join(lines[:-1])


@pytest.mark.parametrize("reason", sorted(FATAL), ids=lambda reason: reason_name(reason))
def test_every_refusal_that_needs_a_person(
    reason: pb.Reason, server: LinkServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not admitted, revoked, of another federation or version, barred: when a server says so is for its own tests."""

    def refuse(callers: Callers, caller: object) -> Party:
        raise rejection(reason, "certificate", "another", "\x1b[2Jthis")

    monkeypatch.setattr(Callers, "admit", refuse)
    status, line, _ = join_server(server, capsys)
    assert status == USAGE
    assert f"{reason_name(reason)}: certificate: expected another; got [2Jthis; " in line
    assert line.isprintable()
    assert line.count("; ") >= 2  # what to do


def test_a_server_of_another_federation_or_under_another_name_or_none_at_all(
    server: LinkServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with run_link_server(tmp_path) as other:
        status, line, _ = join_server(server, capsys, address=f"localhost:{other.port}")
        assert (
            status,
            "got one of another federation, by CN=care CA (unable to get local issuer certificate)" in line,
        ) == (USAGE, True), line
    status, line, _ = join_server(server, capsys, link='server_name = "fl.example.org"')
    assert (status, "expected a server certificate of this federation for 'fl.example.org'" in line) == (USAGE, True), (
        line
    )
    status, line, before = join_server(server, capsys, address="localhost:1")
    assert (status, "start join again later" in line) == (RETRY, True)
    assert "no server listens on localhost:1 (Connection refused); trying again" in before


def test_a_port_of_another_service(server: LinkServer, capsys: pytest.CaptureFixture[str]) -> None:
    own = server.identities["server"]
    credentials = grpc.ssl_server_credentials([(own.tls_key, own.certificate)], own.ca, require_client_auth=True)
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_secure_port("localhost:0", credentials)
    other.start()
    try:
        status, line, _ = join_server(server, capsys, address=f"localhost:{port}")
    finally:
        other.stop(None).wait()
    assert (status, "expected a fedtune server; got UNIMPLEMENTED" in line) == (USAGE, True), line


def test_a_server_that_proves_nothing_or_whose_run_nobody_has_signed(
    server: LinkServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as changed:
        changed.setattr(RunInfo, "prove", lambda run, client, **said: None)
        status, line, _ = join_server(server, capsys)
        assert (status, "its fedtune must be 0.3 or later" in line) == (USAGE, True), line
    with monkeypatch.context() as changed:
        changed.setattr(session, "RUN_ID", re.compile("none"))
        status, line, _ = join_server(server, capsys)
        assert (status, "expected a run id of 16 hex digits" in line) == (USAGE, True), line
    recipe = server.dispatcher.run.recipe
    object.__setattr__(server.dispatcher.run, "recipe", recipe + b"# changed")
    try:
        status, line, _ = join_server(server, capsys)
    finally:
        object.__setattr__(server.dispatcher.run, "recipe", recipe)
    assert (status, "expected a run that the coordinator has signed" in line) == (USAGE, True), line


def test_a_limit_that_is_too_low_for_the_server(server: LinkServer, capsys: pytest.CaptureFixture[str]) -> None:
    status, line, _ = join_server(server, capsys, link="max_up_kib_s = 1")
    assert (status, "expected at least 4.3, as this server gives up transfers" in line) == (USAGE, True), line
