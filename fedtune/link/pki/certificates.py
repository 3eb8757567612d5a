"""X.509 as this project uses it: ECDSA P-256 keys, one CA, and certificates that name a party by one URI."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

SCHEME = "spiffe://"
CLOCK_TOLERANCE = timedelta(minutes=5)
"""By which a certificate begins earlier, since the clocks of two machines differ."""
MAX_DAYS = 397
"""Longest life of a certificate, as the baseline requirements of the CA/Browser Forum recommend."""


@contextmanager
def parse_errors_as_value_errors() -> Iterator[None]:
    """Raise a ValueError in place of the five other errors that the library has for bytes it cannot read."""
    try:
        yield
    except (
        TypeError,  # a private key that is encrypted
        UnsupportedAlgorithm,
        x509.InvalidVersion,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
    ) as error:
        raise ValueError(str(error)) from None


def pem_of(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    """Return a private key as PEM, not encrypted: the mode of its file protects it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@parse_errors_as_value_errors()
def load_tls_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Return the private key of a PEM.

    Raises:
        ValueError: if it is not one of ECDSA P-256.
    """
    key = load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("not a key of ECDSA P-256")
    return key


@parse_errors_as_value_errors()
def load_signing_key(pem: bytes) -> Ed25519PrivateKey:
    """Return the private key of a PEM.

    Raises:
        ValueError: if it is not one of Ed25519.
    """
    key = load_pem_private_key(pem, None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("not a key of Ed25519")
    return key


def new_tls_key() -> ec.EllipticCurvePrivateKey:
    # Not Ed25519, as for statements: gRPC's TLS library refuses such certificates.
    return ec.generate_private_key(ec.SECP256R1())


def common_name(name: str) -> x509.Name:
    # 64 characters are the limit of X.520; the whole name is in the URI.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def validity_dates(now: int, span: timedelta) -> tuple[datetime, datetime]:
    begin = datetime.fromtimestamp(now, UTC)
    return begin - CLOCK_TOLERANCE, begin + span


def ca_certificate(federation: str, key: ec.EllipticCurvePrivateKey, *, years: int, now: int) -> bytes:
    """Return the certificate (PEM) of a CA, signed by itself."""
    begin, end = validity_dates(now, timedelta(days=365 * years))
    name = common_name(f"{federation} CA")
    # It signs certificates and nothing else: a stolen copy of the CA's key is no server's key in a handshake.
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        # No CA below it: a stolen certificate of a party cannot issue others.
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return signed.public_bytes(Encoding.PEM)


def csr(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """Return a signing request (PEM) for a key; the CA decides everything else in the certificate."""
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(common_name(name))
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


@parse_errors_as_value_errors()
def csr_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key of a signing request.

    Raises:
        ValueError: if it does not prove that its author holds a key of ECDSA P-256.
    """
    request = x509.load_pem_x509_csr(pem)
    key = request.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("not a key of ECDSA P-256")
    # Its own signature proves that the author has the private key.
    if not request.is_signature_valid:
        raise ValueError("its signature does not hold")
    return key


