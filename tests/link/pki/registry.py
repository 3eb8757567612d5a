"""A federation with a registrar for tests of what that may sign, and of what it may not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fedtune.link.pki import authority, certificates, enrollment, registrar, roster
from fedtune.link.pki.delegation import Renewals, Renewed, encode_renewals, make_statement
from fedtune.link.pki.identity import Identity, load_identity
from fedtune.link.pki.registrar import Registrar, current_renewals
from fedtune.link.pki.roster import Roster
from tests.link.ceremony import copy_roster, enroll_parties

NOW = 1_800_000_000
DAY_S = 86_400


@dataclass
class Registry:
    """A CA, its parties, and the coordinator's registrar."""

    places: dict[str, Path]
    server: Identity

    @property
    def ca(self) -> Path:
        return self.places["ca"]

    @property
    def file(self) -> Path:
        return self.server.folder / "roster"

    @property
    def data(self) -> bytes:
        return self.file.read_bytes()

    @property
    def roster(self) -> Roster:
        return roster.decode(self.data, self.server.root)

    @property
    def registrar(self) -> Registrar:
        own = registrar.load_registrar(self.server.folder, self.roster)
        assert own is not None
        return own

    def ask(self, name: str, *, until: int = NOW + 92 * DAY_S, **changes: object) -> tuple[enrollment.Request, bytes]:
        """Return request and statement of a client."""
        given = {"name": name, "org": f"org-{name}", "role": "client", **changes}
        request = enrollment.read_request(enrollment.make_request(self.places[name], **given))  # type: ignore[arg-type]
        own = load_identity(self.places[name], role="client", now=NOW)
        key = certificates.key_digest(own.certificate)
        return request, make_statement(own.key, "care", str(given["name"]), key, until)

    def renew(self, name: str = "site-a", *, now: int = NOW) -> bytes:
        """Have the registrar renew a client; returns its bundle."""
        request, statement = self.ask(name, until=now + 92 * DAY_S)
        pem, data = registrar.renew_client(self.server.folder, self.registrar, request, statement, now=now)
        return registrar.pack_renewed(self.server.folder, pem, data)

    def forge(self, change: Callable[[Renewals], Renewals]) -> bytes:
        """Return a roster file that a thief of the registrar's key signs."""
        before = current_renewals(self.data, self.server.root)
        return encode_renewals(change(before), "care", self.registrar.key)

    def forge_entry(self, **changes: object) -> bytes:
        """Return a roster file whose one renewal differs."""

        def change(before: Renewals) -> Renewals:
            entry: Renewed = replace(before.entries[0], **changes)  # type: ignore[arg-type]
            return replace(before, version=before.version + 1, entries=(entry,))

        return self.forge(change)


def make_registry(folder: Path, *, days: int = 30, certificate_days: int = 90, now: int = NOW) -> Registry:
    """Enrol a coordinator and two clients, and let the coordinator renew them."""
    places = dict(enroll_parties(folder, now=now, days=certificate_days))
    server = load_identity(places["server"], role="coordinator", now=now)
    _, delegation = registrar.read_ask(
        registrar.ask(server, now=now), authority.current_roster(places["ca"]), days=days, now=now
    )
    authority.delegate(places["ca"], delegation, now=now)
    copy_roster(places["ca"], places)
    return Registry(places, server)
