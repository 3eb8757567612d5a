"""Certificates that are renewed while sites work, by the CA's queue or by a registrar; and what a stolen key can do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from fedtune.link.client import outbox
from fedtune.link.client.channel import dial
from fedtune.link.pki import authority, certificates, registrar
from fedtune.link.pki.enrollment import accept_bundle
from fedtune.link.pki.identity import Identity, load_identity
from fedtune.link.pki.queue_signing import sign_queue
from fedtune.link.server.assignments import ReceivedParts
from fedtune.link.settings import JoinSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.link_server import LinkServer, greeting, run_link_server
from tests.link.site import RecordingTrainer, collect_one, post, run_site, until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.link.client.client.WATCH_S", 0.05)
    for name in ("RETRY_S", "LATER_S"):
        monkeypatch.setattr(f"fedtune.link.client.renewal.{name}", 0.05)


@pytest.fixture(params=["by the queue", "by a registrar"])
def link(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LinkServer]:
    """Serve sites whose certificates are past two thirds of their life."""
    days = 0 if request.param == "by the queue" else 30
    with run_link_server(tmp_path, days=15, passed_days=11, registrar_days=days) as server:
        yield server


def test_a_site_that_trains_takes_its_next_certificate_and_loses_nothing(link: LinkServer) -> None:
    before = link.identities["site-a"]
    with run_site(link, trainer=RecordingTrainer()) as running:
        message_id = post(link)
        until(link, lambda: any(job.training for job in running.client._jobs.values()))
        waiting = link.desk.queue / "site-a.request.json"
        until(link, lambda: waiting.exists() or "redial" in running.kinds())
        if waiting.exists():
            signed = sign_queue(link.places["ca"], link.desk.queue, lambda one: "leave", days=90, now=int(time.time()))
            assert [one.outcome for one in signed] == ["renewed"]
            link.desk.look()
        until(link, lambda: "redial" in running.kinds())
        running.trainer.gate.set()
        result = collect_one(link, message_id)
        assert isinstance(result, ReceivedParts), result
        link.dispatcher.settle("site-a", 1, None)
        until(link, lambda: "receipt" in running.kinds())
        assert len(running.trainer.done) == 1
        assert not {"failed", "refused"} & set(running.kinds())
        (entry,) = outbox.load_entries(running.state, link.dispatcher.run.run)
        assert entry.receipt() is not None
    after = load_identity(before.folder, role="client", now=int(time.time()))
    assert after.not_after > before.not_after
    assert running.kinds().count("redial") == 1


@pytest.fixture
def delegated(tmp_path: Path) -> Iterator[LinkServer]:
    with run_link_server(tmp_path, days=9, registrar_days=30) as server:
        yield server


def stolen(link: LinkServer) -> registrar.Registrar:
    server = link.identities["server"]
    own = registrar.load_registrar(server.folder, link.desk._roster.refresh())
    assert own is not None
    return own


def forge(link: LinkServer, folder: Path, *, serial: str = "", server: bool = False) -> Identity:
    """Return site-a with a certificate that a thief of the registrar's keys has made for a key of its own."""
    own, key, anna = stolen(link), certificates.new_tls_key(), link.identities["site-a"]
    with pytest.MonkeyPatch.context() as patch:
        if serial:
            patch.setattr("cryptography.x509.random_serial_number", lambda: int(serial, 16))
        pem = certificates.issue_certificate(
            key.public_key(), "spiffe://care/org-site-a/site-a", hosts=("localhost",) if server else (), server=server,
            days=9, ca=own.delegation.ca, ca_key=own.ca_key, now=int(time.time()),
        )  # fmt: skip
    folder.mkdir()
    number = certificates.serial_number(pem)
    return Identity(
        folder, anna.name, anna.org, anna.role, anna.federation, anna.key, anna.public, certificates.pem_of(key), pem,
        anna.ca, anna.root, number, anna.not_before, anna.not_after,
    )  # fmt: skip


