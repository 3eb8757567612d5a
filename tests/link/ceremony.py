"""A federation for tests: a CA, a coordinator named `server` and clients, every identity on the newest roster."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedtune.link.pki import authority, enrollment


def enroll_parties(
    folder: Path,
    *,
    federation: str = "care",
    clients: Sequence[str] = ("site-a", "site-b"),
    host: str = "localhost",
    now: int | None = None,
    days: int = 90,
) -> Mapping[str, Path]:
    """Enrol all parties as their commands would; return the identity folders by name, and the CA's under `ca`."""
    at = int(time.time()) if now is None else now
    ca = folder / "ca"
    authority.create_authority(ca, federation, now=at)
    places = {name: folder / name / "identity" for name in ("server", *clients)}
    for name, place in places.items():
        server = name == "server"
        request = enrollment.make_request(
            place,
            name=name,
            org=f"org-{name}",
            role="coordinator" if server else "client",
            hosts=(host, "127.0.0.1") if server else (),
        )
        enrollment.accept_bundle(place, authority.sign_request(ca, request, days=days, now=at), now=at)
    copy_roster(ca, places)
    return {**places, "ca": ca}


def copy_roster(ca: Path, places: Mapping[str, Path], *, to: Sequence[str] | None = None) -> None:
    """Copy the CA's newest roster into identity folders: into all, or into those that `to` names."""
    for name, place in places.items():
        if name != "ca" and (to is None or name in to):
            (place / "roster").write_bytes((ca / "roster").read_bytes())
