from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from fedtune.errors import ConfigError
from fedtune.link.pki import authority
from fedtune.link.pki.identity import expiry_warnings, load_identity, read_root_key
from fedtune.link.pki.roster import decode
from tests.link.ceremony import enroll_parties

NOW = 1_800_000_000
LOCKED = Ed25519PrivateKey.from_private_bytes(bytes(32)).private_bytes(
    Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")
)
DAY = 86_400


@pytest.fixture
def anna(tmp_path: Path) -> Path:
    return enroll_parties(tmp_path, clients=("anna", "bob"), now=NOW)["anna"]


def test_an_identity_is_loaded_and_shows_no_secret(anna: Path) -> None:
    result = load_identity(anna, role="client", now=NOW)
    assert (result.name, result.org, result.role, result.federation) == ("anna", "org-anna", "client", "care")
    shown = repr(result)
    assert "PRIVATE" not in shown
    assert "tls_key" not in shown


def gone(name: str) -> Callable[[Path], None]:
    return lambda place: (place / name).unlink()


def of_bob(name: str) -> Callable[[Path], None]:
    def replaced(place: Path) -> None:
        shutil.copy(place.parents[1] / "bob" / "identity" / name, place / name)

    return replaced


def of_another_ca(name: str) -> Callable[[Path], None]:
    def replaced(place: Path) -> None:
        enroll_parties(place.parents[1] / "other", clients=("anna",), now=NOW)
        shutil.copy(place.parents[1] / "other" / "anna" / "identity" / name, place / name)

    return replaced


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda place: shutil.rmtree(place), "fedtune enroll request"),
        (gone("tls.key"), "fedtune enroll request"),
        (gone("sign.key"), "fedtune enroll request"),
        (gone("tls.crt"), "fedtune enroll accept"),
        (gone("roster"), "fedtune enroll accept"),
        (lambda place: (place / "sign.key").chmod(0o640), "chmod 600"),
        (lambda place: (place / "tls.key").chmod(0o604), "chmod 600"),
        (lambda place: (place / "tls.crt").write_text("nonsense"), "can be read"),
        (lambda place: (place / "root.pub").write_text("nonsense"), "can be read"),
        (lambda place: (place / "sign.key").write_bytes(LOCKED), "encrypted"),
        (of_bob("tls.crt"), "another key"),
        (of_bob("tls.key"), "another key"),
        (of_bob("sign.key"), "in the roster"),
        (of_another_ca("ca.crt"), "another CA"),
        (of_another_ca("root.pub"), "fedtune roster install"),
        (of_another_ca("roster"), "fedtune roster install"),
    ],
)
def test_what_does_not_fit_is_named_with_what_to_do(anna: Path, spoil: Callable[[Path], None], match: str) -> None:
    spoil(anna)
    with pytest.raises(ConfigError, match=match) as caught:
        load_identity(anna, role="client", now=NOW)
    assert "PRIVATE" not in str(caught.value)


@pytest.mark.parametrize(("now", "match"), [(NOW + 91 * DAY, "ended on 2027"), (NOW - DAY, "begins on 2027")])
def test_a_certificate_has_its_time(anna: Path, now: int, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_identity(anna, role="client", now=now)


def test_a_client_is_no_coordinator(anna: Path) -> None:
    with pytest.raises(ConfigError, match="--role coordinator"):
        load_identity(anna, role="coordinator", now=NOW)


def test_a_warning_comes_with_the_last_third_of_a_certificate(anna: Path) -> None:
    result = load_identity(anna, role="client", now=NOW)
    root = decode((result.folder / "roster").read_bytes(), result.root)
    roster = replace(root, valid_until=NOW + 200 * DAY)
    assert not expiry_warnings(result, roster, now=NOW + 59 * DAY)
    (text,) = expiry_warnings(result, roster, now=NOW + 61 * DAY)
    assert "ends on" in text
    assert "its request waits at the coordinator until the CA signs" in text
    assert "ended on" in expiry_warnings(result, roster, now=NOW + 91 * DAY)[0]
    assert not expiry_warnings(result, replace(root, valid_until=NOW + 30 * DAY), now=NOW + 22 * DAY)
    (text,) = expiry_warnings(result, replace(root, valid_until=NOW + 30 * DAY), now=NOW + 24 * DAY)
    assert text.startswith("the roster (version ")


def test_a_pinned_root_key_that_cannot_be_read_is_named(anna: Path) -> None:
    assert read_root_key(anna / "root.pub") == load_identity(anna, role="client", now=NOW).root
    (anna / "root.pub").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"root\.pub"):
        read_root_key(anna / "root.pub")


def test_a_revoked_identity_loads_and_the_server_refuses_it(anna: Path) -> None:
    # The site's own copy may be newer than the server's; the server decides.
    authority.revoke(anna.parents[1] / "ca", "anna", now=NOW)
    (anna / "roster").write_bytes((anna.parents[1] / "ca" / "roster").read_bytes())
    assert load_identity(anna, role="client", now=NOW).name == "anna"
