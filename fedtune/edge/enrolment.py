"""The enrolment of a device: its request, what comes back, its own file, and what is still missing."""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config.reading import read
from fedtune.config.site_text import device_text, with_port
from fedtune.errors import ConfigError, Fault, FedtuneError
from fedtune.link.pki import enrollment
from fedtune.link.pki.certificates import csr_key, load_signing_key, load_tls_key
from fedtune.link.pki.identity import CA, CERTIFICATE, ROOT, SIGN_KEY, TLS_KEY, Identity
from fedtune.link.pki.roster import NAME
from fedtune.link.pki.signing import fingerprint, public_bytes
from fedtune.store import manifest as manifests
from fedtune.store.files import store_errors, write_bytes

IDENTITY, MODEL, DATA = "identity", "model", "data"
"""Folders beside the device's own file, where it names no others."""
REQUEST = ".request.json"


@dataclass(frozen=True)
class Asked:
    """A request for an enrolment."""

    name: str
    data: bytes
    path: Path

    @property
    def fingerprint(self) -> str:
        """To compare by voice with the person who signs."""
        return fingerprint(self.data)


@dataclass(frozen=True)
class Places:
    """Where a device keeps what it needs: beside its own file, unless that says otherwise."""

    site: Path
    identity: Path

    @property
    def root(self) -> Path:
        return self.site.parent


def places(site: Path, identity: Path | None = None) -> Places:
    """Return where the files of a device are; its own file need not be there yet, or be right."""
    named = IDENTITY
    if identity is None and site.is_file():
        link = own_table(site).get("link", {})
        named = str(link.get("identity", IDENTITY)) if isinstance(link, Mapping) else IDENTITY
    return Places(site, site.parent / named if identity is None else identity)


def own_table(site: Path) -> Mapping[str, Any]:
    """Return a device's own file as it is written; nothing of one that cannot be read: its reader says why."""
    try:
        return read(site)[3]
    except ConfigError:
        return {}


def proposed_name() -> str:
    """Return a name for this device that hardly any other has: of its host, and four random digits."""
    host = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname().partition(".")[0]).strip("-")[:40] or "device"
    return f"{host}-{secrets.token_hex(2)}"


def known_name(where: Places) -> str | None:
    """Return the name under which a device has asked before; None if it has not."""
    earlier = sorted(where.root.glob(f"*{REQUEST}"), key=lambda path: path.stat().st_mtime)
    return earlier[-1].name.removesuffix(REQUEST) if earlier else None


def request(where: Places, *, name: str, org: str) -> Asked:
    """Create the keys that a device lacks, and write its request; one that it has written before stays.

    A new one of the same keys would have another fingerprint than the one that the operator has.

    Raises:
        ConfigError: if a name is malformed.
        StoreError: if the files cannot be written.
    """
    data = enrollment.make_request(where.identity, name=name, org=org, role="client")
    if (earlier := earlier_request(where, name)) is not None and enrollment.read_request(earlier.data).org == org:
        return earlier
    path = where.root / f"{name}{REQUEST}"
    write_bytes(path, data)
    return Asked(name, data, path)


def anchors_fingerprint(bundle: bytes) -> str:
    """Return the fingerprint of a federation's anchors in a bundle: the one that `fedtune ca init` shows.

    Raises:
        WireError: if it is no bundle.
    """
    _, ca, root, _ = enrollment.unpack_bundle(bundle)
    return fingerprint(ca + root)


def own_anchors(where: Places) -> str:
    """Return the same of the federation that a device is enrolled in."""
    return fingerprint((where.identity / CA).read_bytes() + (where.identity / ROOT).read_bytes())


def accept(where: Places, bundle: bytes, *, now: int) -> Identity:
    """Install what the operator has sent back.

    Raises:
        WireError: if it is malformed.
        ConfigError: if the device has not asked yet, or it is for another device or of another federation.
    """
    if not (where.identity / SIGN_KEY).exists():
        raise ConfigError(
            Fault("identity", f"this device's keys in {where.identity}", "none", "fedtune-edge enroll first")
        )
    return enrollment.accept_bundle(where.identity, bundle, now=now)


