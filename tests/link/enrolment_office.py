"""A coordinator's enrolment service on loopback for tests, with its CA."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.link.pki import invitations
from fedtune.link.pki.identity import load_identity
from fedtune.link.pki.queue_signing import Verdict, sign_queue
from fedtune.link.pki.roster import RosterFile
from fedtune.link.server.enrolment import Desk
from fedtune.link.server.enrolment_service import serve_enrolment
from fedtune.link.settings import EnrolmentSettings
from tests.link.ceremony import enroll_parties


@dataclass
class Office:
    """A service that runs, and its CA."""

    folder: Path
    desk: Desk
    places: dict[str, Path]
    port: int
    events: list[tuple[str, dict[str, Any]]]

    def invite(self, name: str = "anna", org: str = "a", *, port: int | None = None) -> invitations.Code:
        server = load_identity(self.places["server"], role="coordinator", now=int(time.time()))
        return invitations.invite(
            self.desk.folder,
            address=f"localhost:{port or self.port}",
            server="localhost:9000",
            name=name,
            org=org,
            ca=server.ca,
            root=server.root,
            hours=1,
            now=int(time.time()),
        )

    def sign(self, verdict: Verdict = "sign") -> list[str]:
        results = sign_queue(self.places["ca"], self.desk.queue, lambda one: verdict, days=9, now=int(time.time()))
        outcomes: list[str] = [one.outcome for one in results]
        self.desk.look()
        return outcomes

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


@contextmanager
def enrolment_office(folder: Path, settings: EnrolmentSettings | None = None) -> Iterator[Office]:
    """Serve enrolments until the block ends."""
    places = dict(enroll_parties(folder, clients=()))
    identity = load_identity(places["server"], role="coordinator", now=int(time.time()))
    roster = RosterFile(places["server"] / "roster", identity.root)
    events: list[tuple[str, dict[str, Any]]] = []

    def record(kind: str, **fields: int | str) -> None:
        events.append((kind, dict(fields)))

    desk = Desk(folder / "enrolment", identity, roster, record=record)
    settings = settings or EnrolmentSettings(listen="127.0.0.1:0")
    with serve_enrolment(desk, identity, settings, record=record) as port:
        yield Office(folder, desk, places, port, events)