def hello(link: LinkServer, identity: Identity, port: int = 0) -> pb.HelloReply:
    calls = dial(identity, JoinSettings(f"localhost:{port or link.port}"))
    try:
        return greeting(calls)
    finally:
        calls.close()


@pytest.mark.guarantee("G6")
def test_a_thief_of_the_registrar_s_keys_is_taken_for_no_client(delegated: LinkServer, tmp_path: Path) -> None:
    plain = hello(delegated, forge(delegated, tmp_path / "one"))
    assert plain.refusal.reason == pb.SERIAL_UNKNOWN
    # With the number of the certificate that the CA has issued, and with that of one that the registrar has.
    number = delegated.identities["site-a"].serial
    assert hello(delegated, forge(delegated, tmp_path / "two", serial=number)).refusal.reason == pb.SERIAL_UNKNOWN
    renewed = renew(delegated)
    assert not hello(delegated, renewed).HasField("refusal")
    forged = forge(delegated, tmp_path / "three", serial=renewed.serial)
    assert hello(delegated, forged).refusal.reason == pb.SERIAL_UNKNOWN


@pytest.mark.guarantee("G6")
def test_a_thief_of_the_registrar_s_keys_is_taken_for_no_server(delegated: LinkServer, tmp_path: Path) -> None:
    forged = forge(delegated, tmp_path / "one", server=True)
    assert certificates.hosts_of(forged.certificate) == ("localhost",)
    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    pair = [(forged.tls_key, forged.certificate)]
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair))
    server.start()
    try:
        with pytest.raises(grpc.RpcError) as caught:
            hello(delegated, delegated.identities["site-a"], port)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        server.stop(None)


def renew(link: LinkServer, name: str = "site-a") -> Identity:
    """Have the registrar renew a client over the link, and install that."""
    from fedtune.link.pki.delegation import make_statement
    from fedtune.link.pki.enrollment import make_request

    own = link.identities[name]
    data = make_request(own.folder, name=name, org=own.org, role="client")
    until = int(time.time()) + 92 * 86_400
    statement = make_statement(own.key, "care", name, certificates.key_digest(own.certificate), until)
    reply = link.calls(name).renew(pb.RenewRequest(request=data, statement=statement), timeout=20)
    return accept_bundle(own.folder, reply.bundle, now=int(time.time()))


@pytest.mark.guarantee("G6")
def test_a_delegation_that_the_root_ends_is_over_with_the_next_roster(delegated: LinkServer) -> None:
    renewed = renew(delegated)
    assert not hello(delegated, renewed).HasField("refusal")
    server = delegated.identities["server"]
    authority.delegate(delegated.places["ca"], None, now=int(time.time()))
    data = (delegated.places["ca"] / "roster").read_bytes()
    registrar.install_roster(server.folder, data, now=int(time.time()))
    delegated.clock.now += 2
    # What was issued before does not open a connection any more; the certificate of the CA still does.
    with pytest.raises(grpc.RpcError):
        hello(delegated, renewed)
    assert not hello(delegated, delegated.identities["site-a"]).HasField("refusal")


@pytest.mark.guarantee("G6")
def test_a_client_cannot_have_another_one_renewed(delegated: LinkServer) -> None:
    from fedtune.link.pki.enrollment import make_request

    other = delegated.identities["site-b"]
    data = make_request(other.folder, name="site-b", org=other.org, role="client")
    reply = delegated.calls("site-a").renew(pb.RenewRequest(request=data), timeout=20)
    assert reply.refusal.reason == pb.REQUEST_DIFFERS
    own = delegated.identities["site-a"]
    data = make_request(own.folder, name="site-a", org=own.org, role="client")
    for statement in (b"", b"{}"):
        reply = delegated.calls("site-a").renew(pb.RenewRequest(request=data, statement=statement), timeout=20)
        assert reply.refusal.reason == pb.REQUEST_DIFFERS
