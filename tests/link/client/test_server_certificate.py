"""The server's certificate: proven by its coordinator with each hello, and looked at as long as a connection lasts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import ConfigError
from fedtune.link.client.server_certificate import ServerCertificate, certificate_fault, verify_proof
from fedtune.link.pki import authority, certificates, enrollment, roster
from fedtune.link.pki.roster import SKEW_S, Party, Roster, find_party
from fedtune.link.rejections import RejectionError
from fedtune.link.server.run_info import RunInfo
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import copy_roster, enroll_parties
from tests.link.harness import Clock
from tests.link.link_server import LinkServer
from tests.link.site import END_S, run_site, until

DAY_S = 86_400
SERVER = ServerCertificate("server", "ab", 1000, 1000 + 90 * DAY_S)
PARTY = Party("server", "org", "coordinator", b"k" * 32, ("ab", "cd"), 1000, 1000 + 180 * DAY_S)


@pytest.mark.guarantee("G6")
@pytest.mark.parametrize(
    ("now", "party", "fault"),
    [
        (2000, {}, ""),
        (1000 - SKEW_S, {}, ""),  # a clock that is behind by an hour
        (1000 + 90 * DAY_S, {}, ""),
        (1001 + 90 * DAY_S, {}, "the certificate of server ended on 1970-04-01 00:16 UTC"),
        (999 - SKEW_S, {}, "the certificate of server begins on"),
        (2000, {"not_after": 1999}, "the time of server in the roster ended on"),
        (2000, {"serials": ("cd",)}, "has replaced the certificate of server"),
        (2000, {"state": "revoked"}, "no active coordinator"),
        (2000, {"role": "client"}, "no active coordinator"),
        (2000, {"name": "other"}, "no active coordinator"),
    ],
)
def test_a_connection_ends_by_the_dates_and_by_the_roster(now: int, party: dict[str, Any], fault: str) -> None:
    entry = replace(PARTY, **party)
    text = certificate_fault(SERVER, Roster("care", 1, 2**40, {entry.name: entry}), now=now)
    assert fault in text
    assert bool(text) == bool(fault)


@pytest.mark.guarantee("G6")
def test_a_proof_is_of_this_hello_by_the_coordinator_and_names_its_own_certificate(
    link: LinkServer, tmp_path: Path
) -> None:
    site, own = link.identities["site-a"], link.identities["server"]
    run, known = link.dispatcher.run, authority.current_roster(link.places["ca"])
    stranger = (enroll_parties(tmp_path / "other")["server"] / "tls.crt").read_bytes()

    def proven(
        signer: RunInfo = run,
        *,
        to: str = "site-a",
        nonce: int = 7,
        epoch: int = 3,
        certificate: bytes = own.certificate,
        shown: bytes = b"",
    ) -> ServerCertificate:
        proof = signer.prove(to, nonce=nonce, epoch=epoch, certificate=certificate)
        reply = pb.HelloReply(epoch=3, certificate=shown or certificate, proof=proof)
        return verify_proof(reply, site, 7, lambda key: find_party(known, key))

    assert proven() == ServerCertificate("server", own.serial, own.not_before, own.not_after)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("nonce", {"nonce": 8}),  # what was signed for an earlier hello
        ("epoch", {"epoch": 4}),
        ("to", {"to": "site-b"}),  # what a member was given, and passes on
        ("KEY_UNKNOWN|SIGNATURE|KIND|to|AUTHOR", {"signer": replace(run, key=link.identities["site-b"].key)}),
        ("DIGEST", {"shown": site.certificate}),
        ("SERIAL_UNKNOWN", {"certificate": site.certificate}),
        ("SERIAL_UNKNOWN", {"certificate": b"none"}),
        ("SERIAL_UNKNOWN", {"certificate": stranger}),  # of another CA, for the same name
    ]
    for match, changes in wrong:
        with pytest.raises(RejectionError, match=match):
            proven(**changes)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.link.client.client.WATCH_S", 0.02)
    monkeypatch.setattr("fedtune.link.client.backoff.SERVER_PAUSE_S", 0.05)


def resign(link: LinkServer, **members: Any) -> None:
    """Sign a roster with another entry for the server, and install it there."""
    ca, current = link.places["ca"], authority.current_roster(link.places["ca"])
    root = certificates.load_signing_key((ca / "roster.key").read_bytes())
    parties = {**current.parties, "server": replace(current.parties["server"], **members)}
    changed = replace(current, version=current.version + 1, valid_until=int(link.time.now) + 200 * DAY_S)
    (ca / "roster").write_bytes(roster.encode(replace(changed, parties=parties), root))
    copy_roster(ca, link.places, to=["server"])
    link.clock.now += 2


@pytest.mark.guarantee("G6")
@pytest.mark.usefixtures("quick")
def test_a_server_whose_certificate_ends_is_left_and_taken_again_when_it_is_valid(link: LinkServer) -> None:
    resign(link)  # valid for longer than certificates
    clock = Clock(link.time.now)
    with run_site(link, now=clock) as running:
        until(link, lambda: "hello" in running.kinds())
        clock.now += 91 * DAY_S
        until(link, lambda: "redial" in running.kinds() and "refused" in running.kinds())
        (reason,) = {fields["reason"] for kind, fields in running.events if kind == "redial"}
        assert reason.startswith("the certificate of server ended on ")
        before = running.kinds().count("hello")
        clock.now -= 91 * DAY_S
        until(link, lambda: running.kinds().count("hello") > before)
        assert running.thread.is_alive()


@pytest.mark.guarantee("G6")
@pytest.mark.usefixtures("quick")
def test_a_server_certificate_that_the_roster_has_replaced_ends_the_connection(link: LinkServer) -> None:
    with run_site(link) as running:
        until(link, lambda: "hello" in running.kinds())
        resign(link, serials=("abc",))
        until(link, lambda: "redial" in running.kinds() and "refused" in running.kinds())
        texts = [str(fields["reason"]) for kind, fields in running.events if kind in ("redial", "refused")]
        assert all("has replaced the certificate of server" in text for text in texts)
        before = running.kinds().count("hello")
        resign(link, serials=("abc", link.identities["server"].serial))
        until(link, lambda: running.kinds().count("hello") > before)


@pytest.mark.guarantee("G6")
def test_a_server_that_proves_nothing_is_none(link: LinkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunInfo, "prove", lambda run, client, **said: None)
    with run_site(link) as running:
        running.thread.join(END_S)
        (error,) = running.ended
        assert isinstance(error, ConfigError)
        assert "a server that proves who it is" in str(error)


@pytest.mark.usefixtures("quick")
def test_a_site_takes_its_own_renewed_certificate_without_a_restart(link: LinkServer) -> None:
    with run_site(link) as running:
        until(link, lambda: "hello" in running.kinds())
        now, place = int(link.time.now), link.places["site-a"]
        request = enrollment.make_request(place, name="site-a", org="org-site-a", role="client", hosts=())
        bundle = authority.sign_request(link.places["ca"], request, now=now)
        # First the server, which else refuses the new certificate if the site is quick.
        copy_roster(link.places["ca"], link.places, to=["server"])
        link.clock.now += 2
        enrollment.accept_bundle(place, bundle, now=now)
        until(link, lambda: "redial" in running.kinds() and running.kinds().count("hello") > 1)
        assert running.client._identity.serial != link.identities["site-a"].serial
