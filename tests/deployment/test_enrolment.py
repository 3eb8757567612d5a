from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.deployment.enrolment import Place, find_place, invite, serve_alone, serving
from fedtune.errors import ConfigError, StoreError
from fedtune.link.audit_log import read_audit_log
from fedtune.link.client.enrolment import enrol
from fedtune.link.pki.identity import load_identity
from fedtune.link.pki.queue_files import Answer, write_answer
from fedtune.link.pki.roster import RosterFile
from fedtune.link.settings import EnrolmentSettings, LinkSettings
from tests.link.ceremony import enroll_parties
from tests.link.federation import free_port


@pytest.fixture
def place(tmp_path: Path) -> Place:
    places = enroll_parties(tmp_path)
    settings = EnrolmentSettings(listen=f"127.0.0.1:{free_port()}")
    return find_place(LinkSettings(identity=str(places["server"])), settings, tmp_path)


def test_a_code_names_the_first_host_of_the_certificate_and_the_port_unless_given(place: Place) -> None:
    port = place.settings.listen.rpartition(":")[2]
    code = invite(place, name="anna", org="a", hours=1)
    assert (code.address, code.server) == (f"localhost:{port}", "localhost:9000")
    assert invite(place, name="anna", org="a", hours=1, server="localhost:443").server == "localhost:443"
    assert invite(place, name="anna", org="a", hours=1, address="127.0.0.1:443").address == "127.0.0.1:443"
    assert replace(place, settings=EnrolmentSettings()).address == "localhost:9001"
    assert replace(place, settings=EnrolmentSettings(address="localhost:8")).address == "localhost:8"
    assert place.folder.stat().st_mode & 0o077 == 0


def test_a_new_code_lets_keys_ask_again_that_were_rejected_and_keeps_what_was_signed(place: Place) -> None:
    for name, bundle in (("anna", b""), ("bob", b"{}")):
        write_answer(place.queue, name, Answer("0" * 64, bundle))
        invite(place, name=name, org="a", hours=1)
    assert [path.name for path in place.queue.iterdir()] == ["bob.answer.json"]


@pytest.mark.parametrize(
    ("name", "org", "address", "match"),
    [
        ("anna", "a", "other:9001", "a host of this server's certificate"),
        ("anna", "a", "localhost", "HOST:PORT"),
        ("site-a", "b", "", "site-a, client of org-site-a"),
        ("server", "org-server", "", "server, coordinator of"),
        ("../up", "a", "", "--name"),
    ],
)
def test_what_could_never_be_enrolled_is_refused_at_once(
    place: Place, name: str, org: str, address: str, match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        invite(place, name=name, org=org, hours=1, address=address)
    assert not list(place.folder.glob("invitations/*"))


def test_without_an_address_nothing_listens_and_nothing_is_written_until_a_request_comes(place: Place) -> None:
    place = replace(place, settings=EnrolmentSettings())
    roster = RosterFile(place.identity.folder / "roster", place.identity.root)
    with serving(place, roster, lambda kind, **fields: None) as desk:
        assert not desk.queue.exists()
    assert not place.folder.exists()


def test_a_service_without_a_run_keeps_an_audit_log_and_is_the_only_one(place: Place, tmp_path: Path) -> None:
    code = invite(place, name="anna", org="a", hours=1)
    begun, over = threading.Event(), threading.Event()

    def record(kind: str, **fields: int | str) -> None:
        if kind == "enrolment":
            begun.set()

    thread = threading.Thread(target=lambda: serve_alone(place, record=record, until=over.wait))
    thread.start()
    try:
        assert begun.wait(30)
        with pytest.raises(StoreError, match="no other process writes it"):
            serve_alone(place, record=record, until=over.wait, listen=f"127.0.0.1:{free_port()}")
        with pytest.raises(ConfigError, match="free"):
            serve_alone(place, record=record, until=over.wait)
        assert enrol(code, tmp_path / "a", wait=lambda seconds: False, now=time.time) is None
    finally:
        over.set()
        thread.join()
    kinds = [entry.kind for entry in read_audit_log(place.folder / "audit").entries]
    assert kinds == ["enrolment", "queued"]
    assert load_identity(place.identity.folder, role="coordinator", now=int(time.time())).name == "server"