def issue_certificate(
    public: ec.EllipticCurvePublicKey,
    uri: str,
    *,
    hosts: Sequence[str],
    server: bool,
    days: int,
    ca: bytes,
    ca_key: ec.EllipticCurvePrivateKey,
    now: int,
    until: int | None = None,
) -> bytes:
    """Return a certificate (PEM) for the party that `uri` names; `hosts` are for a server's alone.

    Args:
        public: its key.
        uri: its name.
        hosts: names and addresses of a server.
        server: whether it is a server's.
        days: its life.
        ca: of the issuer (PEM).
        ca_key: of the issuer.
        now: seconds since 1970.
        until: time at which it ends if its days go beyond; None: they count.

    Raises:
        ValueError: if it would last longer than `MAX_DAYS`.
    """
    if not 1 <= days <= MAX_DAYS:
        raise ValueError(f"expected 1 to {MAX_DAYS} days; got {days}")
    issuer = x509.load_pem_x509_certificate(ca)
    begin, end = validity_dates(now, timedelta(days=days))
    if until is not None:
        end = min(end, datetime.fromtimestamp(until, UTC))
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri)]
    # Hosts in a server certificate alone: no client can pose as the server that others dial.
    names += [host_general_name(host) for host in hosts] if server else []
    # One purpose each: a client's certificate is refused where a server's is needed, and the other way round.
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    signed = (
        x509.CertificateBuilder()
        .subject_name(common_name(uri.rpartition("/")[2]))
        .issuer_name(issuer.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        # A certificate that outlives its CA would fail with a misleading reason.
        .not_valid_after(min(end, issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return signed.public_bytes(Encoding.PEM)


def host_general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


@parse_errors_as_value_errors()
def spiffe_parts(pem: bytes) -> tuple[str, str, str]:
    """Return federation, organisation and name of the party that a certificate names.

    Raises:
        ValueError: if it names none, or more than one.
    """
    parsed = x509.load_pem_x509_certificate(pem)
    try:
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise ValueError("a certificate without a name") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    # Exactly one: of two names, two readers could take different ones.
    parts = uris[0].removeprefix(SCHEME).split("/") if len(uris) == 1 and uris[0].startswith(SCHEME) else []
    if len(parts) != 3 or not all(parts):
        raise ValueError(f"expected one name {SCHEME}FEDERATION/ORG/NAME; got {[uri[:100] for uri in uris[:2]]}")
    return parts[0], parts[1], parts[2]


@parse_errors_as_value_errors()
def hosts_of(pem: bytes) -> tuple[str, ...]:
    """Return the names and addresses of a server's certificate; none of another one."""
    try:
        names = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in names.value if isinstance(name, x509.DNSName | x509.IPAddress))


@parse_errors_as_value_errors()
def key_digest(pem: bytes) -> str:
    """Return the SHA-256 (hex) of the public key of a certificate."""
    return sha256(public_der(x509.load_pem_x509_certificate(pem).public_key())).hexdigest()


@parse_errors_as_value_errors()
def serial_number(pem: bytes) -> str:
    """Return a certificate's serial number in lower-case hex.

    Raises:
        ValueError: if it is no certificate.
    """
    return f"{x509.load_pem_x509_certificate(pem).serial_number:x}"


@parse_errors_as_value_errors()
def validity(pem: bytes) -> tuple[int, int]:
    """Return from when to when a certificate is valid, in seconds since 1970."""
    parsed = x509.load_pem_x509_certificate(pem)
    return int(parsed.not_valid_before_utc.timestamp()), int(parsed.not_valid_after_utc.timestamp())


@dataclass(frozen=True)
class ShownNames:
    """What a certificate of any kind says of itself; nothing of it is verified."""

    issuer: str
    hosts: Sequence[str] = ()
    is_party: bool = False
    """Whether it names a party of some federation."""


@parse_errors_as_value_errors()
def shown_names(der: bytes) -> ShownNames:
    """Return who has issued a certificate, and the hosts that it is for.

    Raises:
        ValueError: if it is no certificate.
    """
    parsed = x509.load_der_x509_certificate(der)
    issuer = parsed.issuer.rfc4514_string() or "an issuer without a name"
    try:
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ShownNames(issuer)
    hosts = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return ShownNames(issuer, hosts, any(uri.startswith(SCHEME) for uri in uris))


@parse_errors_as_value_errors()
def is_issued_by(pem: bytes, ca: bytes) -> bool:
    """Return whether a certificate is signed by the CA, or one of the CAs, of a PEM."""
    parsed = x509.load_pem_x509_certificate(pem)
    return any(is_signed_by(parsed, anchor) for anchor in x509.load_pem_x509_certificates(ca))


@parse_errors_as_value_errors()
def are_trust_anchors(ca: bytes) -> bool:
    """Return whether every certificate of a PEM is a CA's, signed by itself and not changed since."""
    anchors = x509.load_pem_x509_certificates(ca)
    # Text around the certificates of a PEM is not signed; only their own spelling is taken, so none can be added.
    rewritten = b"".join(anchor.public_bytes(Encoding.PEM) for anchor in anchors)
    return ca == rewritten and all(
        is_signed_by(anchor, anchor) and is_authority(anchor) and has_whole_signature(anchor) for anchor in anchors
    )


@parse_errors_as_value_errors()
def is_canonical(pem: bytes) -> bool:
    """Return whether a PEM is one certificate, spelled exactly as `issue_certificate` writes it."""
    parsed = x509.load_pem_x509_certificate(pem)
    return pem == parsed.public_bytes(Encoding.PEM) and has_whole_signature(parsed)


def has_whole_signature(certificate: x509.Certificate) -> bool:
    """Return whether the signature uses all bits of its bytes: the number of unused ones is not signed itself."""
    return certificate.public_bytes(Encoding.DER).endswith(b"\0" + certificate.signature)


def is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def is_signed_by(certificate: x509.Certificate, anchor: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(anchor)
    # ValueError: the certificate names another issuer; TypeError: the issuer's key is of a kind that signs none.
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


@parse_errors_as_value_errors()
def matches_key(pem: bytes, key: ec.EllipticCurvePrivateKey) -> bool:
    """Return whether a certificate is for this key."""
    return public_der(x509.load_pem_x509_certificate(pem).public_key()) == public_der(key.public_key())


def public_der(key: object) -> bytes:
    assert hasattr(key, "public_bytes")
    data: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return data
