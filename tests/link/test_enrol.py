from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.errors import ConfigError, WireError
from fedtune.link import authority, enrol
from tests.link.ceremony import ceremony

NOW = 1_800_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("enrolment")


@pytest.fixture(scope="module")
def request_of_anna(folder: Path) -> bytes:
    return enrol.request(folder / "anna", name="anna", org="a", role="client")


def test_keys_are_made_once_and_are_for_their_owner_alone(tmp_path: Path) -> None:
    place = tmp_path / "identity"
    enrol.request(place, name="anna", org="a", role="client")
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    enrol.request(place, name="anna", org="a", role="client")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert before.keys() == {"sign.key", "tls.key"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {0o600}


def test_a_request_says_who_asks_and_holds_no_secret(request_of_anna: bytes, folder: Path) -> None:
    asked = enrol.read_request(request_of_anna)
    assert (asked.name, asked.org, asked.role, asked.hosts) == ("anna", "a", "client", ())
    for key in ("sign.key", "tls.key"):
        assert (folder / "anna" / key).read_bytes()[30:60] not in request_of_anna


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_any_changed_byte_of_a_request_is_found(request_of_anna: bytes, data: st.DataObject) -> None:
    spoilt = bytearray(request_of_anna)
    place = data.draw(st.integers(0, len(spoilt) - 2))
    spoilt[place] ^= data.draw(st.integers(1, 255))
    try:
        assert enrol.read_request(bytes(spoilt)) == enrol.read_request(request_of_anna)
        one, other = json.loads(spoilt), json.loads(request_of_anna)  # the names of the keys decide nothing
        assert one["payload"] == other["payload"]
    except WireError:
        pass


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "../anna"}, "name"),
        ({"org": ""}, "org"),
        ({"role": "root"}, "role"),
        ({"hosts": ("a b",)}, "host"),
        ({"role": "coordinator"}, "dial the server"),
    ],
)
def test_a_request_that_could_not_be_signed_is_not_made(tmp_path: Path, changes: dict[str, object], match: str) -> None:
    given = {"name": "anna", "org": "a", "role": "client", "hosts": (), **changes}
    with pytest.raises(ConfigError, match=match):
        enrol.request(tmp_path, **given)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_for_the_folder_that_asked(tmp_path: Path) -> None:
    authority.init(tmp_path / "ca", "care", now=NOW)
    bundles = {}
    for name in ("anna", "bob"):
        data = enrol.request(tmp_path / name, name=name, org="a", role="client")
        bundles[name] = authority.sign_request(tmp_path / "ca", data, now=NOW)
    with pytest.raises(ConfigError, match="one of another"):
        enrol.accept(tmp_path / "anna", bundles["bob"], now=NOW)
    made = enrol.accept(tmp_path / "anna", bundles["anna"], now=NOW)
    assert (made.name, made.org, made.federation, made.role) == ("anna", "a", "care", "client")


def test_the_anchors_that_are_pinned_change_only_by_hand(tmp_path: Path) -> None:
    data = enrol.request(tmp_path / "anna", name="anna", org="a", role="client")
    for ca in ("one", "two"):
        authority.init(tmp_path / ca, "care", now=NOW)
    enrol.accept(tmp_path / "anna", authority.sign_request(tmp_path / "one", data, now=NOW), now=NOW)
    with pytest.raises(ConfigError, match="pinned"):
        enrol.accept(tmp_path / "anna", authority.sign_request(tmp_path / "two", data, now=NOW), now=NOW)


def test_a_bundle_of_mixed_federations_is_refused(tmp_path: Path) -> None:
    data = enrol.request(tmp_path / "anna", name="anna", org="a", role="client")
    parts = []
    for ca in ("one", "two"):
        authority.init(tmp_path / ca, "care", now=NOW)
        parts.append(json.loads(authority.sign_request(tmp_path / ca, data, now=NOW)))
    for name in ("certificate", "ca", "root", "roster"):
        mixed = json.dumps({**parts[0], name: parts[1][name]}).encode()
        with pytest.raises((ConfigError, WireError)):
            enrol.accept(tmp_path / "anna", mixed, now=NOW)
    assert not (tmp_path / "anna" / "tls.crt").exists()


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"certificate": 1}', b" " * (8 * 2**20 + 1)])
def test_what_is_no_bundle_is_refused(tmp_path: Path, data: bytes) -> None:
    enrol.request(tmp_path, name="anna", org="a", role="client")
    with pytest.raises(WireError):
        enrol.accept(tmp_path, data, now=NOW)


def test_a_roster_is_installed_only_if_it_is_newer_and_signed(tmp_path: Path) -> None:
    places = ceremony(tmp_path, now=NOW)
    old = (places["site-b"] / "roster").read_bytes()
    authority.revoke(places["ca"], "site-a", now=NOW)
    new = (places["ca"] / "roster").read_bytes()
    assert enrol.install(places["server"], new, now=NOW).members["site-a"].state == "revoked"
    with pytest.raises(WireError, match="later one"):
        enrol.install(places["server"], old, now=NOW)
    with pytest.raises(WireError):
        enrol.install(places["server"], b"nonsense", now=NOW)
    with pytest.raises(ConfigError, match="enroll accept"):
        enrol.install(tmp_path / "nowhere", new, now=NOW)
    assert (places["server"] / "roster").read_bytes() == new
