from __future__ import annotations

import base64

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from fedtune.link.pki import certificates

CA_KEY, KEY = certificates.new_tls_key(), certificates.new_tls_key()
CA = certificates.ca_certificate("care", CA_KEY, years=10, now=1_800_000_000)


def certificate(uri: str = "spiffe://care/org/anna", *, days: int = 90, server: bool = False) -> bytes:
    return certificates.issue_certificate(
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
    assert certificates.spiffe_parts(pem) == ("care", "org", "anna")
    assert certificates.matches_key(pem, KEY)
    assert not certificates.matches_key(pem, CA_KEY)
    assert certificates.is_issued_by(pem, CA)
    assert not certificates.is_issued_by(
        pem, certificates.ca_certificate("care", certificates.new_tls_key(), years=1, now=1_800_000_000)
    )
    assert certificates.validity(pem) == (1_800_000_000 - 300, 1_800_000_000 + 90 * 86_400)
    assert int(certificates.serial_number(pem), 16) > 0


@pytest.mark.parametrize(
    "uri", ["https://care/org/anna", "spiffe://care/anna", "spiffe://care//anna", "spiffe://a/b/c/d"]
)
def test_another_name_is_none(uri: str) -> None:
    with pytest.raises(ValueError, match="expected one name"):
        certificates.spiffe_parts(certificate(uri))


def test_a_certificate_of_the_ca_itself_names_no_party() -> None:
    with pytest.raises(ValueError, match="without a name"):
        certificates.spiffe_parts(CA)


@pytest.mark.parametrize("days", [0, 398])
def test_a_certificate_lasts_at_most_397_days(days: int) -> None:
    with pytest.raises(ValueError, match="397"):
        certificate(days=days)


def test_a_certificate_ends_with_its_ca_at_the_latest() -> None:
    short = certificates.ca_certificate("care", CA_KEY, years=1, now=1_800_000_000)
    pem = certificates.issue_certificate(
        KEY.public_key(), "spiffe://a/b/c", hosts=(), server=False, days=397, ca=short, ca_key=CA_KEY, now=1_800_000_000
    )
    assert certificates.validity(pem)[1] == certificates.validity(short)[1]


def test_what_the_library_cannot_read_is_a_value_error() -> None:
    locked = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word"))
    with pytest.raises(ValueError, match="encrypted"):
        certificates.load_tls_key(locked)
    der = x509.load_pem_x509_certificate(certificate()).public_bytes(Encoding.DER)
    version = der.index(bytes.fromhex("a003020102"))
    spoilt = der[: version + 4] + b"\x0a" + der[version + 5 :]
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(spoilt) + b"-----END CERTIFICATE-----\n"
    for read in (
        certificates.spiffe_parts,
        certificates.serial_number,
        certificates.validity,
        certificates.is_canonical,
        certificates.are_trust_anchors,
        lambda pem: certificates.is_issued_by(pem, CA),
    ):
        with pytest.raises(ValueError, match="version"):
            read(pem)


def test_anchors_are_cas_that_sign_themselves_in_the_spelling_that_is_written_here() -> None:
    other = certificates.ca_certificate("care", certificates.new_tls_key(), years=1, now=1_800_000_000)
    assert certificates.are_trust_anchors(CA)
    assert certificates.are_trust_anchors(CA + other)
    assert not certificates.are_trust_anchors(certificate())
    assert not certificates.are_trust_anchors(CA + b"\n")
    assert certificates.is_canonical(certificate())
    assert not certificates.is_canonical(b" " + certificate())


def test_keys_of_other_kinds_are_refused() -> None:
    ed, big = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())
    assert certificates.load_tls_key(certificates.pem_of(KEY)).curve.name == "secp256r1"
    for pem in (certificates.pem_of(ed), certificates.pem_of(big)):
        with pytest.raises(ValueError, match="P-256"):
            certificates.load_tls_key(pem)
    with pytest.raises(ValueError, match="Ed25519"):
        certificates.load_signing_key(certificates.pem_of(KEY))
    with pytest.raises(ValueError, match="P-256"):
        certificates.csr_key(certificates.csr(big, "anna"))
    assert certificates.public_der(certificates.csr_key(certificates.csr(KEY, "anna"))) == certificates.public_der(
        KEY.public_key()
    )
