from __future__ import annotations

import stat
from pathlib import Path

import pytest

from fedtune.errors import ConfigError, WireError
from fedtune.link.pki import authority, certificates, enrollment

NOW = 1_800_000_000


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    authority.create_authority(tmp_path / "ca", "care", now=NOW)
    return tmp_path / "ca"


def request(folder: Path, name: str = "anna", **changes: object) -> bytes:
    given = {"name": name, "org": "a", "role": "client", "hosts": (), **changes}
    return enrollment.make_request(folder / name, **given)  # type: ignore[arg-type]


def test_the_keys_of_a_ca_are_for_their_owner_alone(ca: Path) -> None:
    assert stat.S_IMODE(ca.stat().st_mode) == 0o700
    assert {stat.S_IMODE((ca / name).stat().st_mode) for name in ("ca.key", "roster.key")} == {0o600}
    assert authority.current_roster(ca).parties == {}


def test_a_folder_that_holds_something_is_left_alone(ca: Path) -> None:
    with pytest.raises(ConfigError, match="new or an empty folder"):
        authority.create_authority(ca, "other", now=NOW)
    with pytest.raises(ConfigError, match="federation"):
        authority.create_authority(ca.parent / "new", "../up", now=NOW)


def test_every_change_gives_the_roster_a_new_version(ca: Path, tmp_path: Path) -> None:
    versions = [authority.current_roster(ca).version]
    authority.sign_request(ca, request(tmp_path), now=NOW)
    versions.append(authority.current_roster(ca).version)
    versions.append(authority.revoke(ca, "anna", now=NOW).version)
    versions.append(authority.renew(ca, days=60, now=NOW).version)
    assert versions == [1, 2, 3, 4]
    assert authority.current_roster(ca).valid_until == NOW + 60 * 86_400


def test_the_same_key_gets_a_further_certificate_and_the_last_two_count(ca: Path, tmp_path: Path) -> None:
    data = request(tmp_path)
    for count in (1, 2, 2):
        authority.sign_request(ca, data, now=NOW)
        assert len(authority.current_roster(ca).parties["anna"].serials) == count
    authority.sign_request(ca, data, replace=True, now=NOW)  # a stolen TLS key: its certificates end
    assert len(authority.current_roster(ca).parties["anna"].serials) == 1


def test_another_key_under_a_known_name_needs_replace(ca: Path, tmp_path: Path) -> None:
    authority.sign_request(ca, request(tmp_path), now=NOW)
    other = request(tmp_path / "other")
    with pytest.raises(ConfigError, match="--replace"):
        authority.sign_request(ca, other, now=NOW)
    authority.sign_request(ca, other, replace=True, now=NOW)
    assert len(authority.current_roster(ca).parties["anna"].serials) == 1


def test_another_role_or_organisation_needs_replace_and_ends_the_old_certificates(ca: Path, tmp_path: Path) -> None:
    authority.sign_request(ca, request(tmp_path), now=NOW)
    for changes in ({"role": "auditor"}, {"org": "b"}):
        with pytest.raises(ConfigError, match="anna as client of a"):
            authority.sign_request(ca, request(tmp_path, **changes), now=NOW)
    authority.sign_request(ca, request(tmp_path, role="auditor"), replace=True, now=NOW)
    member = authority.current_roster(ca).parties["anna"]
    assert (member.role, len(member.serials)) == ("auditor", 1)


@pytest.mark.parametrize("revoked", [False, True])
def test_one_key_has_one_name_even_after_it_was_taken_out(ca: Path, tmp_path: Path, revoked: bool) -> None:
    authority.sign_request(ca, request(tmp_path), now=NOW)
    if revoked:
        authority.revoke(ca, "anna", now=NOW)
    again = enrollment.make_request(tmp_path / "anna", name="bob", org="a", role="client")
    for replace in (False, True):
        with pytest.raises(ConfigError, match="the one of anna"):
            authority.sign_request(ca, again, replace=replace, now=NOW)


@pytest.mark.parametrize("name", ["roster.pub", "roster.key", "ca.key"])
def test_keys_of_a_ca_that_cannot_be_used_are_named(ca: Path, tmp_path: Path, name: str) -> None:
    (ca / name).write_text("nonsense")
    with pytest.raises(ConfigError, match="keys in"):
        authority.sign_request(ca, request(tmp_path), now=NOW)


def test_a_revoked_party_has_no_certificate_and_comes_back_only_with_replace(ca: Path, tmp_path: Path) -> None:
    data = request(tmp_path)
    authority.sign_request(ca, data, now=NOW)
    gone = authority.revoke(ca, "anna", now=NOW).parties["anna"]
    assert (gone.state, gone.serials) == ("revoked", ())
    with pytest.raises(ConfigError, match="revoked"):
        authority.sign_request(ca, data, now=NOW)
    authority.sign_request(ca, data, replace=True, now=NOW)
    assert authority.current_roster(ca).parties["anna"].state == "active"


def test_what_must_not_be_signed_is_refused(ca: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="397"):
        authority.sign_request(ca, request(tmp_path), days=398, now=NOW)
    with pytest.raises(ConfigError, match="a party"):
        authority.revoke(ca, "nobody", now=NOW)
    with pytest.raises(WireError):
        authority.sign_request(ca, b"{}", now=NOW)
    with pytest.raises(ConfigError, match="fedtune ca init"):
        authority.current_roster(tmp_path / "none")
    assert authority.current_roster(ca).version == 1


def test_a_key_that_others_can_read_signs_nothing(ca: Path, tmp_path: Path) -> None:
    (ca / "ca.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        authority.sign_request(ca, request(tmp_path), now=NOW)


def test_hosts_stand_in_the_certificate_of_a_coordinator_alone(ca: Path, tmp_path: Path) -> None:
    import json

    from cryptography import x509

    hosts = ("fl.example.org", "10.0.0.1")
    names = []
    for name, role in (("server", "coordinator"), ("anna", "client")):
        data = request(tmp_path, name, role=role, hosts=hosts)
        pem = json.loads(authority.sign_request(ca, data, now=NOW))["certificate"].encode()
        result = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names.append([str(one.value) for one in result.value])
        assert certificates.spiffe_parts(pem) == ("care", "a", name)
    assert names == [["spiffe://care/a/server", "fl.example.org", "10.0.0.1"], ["spiffe://care/a/anna"]]
