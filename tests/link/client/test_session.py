"""The hello: what a client accepts from its server, and what it does not."""

from __future__ import annotations

from pathlib import Path

from fedtune.link.pki import authority
from fedtune.link.pki.signing import key_id
from tests.link.ceremony import copy_roster
from tests.link.link_server import LinkServer, run_link_server
from tests.link.site import END_S, run_site, until


def test_a_newer_roster_comes_with_the_hello(link: LinkServer) -> None:
    authority.renew(link.places["ca"], now=int(link.time.now))
    copy_roster(link.places["ca"], link.places, to=["server"])
    link.clock.now += 2
    with run_site(link) as running:
        until(link, lambda: "roster" in running.kinds())
    assert (link.places["site-a"] / "roster").read_bytes() == (link.places["ca"] / "roster").read_bytes()


def test_a_run_whose_number_is_a_path_is_refused(tmp_path: Path) -> None:
    with run_link_server(tmp_path, run="../../../somewhere") as link, run_site(link) as running:
        running.thread.join(END_S)
        (error,) = running.ended
        assert "16 hex digits" in str(error)
        assert not list(running.state.glob("**/recipe.toml"))


def test_a_roster_that_the_ca_did_not_sign_is_not_installed(link: LinkServer) -> None:
    before = (link.places["site-a"] / "roster").read_bytes()
    with run_site(link) as running:
        until(link, lambda: "hello" in running.kinds())
        session = running.client._session
        session._install_roster(before.replace(b'"sig":"', b'"sig":"A'))
        assert dict(running.events)["refused"]["code"] == "ROSTER"
    assert (link.places["site-a"] / "roster").read_bytes() == before


def test_only_the_coordinators_key_is_taken_and_none_after_the_roster_has_expired(link: LinkServer) -> None:
    with run_site(link) as running:
        session = running.client._session
        server, client = (key_id(link.identities[name].public) for name in ("server", "site-b"))
        party = session.find_coordinator(server)
        assert party is not None
        assert party.name == "server"
        assert session.find_coordinator(client) is None
        session._now = lambda: 2.0**40
        assert session.find_coordinator(server) is None


def test_a_client_whose_roster_has_expired_joins_with_the_newer_one_of_the_server(link: LinkServer) -> None:
    authority.renew(link.places["ca"], days=60, now=int(link.time.now))
    copy_roster(link.places["ca"], link.places, to=["server"])
    link.clock.now += 2
    link.time.now += 31 * 86400.0
    with run_site(link, now=lambda: link.time.now) as running:
        until(link, lambda: "hello" in running.kinds() or bool(running.ended))
        assert "hello" in running.kinds()
