from __future__ import annotations

import base64

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from fedtune.link.pki import certificates as made

CA_KEY, KEY = made.new_tls_key(), made.new_tls_key()
CA = made.ca_certificate("care", CA_KEY, years=10, now=1_800_000_000)


def certificate(uri: str = "spiffe://care/org/anna", *, days: int = 90, server: bool = False) -> bytes:
    return made.issue_certificate(
        KEY.public_key(),
        uri,
        hosts=["localhost", "::1"],
        server=server,
        days=days,
        ca=CA,
        ca_key=CA_KEY,
        now=1_800_000_000,
    )


def test_a_certificate_names_one_party_of_one_federation() -> None:
    pem = certificate()
    assert made.spiffe_parts(pem) == ("care", "org", "anna")
    assert made.matches_key(pem, KEY)
    assert not made.matches_key(pem, CA_KEY)
    assert made.is_issued_by(pem, CA)
    assert not made.is_issued_by(pem, made.ca_certificate("care", made.new_tls_key(), years=1, now=1_800_000_000))
    assert made.validity(pem) == (1_800_000_000 - 300, 1_800_000_000 + 90 * 86_400)
    assert int(made.serial_number(pem), 16) > 0


@pytest.mark.parametrize(
    "uri", ["https://care/org/anna", "spiffe://care/anna", "spiffe://care//anna", "spiffe://a/b/c/d"]
)
def test_another_name_is_none(uri: str) -> None:
    with pytest.raises(ValueError, match="expected one name"):
        made.spiffe_parts(certificate(uri))


def test_a_certificate_of_the_ca_itself_names_nobody() -> None:
    with pytest.raises(ValueError, match="without a name"):
        made.spiffe_parts(CA)


@pytest.mark.parametrize("days", [0, 398])
def test_a_certificate_lasts_at_most_397_days(days: int) -> None:
    with pytest.raises(ValueError, match="397"):
        certificate(days=days)


def test_a_certificate_ends_with_its_ca_at_the_latest() -> None:
    short = made.ca_certificate("care", CA_KEY, years=1, now=1_800_000_000)
    pem = made.issue_certificate(
        KEY.public_key(), "spiffe://a/b/c", hosts=(), server=False, days=397, ca=short, ca_key=CA_KEY, now=1_800_000_000
    )
    assert made.validity(pem)[1] == made.validity(short)[1]


def test_what_the_library_cannot_read_is_a_value_error() -> None:
    locked = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word"))
    with pytest.raises(ValueError, match="encrypted"):
        made.load_tls_key(locked)
    der = x509.load_pem_x509_certificate(certificate()).public_bytes(Encoding.DER)
    version = der.index(bytes.fromhex("a003020102"))
    spoilt = der[: version + 4] + b"\x0a" + der[version + 5 :]
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(spoilt) + b"-----END CERTIFICATE-----\n"
    for read in (
        made.spiffe_parts,
        made.serial_number,
        made.validity,
        made.is_canonical,
        made.are_trust_anchors,
        lambda pem: made.is_issued_by(pem, CA),
    ):
        with pytest.raises(ValueError, match="version"):
            read(pem)


def test_anchors_are_cas_that_sign_themselves_in_the_spelling_that_is_written_here() -> None:
    other = made.ca_certificate("care", made.new_tls_key(), years=1, now=1_800_000_000)
    assert made.are_trust_anchors(CA)
    assert made.are_trust_anchors(CA + other)
    assert not made.are_trust_anchors(certificate())
    assert not made.are_trust_anchors(CA + b"\n")
    assert made.is_canonical(certificate())
    assert not made.is_canonical(b" " + certificate())


def test_keys_of_other_kinds_are_refused() -> None:
    ed, big = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())
    assert made.load_tls_key(made.pem_of(KEY)).curve.name == "secp256r1"
    for pem in (made.pem_of(ed), made.pem_of(big)):
        with pytest.raises(ValueError, match="P-256"):
            made.load_tls_key(pem)
    with pytest.raises(ValueError, match="Ed25519"):
        made.load_signing_key(made.pem_of(KEY))
    with pytest.raises(ValueError, match="P-256"):
        made.csr_key(made.csr(big, "anna"))
    assert made.public_der(made.csr_key(made.csr(KEY, "anna"))) == made.public_der(KEY.public_key())
