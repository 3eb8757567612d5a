from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.errors import ConfigError, StoreError, WireError
from fedtune.link.pki import authority, certificates, enrollment, registrar, roster
from fedtune.link.pki.delegation import STRIDE
from fedtune.link.pki.identity import load_identity
from fedtune.store.lock import lock_run
from tests.link.ceremony import enroll_parties
from tests.link.pki.registry import DAY_S, NOW, Registry, make_registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return make_registry(tmp_path)


def install(registry: Registry) -> roster.Roster:
    return registrar.install_roster(registry.server.folder, (registry.ca / "roster").read_bytes(), now=NOW)


def test_a_renewed_client_installs_its_certificate_and_loads_with_it(registry: Registry) -> None:
    folder = registry.places["site-a"]
    accepted = enrollment.accept_bundle(folder, registry.renew(), now=NOW)
    assert accepted.not_after == NOW + 14 * DAY_S
    assert load_identity(folder, role="client", now=NOW).serial == accepted.serial
    assert accepted.ca == registry.server.ca
    assert not certificates.is_issued_by(accepted.certificate, accepted.ca)
    later = enrollment.accept_bundle(folder, registry.renew(now=NOW + DAY_S), now=NOW + DAY_S)
    assert later.not_after == accepted.not_after + DAY_S


def test_a_certificate_ends_with_the_delegation_at_the_latest(registry: Registry) -> None:
    now = NOW + 25 * DAY_S
    accepted = enrollment.accept_bundle(registry.places["site-a"], registry.renew(now=now), now=now)
    assert accepted.not_after == NOW + 30 * DAY_S


@pytest.mark.guarantee("G6")
def test_a_registrar_signs_for_active_clients_with_their_own_keys_alone(registry: Registry) -> None:
    own = registry.registrar

    def refused(request: enrollment.Request, statement: bytes) -> None:
        with pytest.raises(WireError, match="expected"):
            registrar.issue(own, registry.data, registry.server.root, request, statement, now=NOW)

    request, statement = registry.ask("site-a")
    refused(replace(request, name="eve"), statement)
    refused(replace(request, org="other"), statement)
    refused(replace(request, role="auditor"), statement)
    refused(replace(request, key=registry.server.public), statement)
    refused(request, registry.ask("site-b")[1])
    refused(request, registry.ask("site-a", until=NOW + DAY_S)[1])
    refused(replace(request, csr=certificates.csr(certificates.new_tls_key(), "site-a")), statement)
    server = enrollment.make_request(
        registry.server.folder, name="server", org="org-server", role="coordinator", hosts=("localhost",)
    )
    refused(enrollment.read_request(server), statement)
    authority.revoke(registry.ca, "site-a", now=NOW)
    install(registry)
    with pytest.raises(WireError, match="an active client"):
        registry.renew()


def test_the_roster_is_extended_in_time_and_never_beyond_the_delegation(registry: Registry) -> None:
    folder, own = registry.server.folder, registry.registrar
    assert not registrar.extend_roster(folder, own, now=NOW)
    assert registry.roster.valid_until == NOW + 30 * DAY_S
    short = replace(own.delegation, not_after=NOW + 60 * DAY_S)
    authority.delegate(registry.ca, short, now=NOW)
    install(registry)
    now = NOW + 21 * DAY_S
    assert registrar.extend_roster(folder, registry.registrar, now=now)
    assert registry.roster.valid_until == now + 14 * DAY_S
    assert not registrar.extend_roster(folder, registry.registrar, now=now)
    late = NOW + 55 * DAY_S
    assert registrar.extend_roster(folder, registry.registrar, now=late)
    assert registry.roster.valid_until == NOW + 60 * DAY_S


def test_a_newer_roster_of_the_root_keeps_the_renewals_that_still_may_count(registry: Registry) -> None:
    registry.renew("site-a")
    registry.renew("site-b")
    before = registry.roster
    authority.revoke(registry.ca, "site-b", now=NOW)
    after = install(registry)
    assert after.version == 2 * STRIDE + 1
    assert after.parties["site-a"].renewed == before.parties["site-a"].renewed
    assert after.parties["site-b"].renewed == ()
    # Again the same file, as a queue that is carried twice: nothing changes.
    assert install(registry) == after
    authority.delegate(registry.ca, None, now=NOW)
    ended = install(registry)
    assert ended.parties["site-a"].renewed == ()
    assert registrar.load_registrar(registry.server.folder, ended) is None


@pytest.mark.guarantee("G6")
def test_an_older_roster_is_not_adopted(registry: Registry) -> None:
    older = (registry.ca / "roster").read_bytes()
    authority.revoke(registry.ca, "site-b", now=NOW)
    registry.renew("site-a")
    newest = install(registry)
    with pytest.raises(WireError, match="expected version"):
        registrar.install_roster(registry.server.folder, older, now=NOW)
    assert registry.roster == newest


def test_versions_that_a_thief_has_used_up_are_said_and_end_with_the_root_s_next_roster(registry: Registry) -> None:
    registry.renew()
    used = registry.forge(lambda one: replace(one, version=2 * STRIDE - 1))
    registry.file.write_bytes(used)
    with pytest.raises(WireError, match="expected a version that is free"):
        registry.renew()
    assert registry.data == used
    authority.renew(registry.ca, now=NOW)
    assert install(registry).version == 2 * STRIDE + 1
    registry.renew()


def test_two_writers_do_not_drop_each_other_s_renewals(registry: Registry) -> None:
    before = registry.data
    with lock_run(registry.server.folder), pytest.raises(StoreError, match="no other process"):
        registry.renew()
    assert registry.data == before


@pytest.mark.guarantee("G6")
def test_a_delegation_is_asked_for_by_an_active_coordinator_and_bounded(tmp_path: Path) -> None:
    places = enroll_parties(tmp_path, now=NOW)
    known = authority.current_roster(places["ca"])
    server = load_identity(places["server"], role="coordinator", now=NOW)
    client = load_identity(places["site-a"], role="client", now=NOW)
    data = registrar.ask(server, now=NOW)
    assert registrar.ask(server, now=NOW + 5) != b""
    name, delegation = registrar.read_ask(data, known, days=7, now=NOW)
    assert (name, delegation.not_after) == ("server", NOW + 7 * DAY_S)
    for days in (0, 93):
        with pytest.raises(ConfigError, match="--days: expected 1 to 92"):
            registrar.read_ask(data, known, days=days, now=NOW)
    for bad in (b"{}", data[:-40], registrar.ask(client, now=NOW), registrar.ask(replace(server, name="x"), now=NOW)):
        with pytest.raises(WireError, match="registrar"):
            registrar.read_ask(bad, known, days=7, now=NOW)
    authority.revoke(places["ca"], "server", now=NOW)
    with pytest.raises(WireError, match="an active coordinator"):
        registrar.read_ask(data, authority.current_roster(places["ca"]), days=7, now=NOW)


def test_keys_of_a_registrar_are_its_owner_s_and_others_are_not_used(registry: Registry) -> None:
    folder = registry.server.folder
    assert all((folder / name).stat().st_mode & 0o077 == 0 for name in (registrar.SIGN_KEY, registrar.CA_KEY))
    (folder / registrar.CA_KEY).chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        registrar.load_registrar(folder, registry.roster)
    (folder / registrar.CA_KEY).chmod(0o600)
    for name in (registrar.SIGN_KEY, registrar.CA_KEY, registrar.OWN_CA):
        (folder / name).unlink()
    registrar.ask(registry.server, now=NOW)
    assert registrar.load_registrar(folder, registry.roster) is None