def write_site(where: Places, name: str, *, address: str, model: str = MODEL, data: str = DATA) -> bool:
    """Write a device's own file; return whether it was written: one that is there stays as it is."""
    with store_errors(where.site):
        if where.site.exists():
            return False
    identity = where.identity
    inside = identity.is_relative_to(where.root)
    text = device_text(
        name,
        address=with_port(address),
        model=model,
        data=data,
        identity=str(identity.relative_to(where.root) if inside else identity.resolve()),
    )
    write_bytes(where.site, text.encode())
    return True


def missing(site: Path, *, address: str | None = None) -> Iterator[Fault]:
    """Yield what a device still needs before it can join, in the order in which that is done.

    Args:
        site: its own file.
        address: of the server, in place of the file's.
    """
    where = places(site)
    if not (where.identity / SIGN_KEY).exists():
        yield Fault("", f"keys of this device in {where.identity}", "none", "fedtune-edge enroll")
    if not (where.identity / CERTIFICATE).exists():
        hint = "send the request of fedtune-edge enroll to the operator, then: fedtune-edge enroll CODE"
        yield Fault("", f"a certificate of this device in {where.identity}", "none", hint)
    if not site.is_file():
        yield Fault("", f"this device's file {site}", "none", "fedtune-edge enroll CODE --server HOST writes one")
        return
    table = own_table(site)
    values = {name: part for name in ("model", "data", "link") if isinstance(part := table.get(name), Mapping)}
    if not address and "link" in values and values["link"].get("address") == "":
        yield Fault(
            "link.address", "host and port of the server", "none", f"ask the operator, and write it into {site}"
        )
    base, source = values.get("model", {}).get("base"), values.get("data", {}).get("source")
    if isinstance(base, str) and not (site.parent / base / manifests.NAME).exists():
        hint = "unpack the operator's bundle there, or set model.base"
        yield Fault("model.base", f"a bundle in {site.parent / base}", "none", hint)
    if isinstance(source, str) and not any(mark in source for mark in "*?[") and not (site.parent / source).exists():
        hint = "put your files there, or set data.source"
        yield Fault("data.source", f"a file or folder {site.parent / source}", "none", hint)


def check_ready(site: Path, *, address: str | None = None) -> None:
    """Refuse to go on while something is missing; the message names the first, and what else there is.

    Raises:
        ConfigError: if something is.
    """
    faults = list(missing(site, address=address))
    if not faults:
        return
    first = faults[0]
    if (more := len(faults) - 1) > 0:
        first = Fault(first.path, first.expected, first.got, f"{first.hint} (then {more} more: {_short(faults[1:])})")
    raise ConfigError(first)


def _short(faults: list[Fault]) -> str:
    return ", ".join(fault.path or fault.expected.partition(" in ")[0] for fault in faults)


def check_name(key: str, text: str) -> str:
    """Return a name that can stand in a certificate.

    Raises:
        ConfigError: if it cannot.
    """
    if not NAME.fullmatch(text):
        raise ConfigError(Fault(key, "letters, digits, '.', '_' and '-', a letter or digit first", repr(text)))
    return text


def earlier_request(where: Places, name: str) -> Asked | None:
    """Return the request that a device has written under a name; None if there is none, or it is of other keys."""
    path = where.root / f"{name}{REQUEST}"
    try:
        data = path.read_bytes()
        asked = enrollment.read_request(data)
        own = load_signing_key((where.identity / SIGN_KEY).read_bytes())
        tls = load_tls_key((where.identity / TLS_KEY).read_bytes())
        is_own = (public_bytes(own), tls.public_key()) == (asked.key, csr_key(asked.csr))
    except (OSError, ValueError, FedtuneError):
        return None
    if not is_own or asked.name != name:
        return None
    return Asked(asked.name, data, path)
