"""How a served run stands: its rounds from the journal, and its clients from what the audit log says happened."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedtune.errors import StoreError, WireError
from fedtune.link import audit_log as log
from fedtune.link.audit_log import Entry, Log
from fedtune.link.server import blocklist
from fedtune.store import journal
from fedtune.store.files import store_errors
from fedtune.store.verify import Status
from fedtune.store.verify import status as run_status
from fedtune.wire.codec import parse
from fedtune.wire.v1 import link_pb2 as pb

LINK, AUDIT, BARRED, ID = "link", "audit", "barred", "id"


@dataclass(frozen=True)
class ClientStatus:
    """One client, as the audit log has it."""

    name: str
    state: str = "away"
    """here, away or barred."""
    seen_ms: int = 0
    """When it was last heard of, in milliseconds since 1970."""
    rounds: int = 0
    """Of which an update was used."""
    up: int = 0
    """Bytes of its answers."""
    down: int = 0
    """Bytes of what it was asked."""
    error: str = ""
    """The last thing that went wrong, and in which round."""

    @property
    def seen(self) -> str:
        """Return how long ago that was."""
        seconds = max(0, int(time.time() - self.seen_ms / 1000))
        for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
            if seconds >= size:
                return f"{seconds // size} {unit} ago"
        return f"{seconds} s ago"


@dataclass(frozen=True)
class ServerStatus:
    """A served run and its clients."""

    path: Path
    run: Status
    clients: Sequence[ClientStatus]
    head: str
    """SHA-256 (hex) of the audit log's last entry."""
    number: str = ""
    """The run's number on the link."""

    @property
    def lines(self) -> Mapping[str, str]:
        """What is said above the clients."""
        run = self.run
        state = "finished" if run.finished else f"running, process {run.holder}" if run.holder else "stopped"
        lines = {
            "run": f"{self.path} ({self.number or 'not begun'})",
            "state": f"{state}, in round {run.open}" if run.open else state,
            "rounds": str(run.committed),
            "last state": run.state or "none yet",
            "audit log": self.head[:16],
        }
        return lines | ({"waits for": ", ".join(run.missing)} if run.missing else {})

    @property
    def facts(self) -> Mapping[str, Any]:
        """The same for a program."""
        run = {key: value for key, value in asdict(self.run).items() if key != "inputs"}
        return {"path": str(self.path), **run, "audit": self.head, "clients": [asdict(one) for one in self.clients]}


def server_status(run: Path) -> ServerStatus:
    """Return how a served run stands; safe beside the process that serves it.

    Raises:
        StoreError: if it is none, or its logs cannot be trusted.
    """
    folder = run / LINK
    if not folder.is_dir():
        raise StoreError(f"{run}: expected a run of fedtune serve; got none; for others there is fedtune runs status")
    found, entries = run_status(run), log.read(folder / AUDIT)
    clients = client_statuses(entries.entries)
    if found.holder is None:
        clients = {name: replace(one, state="away") for name, one in clients.items()}
    barred = blocklist.read_blocklist(folder / BARRED)
    clients |= {
        name: replace(clients.get(name, ClientStatus(name)), state="barred", error=why) for name, why in barred.items()
    }
    return ServerStatus(run, found, [clients[name] for name in sorted(clients)], entries.head, read_run_id(run))


def client_statuses(entries: Sequence[Entry]) -> dict[str, ClientStatus]:
    """Return what a log says of each client."""
    found: dict[str, ClientStatus] = {}
    for entry in entries:
        name = str(entry.fields.get("client", ""))
        if not name:
            continue
        client = found.get(name, ClientStatus(name))
        found[name] = update_status(client, entry)
    return found


def update_status(client: ClientStatus, entry: Entry) -> ClientStatus:
    """Return a client after one entry of the log."""
    fields = entry.fields
    here = replace(client, state="here", seen_ms=entry.unix_ms)
    where = f"round {fields['round']}: " if fields.get("round") else ""
    match entry.kind:
        case "asked":
            return replace(client, down=client.down + fields["bytes"])
        case "answered":
            return replace(here, up=client.up + fields["bytes"])
        case "used":
            return replace(here, rounds=client.rounds + 1)
        case "unused" | "declined":
            return replace(client, error=f"{where}{fields['reason']}")
        case "refused":
            return replace(client, error=f"{fields['reason']}")
        case "lost" | "left":
            return replace(
                client, state="away", error=f"{where}{fields['reason']}" if "reason" in fields else client.error
            )
        case _:
            return here


def audit(path: Path, *, head: str | None = None) -> Log:
    """Return the audit log of a run, of a site's state folder, or of a file, its chain verified.

    Args:
        path: of any of them.
        head: SHA-256 (hex) of an entry that was noted earlier; the log must hold it.

    Raises:
        StoreError: if it is none, its chain is broken, or the head is not in it.
    """
    places = [path / LINK / AUDIT, path / AUDIT, path]
    found = next((one for one in places if one.is_file()), places[0])
    read = log.read(found)
    if head is not None and head.lower() not in log.heads(found):
        raise StoreError(f"{found}: expected an entry of digest {head[:16]}; got none; the log was cut or written anew")
    return read


def receipts(run: Path, state: Path) -> int:
    """Return how many receipts of a site stand for what a run's journal holds, after each has been held against it.

    A receipt names the number of the journal's records when it was given and the digest of the last, so a journal that
    was cut or written anew afterwards is found out by whoever keeps one.

    Args:
        run: the run directory.
        state: the site's state folder.

    Raises:
        StoreError: naming the receipt that differs, or if there is none of this run.
    """
    folder, heads = state / "runs" / read_run_id(run), list[str]()
    end = journal.read(run / "journal", lambda record: heads.append(record.prev))
    heads.append(end.head)
    held = 0
    for path in sorted(folder.glob("*/receipt")):
        with store_errors(path):
            data = path.read_bytes()
        try:
            found = parse(pb.Header(), parse(pb.Envelope(), data).header)
        except WireError as error:
            raise StoreError(f"{path}: {error}; the state folder is damaged") from None
        said = found.receipt
        if not said.journal_records:
            continue
        there = heads[said.journal_records] if said.journal_records < len(heads) else "nothing"
        if there != said.journal_head.hex():
            raise StoreError(
                f"{path}: expected the journal of {run} to have the head {said.journal_head.hex()[:16]} after "
                f"{said.journal_records} records, as was signed; got {there[:16]}; it was cut or written anew"
            )
        held += 1
    if not held:
        raise StoreError(f"{folder}: expected receipts of the run {run}; got none; name the site's state folder")
    return held


def read_run_id(run: Path) -> str:
    """Return the run's number on the link; empty if it was never served."""
    path = run / LINK / ID
    return path.read_text().strip() if path.exists() else ""
