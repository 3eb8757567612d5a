"""What a registrar's signature can say, and what every reader of a roster refuses although its key has signed it."""

from __future__ import annotations

import json
from base64 import b64decode
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.errors import WireError
from fedtune.link.pki import authority, certificates, roster
from fedtune.link.pki.delegation import (
    STATEMENT,
    STRIDE,
    Renewals,
    Renewed,
    make_statement,
    newest_first,
    read_statement,
    statement_payload,
)
from fedtune.link.pki.identity import load_identity
from fedtune.link.pki.roster import Party, Roster, check_successor
from fedtune.link.pki.signing import sign
from tests.link.ceremony import enroll_parties
from tests.link.pki.registry import DAY_S, NOW, Registry, make_registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = make_registry(tmp_path)
    registry.renew()
    return registry


def refused(registry: Registry, data: bytes, match: str = "roster") -> None:
    with pytest.raises(WireError, match=match):
        roster.decode(data, registry.server.root)


def test_a_roster_without_a_registrar_has_the_bytes_that_every_release_reads(tmp_path: Path) -> None:
    places = enroll_parties(tmp_path, now=NOW)
    signed = json.loads((places["server"] / "roster").read_bytes())
    assert set(signed) == {"payload", "payloadType", "signatures"}
    assert set(json.loads(b64decode(signed["payload"]))) == {"federation", "version", "valid_until", "members"}


def test_a_renewal_adds_a_certificate_and_changes_nothing_else(registry: Registry) -> None:
    base, now = authority.current_roster(registry.ca), registry.roster
    party = now.parties["site-a"]
    (entry,) = party.renewed
    assert replace(party, renewed=()) == base.parties["site-a"]
    assert {name: one for name, one in now.parties.items() if name != "site-a"} == {
        name: one for name, one in base.parties.items() if name != "site-a"
    }
    assert (now.version, now.valid_until) == (base.version + 1, base.valid_until)
    assert entry.not_after == NOW + 14 * DAY_S
    assert base.version == STRIDE


@pytest.mark.guarantee("G6")
def test_a_thief_of_the_registrar_s_key_can_name_no_other_party_and_no_key_of_its_own(registry: Registry) -> None:
    own = load_identity(registry.places["site-b"], role="client", now=NOW)
    thief = certificates.new_tls_key()
    pem = certificates.issue_certificate(
        thief.public_key(), "spiffe://care/org-site-a/site-a", hosts=(), server=False, days=9,
        ca=registry.registrar.delegation.ca, ca_key=registry.registrar.ca_key, now=NOW,
    )  # fmt: skip
    stolen = certificates.key_digest(pem)
    until = NOW + 20 * DAY_S
    by_other = sign(own.key, STATEMENT, statement_payload("care", "site-a", stolen, until))
    refused(registry, registry.forge_entry(tls_key=stolen), "a TLS key for which site-a has signed")
    refused(
        registry, registry.forge_entry(tls_key=stolen, until=until, signature=by_other), "for which site-a has signed"
    )
    refused(registry, registry.forge_entry(name="site-b"), "a TLS key for which site-b has signed")
    refused(registry, registry.forge_entry(name="eve"), "an active client of the roster; got 'eve', another party")
    refused(registry, registry.forge_entry(name="server"), "got 'server', coordinator")


@pytest.mark.guarantee("G6")
def test_nothing_that_a_registrar_signs_lasts_longer_than_its_delegation(registry: Registry) -> None:
    end = NOW + 30 * DAY_S
    assert roster.decode(registry.forge_entry(not_after=end), registry.server.root).parties["site-a"].not_after
    refused(registry, registry.forge_entry(not_after=end + 1), "an end within the delegation")
    refused(registry, registry.forge(lambda one: replace(one, valid_until=end + 1)), "an end within the delegation")
    # Nor longer than the client has signed for.
    refused(registry, registry.forge_entry(until=NOW + DAY_S), "an end within the delegation")
    refused(registry, registry.forge_entry(until=NOW + 60 * DAY_S), "for which site-a has signed")


@pytest.mark.guarantee("G6")
def test_an_expired_delegation_leaves_a_roster_that_has_expired(registry: Registry) -> None:
    data = registry.forge(lambda one: replace(one, version=one.version + 9, valid_until=NOW + 30 * DAY_S))
    newest = roster.decode(data, registry.server.root)
    assert check_successor(registry.roster, newest, now=NOW + 30 * DAY_S - 1) is newest
    with pytest.raises(WireError, match="expired"):
        check_successor(registry.roster, newest, now=NOW + 90 * DAY_S)


