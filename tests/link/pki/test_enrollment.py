from __future__ import annotations

import base64
import json
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.errors import ConfigError, WireError
from fedtune.link.pki import authority, enrollment
from tests.link.ceremony import enroll_parties

NOW = 1_800_000_000
SURROGATE = enrollment.bundle_json({"ca": "", "certificate": "\ud800", "roster": "", "root": ""})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("enrolment")


@pytest.fixture(scope="module")
def request_of_anna(folder: Path) -> bytes:
    return enrollment.make_request(folder / "anna", name="anna", org="a", role="client")


def test_keys_are_made_once_and_are_for_their_owner_alone(tmp_path: Path) -> None:
    place = tmp_path / "identity"
    enrollment.make_request(place, name="anna", org="a", role="client")
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    enrollment.make_request(place, name="anna", org="a", role="client")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert before.keys() == {"sign.key", "tls.key"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {0o600}


def test_a_request_says_who_asks_and_holds_no_secret(request_of_anna: bytes, folder: Path) -> None:
    asked = enrollment.read_request(request_of_anna)
    assert (asked.name, asked.org, asked.role, asked.hosts) == ("anna", "a", "client", ())
    for key in ("sign.key", "tls.key"):
        assert (folder / "anna" / key).read_bytes()[30:60] not in request_of_anna


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_any_changed_byte_of_a_request_is_found(request_of_anna: bytes, data: st.DataObject) -> None:
    spoilt = bytearray(request_of_anna)
    place = data.draw(st.integers(0, len(spoilt) - 1))
    spoilt[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireError):
        enrollment.read_request(bytes(spoilt))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "../anna"}, "name"),
        ({"org": ""}, "org"),
        ({"role": "root"}, "role"),
        ({"hosts": ("a b",)}, "host"),
        ({"role": "coordinator"}, "dial the server"),
        ({"hosts": ("localhost",) * 17}, "at most 16 hosts"),
    ],
)
def test_a_request_that_could_not_be_signed_is_not_made(tmp_path: Path, changes: dict[str, object], match: str) -> None:
    given = {"name": "anna", "org": "a", "role": "client", "hosts": (), **changes}
    with pytest.raises(ConfigError, match=match):
        enrollment.make_request(tmp_path, **given)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_for_the_folder_that_asked(tmp_path: Path) -> None:
    authority.create_authority(tmp_path / "ca", "care", now=NOW)
    bundles = {}
    for name in ("anna", "bob"):
        data = enrollment.make_request(tmp_path / name, name=name, org="a", role="client")
        bundles[name] = authority.sign_request(tmp_path / "ca", data, now=NOW)
    with pytest.raises(ConfigError, match="one of another"):
        enrollment.accept_bundle(tmp_path / "anna", bundles["bob"], now=NOW)
    result = enrollment.accept_bundle(tmp_path / "anna", bundles["anna"], now=NOW)
    assert (result.name, result.org, result.federation, result.role) == ("anna", "a", "care", "client")


