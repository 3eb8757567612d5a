"""Enrolment over the network at a coordinator: its desk beside a run or alone, and the codes that it gives out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fedtune.errors import ConfigError, Fault
from fedtune.link.audit_log import AuditLog, RecordEvent, log_event, record_to_all
from fedtune.link.pki import invitations, registrar
from fedtune.link.pki.certificates import hosts_of
from fedtune.link.pki.identity import CERTIFICATE, Identity, load_identity
from fedtune.link.pki.queue_files import REGISTRAR, forget_rejected
from fedtune.link.pki.roster import RosterFile
from fedtune.link.server.addresses import LISTEN_HINT, check_address, check_free
from fedtune.link.server.enrolment import QUEUE, Desk
from fedtune.link.server.enrolment_service import serve_enrolment
from fedtune.link.server.folding import FoldedEvents
from fedtune.link.settings import EnrolmentSettings, LinkSettings
from fedtune.store.files import make_private, store_errors, write_bytes
from fedtune.store.lock import lock_run

AUDIT = "audit"
LISTEN = "0.0.0.0:9001"
LOOK_S = 2.0
"""Between two looks at the queue."""


@dataclass(frozen=True)
class Place:
    """Where a coordinator enrols sites."""

    identity: Identity
    settings: EnrolmentSettings
    folder: Path
    link_port: str = "9000"
    """Of the server that sites join."""

    @property
    def queue(self) -> Path:
        return self.folder / QUEUE

    @property
    def hosts(self) -> tuple[str, ...]:
        return hosts_of((self.identity.folder / CERTIFICATE).read_bytes())

    @property
    def address(self) -> str:
        """What sites dial."""
        if self.settings.address:
            return self.settings.address
        return self.at((self.settings.listen or LISTEN).rpartition(":")[2])

    def at(self, port: str) -> str:
        """Return the first host of the certificate with a port."""
        host = self.hosts[0]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def find_place(link: LinkSettings, settings: EnrolmentSettings, root: Path) -> Place:
    """Return where the coordinator of a server file enrols sites.

    Raises:
        ConfigError: if it has no identity that is valid.
    """
    identity = load_identity((root / link.identity).resolve(), role="coordinator", now=int(time.time()))
    port = link.listen.rpartition(":")[2]
    return Place(identity, settings, (root / settings.folder).resolve(), port)


def invite(place: Place, *, name: str, org: str, hours: int, address: str = "", server: str = "") -> invitations.Code:
    """Return a code with which one site can ask to be enrolled, once.

    Args:
        place: of the coordinator.
        name: of the site.
        org: of the site.
        hours: for which the code can be used.
        address: of the enrolment service; empty: that of the settings.
        server: that the site joins; empty: the first host of the certificate, and the link's port.

    Raises:
        ConfigError: if an address is not one of this server's, or the name is enrolled for another organisation.
    """
    address, server = address or place.address, server or place.at(place.link_port)
    for key, given in (("--address", address), ("--server", server)):
        check_address(given, key=key)
        host = given.rpartition(":")[0].strip("[]")
        # A site trusts the service by this name in its certificate, and would refuse it under another one.
        if host.lower() not in (known.lower() for known in place.hosts):
            expected = f"a host of this server's certificate ({', '.join(place.hosts)})"
            raise ConfigError(Fault(key, expected, repr(host), "or enrol the server again with --host"))
    known = RosterFile(place.identity.folder / "roster", place.identity.root).current().parties.get(name)
    if known is not None and (known.org, known.role) != (org, "client"):
        raise ConfigError(Fault("--name", f"a client of {org}", f"{name}, {known.role} of {known.org}"))
    with store_errors(place.folder):
        place.folder.parent.mkdir(parents=True, exist_ok=True)
        make_private(place.queue, below=place.folder)
        make_private(place.folder / invitations.FOLDER, below=place.folder)
    ca = (place.identity.folder / "ca.crt").read_bytes()
    code = invitations.invite(
        place.folder,
        address=address,
        server=server,
        name=name,
        org=org,
        ca=ca,
        root=place.identity.root,
        hours=hours,
        now=int(time.time()),
    )
    with store_errors(place.queue):
        forget_rejected(place.queue, name)
    return code


def ask_delegation(place: Place) -> Path:
    """Make the keys of a registrar, and put its request into the queue; returns the file.

    Raises:
        ConfigError: if keys that are there cannot be used.
        StoreError: if the folder cannot be written.
    """
    data = registrar.ask(place.identity, now=int(time.time()))
    with store_errors(place.folder):
        place.folder.parent.mkdir(parents=True, exist_ok=True)
        make_private(place.queue, below=place.folder)
    path = place.queue / REGISTRAR
    write_bytes(path, data)
    return path


@contextmanager
def serving(place: Place, roster: RosterFile, record: RecordEvent) -> Iterator[Desk]:
    """Look at the queue until the block ends, and serve enrolments where the settings name an address.

    Raises:
        ConfigError: if the address cannot be listened on.
        StoreError: if another process serves them.
    """
    desk = Desk(place.folder, place.identity, roster, record=record)
    with ExitStack() as stack:
        if place.settings.listen:
            with store_errors(place.folder):
                place.folder.parent.mkdir(parents=True, exist_ok=True)
                make_private(place.folder, below=place.folder)
            # Two services could give one code to two sites.
            stack.enter_context(lock_run(place.folder))
            stack.enter_context(serve_enrolment(desk, place.identity, place.settings, record=record))
        stack.enter_context(looking(desk))
        yield desk


@contextmanager
def looking(desk: Desk, *, every_s: float = LOOK_S) -> Iterator[None]:
    """Have a desk look at its queue every few seconds until the block ends."""
    desk.look()
    over = threading.Event()

    def run() -> None:
        while not over.wait(every_s):
            desk.look()

    thread = threading.Thread(target=run, name="fedtune queue", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def serve_alone(place: Place, *, record: RecordEvent, until: Callable[[], object], listen: str = "") -> None:
    """Serve enrolments without a run, until `until` returns.

    Raises:
        ConfigError: if the address cannot be listened on.
        StoreError: if another process serves them, or the folder cannot be written.
    """
    address = listen or place.settings.listen or LISTEN
    place = replace(place, settings=replace(place.settings, listen=address))
    check_address(address, key="enrolment.listen")
    check_free("enrolment.listen", address, LISTEN_HINT)
    roster = RosterFile(place.identity.folder / "roster", place.identity.root)
    with store_errors(place.folder), ExitStack() as stack:
        place.folder.parent.mkdir(parents=True, exist_ok=True)
        make_private(place.folder, below=place.folder)
        audit = AuditLog(place.folder / AUDIT, on_failure=lambda error: record("warning", text=str(error)))
        stack.callback(audit.close)
        folded = FoldedEvents(record_to_all(audit.record, log_event, record))
        stack.callback(folded.flush)
        stack.enter_context(serving(place, roster, folded.record))
        until()