@pytest.mark.guarantee("G6")
def test_an_older_roster_of_the_root_never_replaces_a_newer_one(registry: Registry) -> None:
    older = registry.data
    authority.revoke(registry.ca, "site-a", now=NOW)
    newest = authority.current_roster(registry.ca)

    def last(before: Renewals) -> Renewals:
        return replace(before, version=2 * STRIDE - 1)

    highest = roster.decode(registry.forge(last), registry.server.root)
    assert highest.version < newest.version == 2 * STRIDE
    with pytest.raises(WireError, match="expected version"):
        check_successor(newest, highest, now=NOW)
    for version in (STRIDE, 2 * STRIDE, 2 * STRIDE + 1):
        forged = registry.forge(lambda one, version=version: replace(one, version=version))  # type: ignore[misc]
        refused(registry, forged, "expected a version after")
    # Beside another roster than the one that it was signed for.
    base = (registry.ca / "roster").read_bytes().decode()
    body = json.loads(older) | {"base": base}
    swapped = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    refused(registry, swapped, "expected those of the roster that they stand beside")


@pytest.mark.guarantee("G6")
def test_a_revoked_client_and_an_ended_delegation_are_not_renewed(registry: Registry) -> None:
    before = registry.data
    renewals = json.loads(before)["renewals"]
    authority.revoke(registry.ca, "site-a", now=NOW)
    registry.file.write_bytes((registry.ca / "roster").read_bytes())

    def again(one: Renewals) -> Renewals:
        entry = roster.decode(before, registry.server.root).parties["site-a"].renewed
        return replace(one, version=one.version + 1, entries=entry)

    refused(registry, registry.forge(again), "got 'site-a', client, revoked")
    authority.delegate(registry.ca, None, now=NOW)
    base = (registry.ca / "roster").read_bytes().decode()
    file = json.dumps({"base": base, "renewals": renewals}, sort_keys=True, separators=(",", ":")).encode()
    refused(registry, file, "for which it names no registrar")


@pytest.mark.parametrize("cut", [2, 40, 400])
def test_a_changed_file_is_refused(registry: Registry, cut: int) -> None:
    data = registry.data
    refused(registry, data[:-cut], "roster")
    refused(registry, data.replace(b'":"', b'": "', 1), "roster")
    middle = len(data) - cut
    refused(registry, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


def test_each_client_has_two_renewed_certificates_at_most(registry: Registry) -> None:
    for _ in range(3):
        registry.renew()
    serials = [entry.serial for entry in registry.roster.parties["site-a"].renewed]
    assert len(serials) == 2

    def more(one: Renewals) -> Renewals:
        return replace(one, entries=one.entries * 2)

    refused(registry, registry.forge(more), "at most 2 of site-a")
    entries = [Renewed("a", str(n), "k", 0, 0, b"") for n in range(3)]
    assert [one.serial for one in newest_first(entries[:2], entries[2], most=2)] == ["1", "2"]


def test_a_statement_is_of_one_key_one_client_and_one_federation(registry: Registry) -> None:
    own = load_identity(registry.places["site-a"], role="client", now=NOW)
    data = make_statement(own.key, "care", "site-a", "ab", NOW)
    assert read_statement(data, own.public, "care", "site-a", "ab")[0] == NOW
    for said in (("other", "site-a", "ab"), ("care", "site-b", "ab"), ("care", "site-a", "cd")):
        with pytest.raises(WireError, match="expected the TLS key of"):
            read_statement(data, own.public, *said)
    with pytest.raises(WireError, match="expected a signature"):
        read_statement(data, registry.server.public, "care", "site-a", "ab")


def test_a_roster_with_a_damaged_delegation_is_refused(registry: Registry) -> None:
    root = certificates.load_signing_key((registry.ca / "roster.key").read_bytes())
    known = authority.current_roster(registry.ca)
    assert known.delegation is not None
    for changes in ({"ca": b"none"}, {"key": b"short"}, {"not_after": -1}):
        delegation = replace(known.delegation, **changes)
        refused(registry, roster.encode(replace(known, delegation=delegation), root), "a key, a CA and a time")


def test_versions_go_on_by_one_where_there_is_no_registrar(tmp_path: Path) -> None:
    party = Party("anna", "a", "client", b"k" * 32, (), 0, 1)
    assert Roster("care", 1, 2, {"anna": party}).delegation is None
    authority.create_authority(tmp_path / "ca", "care", now=NOW)
    assert [authority.renew(tmp_path / "ca", now=NOW).version for _ in range(3)] == [2, 3, 4]