@pytest.fixture(scope="module")
def bundle_of_anna(folder: Path, request_of_anna: bytes) -> bytes:
    authority.create_authority(folder / "ca", "care", now=NOW)
    return authority.sign_request(folder / "ca", request_of_anna, now=NOW)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_changed_byte_of_a_bundle_is_found(folder: Path, bundle_of_anna: bytes, data: st.DataObject) -> None:
    spoilt = bytearray(bundle_of_anna)
    place = data.draw(st.integers(0, len(spoilt) - 1))
    spoilt[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises((WireError, ConfigError)):
        enrollment.accept_bundle(folder / "anna", bytes(spoilt), now=NOW)
    assert {path.name for path in (folder / "anna").iterdir()} == {"sign.key", "tls.key"}


def test_bits_of_a_signature_that_do_not_count_are_changes_too(tmp_path: Path) -> None:
    authority.create_authority(tmp_path / "ca", "care", now=NOW)
    data = enrollment.make_request(tmp_path / "anna", name="anna", org="a", role="client")
    while True:  # until a signature ends on a bit that may be declared unused
        body = json.loads(authority.sign_request(tmp_path / "ca", data, now=NOW))
        result = x509.load_pem_x509_certificate(body["certificate"].encode())
        if not result.signature[-1] & 1:
            break
    der = result.public_bytes(Encoding.DER)
    at = len(der) - len(result.signature) - 1
    text = base64.b64encode(der[:at] + b"\1" + der[at + 1 :]).decode()
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    body["certificate"] = "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""])
    with pytest.raises(WireError, match="as the CA wrote them"):
        enrollment.accept_bundle(tmp_path / "anna", enrollment.bundle_json(body), now=NOW)


def test_a_bundle_that_others_have_overtaken_keeps_the_roster_that_is_here(tmp_path: Path) -> None:
    places = enroll_parties(tmp_path, now=NOW)
    anna, ca = places["site-a"], places["ca"]
    again = enrollment.make_request(anna, name="site-a", org="org-site-a", role="client")
    bundle = authority.sign_request(ca, again, now=NOW)
    later = authority.revoke(ca, "site-b", now=NOW)
    enrollment.install_roster(anna, (ca / "roster").read_bytes(), now=NOW)
    result = enrollment.accept_bundle(anna, bundle, now=NOW)
    assert result.serial == later.parties["site-a"].serials[-1]
    assert (anna / "roster").read_bytes() == (ca / "roster").read_bytes()


def test_a_bundle_from_before_the_party_was_taken_out_is_refused(tmp_path: Path) -> None:
    places = enroll_parties(tmp_path, now=NOW)
    anna, ca = places["site-a"], places["ca"]
    again = enrollment.make_request(anna, name="site-a", org="org-site-a", role="client")
    bundle = authority.sign_request(ca, again, now=NOW)
    authority.revoke(ca, "site-a", now=NOW)
    enrollment.install_roster(anna, (ca / "roster").read_bytes(), now=NOW)
    with pytest.raises(WireError, match="later one"):
        enrollment.accept_bundle(anna, bundle, now=NOW)


def test_a_bundle_that_lay_too_long_is_refused(tmp_path: Path) -> None:
    authority.create_authority(tmp_path / "ca", "care", now=NOW)
    data = enrollment.make_request(tmp_path / "anna", name="anna", org="a", role="client")
    bundle = authority.sign_request(tmp_path / "ca", data, now=NOW)
    with pytest.raises(WireError, match="has expired"):
        enrollment.accept_bundle(tmp_path / "anna", bundle, now=NOW + 31 * 86_400)
    assert not (tmp_path / "anna" / "roster").exists()


def test_a_missing_file_is_reported_with_the_command_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a bundle at .*none.*; it is made by fedtune enroll sign"):
        enrollment.read_received(tmp_path / "none", "a bundle", "fedtune enroll sign")


def test_the_anchors_that_are_pinned_change_only_by_hand(tmp_path: Path) -> None:
    data = enrollment.make_request(tmp_path / "anna", name="anna", org="a", role="client")
    for ca in ("one", "two"):
        authority.create_authority(tmp_path / ca, "care", now=NOW)
    enrollment.accept_bundle(tmp_path / "anna", authority.sign_request(tmp_path / "one", data, now=NOW), now=NOW)
    with pytest.raises(ConfigError, match="pinned"):
        enrollment.accept_bundle(tmp_path / "anna", authority.sign_request(tmp_path / "two", data, now=NOW), now=NOW)


def test_a_bundle_of_mixed_federations_is_refused(tmp_path: Path) -> None:
    data = enrollment.make_request(tmp_path / "anna", name="anna", org="a", role="client")
    parts = []
    for ca in ("one", "two"):
        authority.create_authority(tmp_path / ca, "care", now=NOW)
        parts.append(json.loads(authority.sign_request(tmp_path / ca, data, now=NOW)))
    for name in ("certificate", "ca", "root", "roster"):
        mixed = enrollment.bundle_json({**parts[0], name: parts[1][name]})
        with pytest.raises((ConfigError, WireError)):
            enrollment.accept_bundle(tmp_path / "anna", mixed, now=NOW)
    assert not (tmp_path / "anna" / "tls.crt").exists()


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"certificate": 1}', SURROGATE, b" " * (8 * 2**20 + 1)])
def test_what_is_no_bundle_is_refused(tmp_path: Path, data: bytes) -> None:
    enrollment.make_request(tmp_path, name="anna", org="a", role="client")
    with pytest.raises(WireError):
        enrollment.accept_bundle(tmp_path, data, now=NOW)


def test_a_roster_is_installed_only_if_it_is_newer_and_signed(tmp_path: Path) -> None:
    places = enroll_parties(tmp_path, now=NOW)
    old = (places["site-b"] / "roster").read_bytes()
    authority.revoke(places["ca"], "site-a", now=NOW)
    new = (places["ca"] / "roster").read_bytes()
    assert enrollment.install_roster(places["server"], new, now=NOW).parties["site-a"].state == "revoked"
    with pytest.raises(WireError, match="later one"):
        enrollment.install_roster(places["server"], old, now=NOW)
    with pytest.raises(WireError):
        enrollment.install_roster(places["server"], b"nonsense", now=NOW)
    with pytest.raises(ConfigError, match="enroll accept"):
        enrollment.install_roster(tmp_path / "nowhere", new, now=NOW)
    (places["site-a"] / "root.pub").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"root\.pub"):
        enrollment.install_roster(places["site-a"], new, now=NOW)
    assert (places["server"] / "roster").read_bytes() == new
