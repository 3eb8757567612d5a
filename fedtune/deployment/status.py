"""Status of a served run: its rounds from the journal, its clients from the audit log."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedtune.deployment.watch import read_now
from fedtune.errors import StoreError, WireError
from fedtune.link import audit_files, audit_log
from fedtune.link.audit_log import AuditHistory, Entry
from fedtune.link.rejections import FATAL, reason_name
from fedtune.link.server import blocklist
from fedtune.store import journal
from fedtune.store.files import store_errors
from fedtune.store.lock import holder
from fedtune.store.verify import Status
from fedtune.store.verify import status as run_status
from fedtune.wire.codec import parse
from fedtune.wire.v1 import link_pb2 as pb

LINK, AUDIT, BARRED, ID = "link", "audit", "barred", "id"
STATES = ("connected", "loading", "refused", "barred", "away", "never seen")
"""Of a client, in the order in which they are counted."""
SHUT = frozenset(reason_name(reason) for reason in FATAL)
"""Codes of the refusals after which a client takes no part."""


@dataclass(frozen=True)
class ClientStatus:
    """A client, by the entries of the audit log."""

    name: str
    state: str = "away"
    """connected; loading: connected, and has not said yet what it has; refused; away; never seen; barred."""
    seen_ms: int = 0
    """Last sign of life, in milliseconds since 1970."""
    rounds: int = 0
    """In which its update was used."""
    up: int = 0
    """Bytes of its replies."""
    down: int = 0
    """Bytes of its tasks."""
    error: str = ""
    """The last thing that went wrong, and in which round; empty once an update of a later round was used, or a client
    that was away or refused is connected again."""
    work: str = ""
    """How far it is with its work, as the server has said a few seconds ago; empty if it works on nothing."""

    @property
    def seen(self) -> str:
        """How long ago the last sign of life was, in words; of a client that is connected, now."""
        if not self.seen_ms:
            return "never"
        if self.state in ("connected", "loading"):
            return "now"
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
    run_id: str = ""
    """Of the run on the link; empty if it was never served."""
    server: str | None = None
    """Number of the process that serves the run now; None if there is none."""
    rounds: int = 0
    """Of the recipe; 0 if it is not known."""
    base_scores: str = ""
    """Of the base on the clients' held-out rows; empty if they do not score."""
    scores: str = ""
    """Of the global model after the last round that was scored."""
    warnings: Sequence[str] = ()
    """Of what ends soon: the roster, the server's certificate."""

    @property
    def state(self) -> str:
        """What the run does now, in words."""
        run = self.run
        if self.server is None:
            if run.finished:
                return f"finished after round {run.committed}"
            return f"stopped, in round {run.open}" if run.open else "stopped"
        if run.finished:
            return f"finished after round {run.committed}, telling the sites, process {self.server}"
        if run.holder is None:
            return f"waiting for sites, process {self.server}"
        return f"running, in round {run.open or run.committed}, process {self.server}"

    @property
    def lines(self) -> Mapping[str, str]:
        """Texts to show above the table of clients, by label."""
        run = self.run
        lines = {
            "run": f"{self.path} ({self.run_id or 'not begun'})",
            "state": self.state,
            "rounds": f"{run.committed} of {self.rounds}" if self.rounds else str(run.committed),
            "sites": self.count,
            "base": self.base_scores,
            "now": self.scores,
            "last state": run.state or "none yet",
            "audit log": self.head[:16],
        }
        lines = {label: text for label, text in lines.items() if text}
        lines |= {"waits for": ", ".join(run.missing)} if run.missing else {}
        return lines | ({"warning": "; ".join(self.warnings)} if self.warnings else {})

    @property
    def count(self) -> str:
        """How many clients are in each state, in words."""
        states = [client.state for client in self.clients]
        return ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)

    @property
    def facts(self) -> Mapping[str, Any]:
        """The same for a program."""
        run = {key: value for key, value in asdict(self.run).items() if key != "inputs"}
        return {
            "path": str(self.path),
            **run,
            "server": self.server,
            "status": self.state,
            "scores": {"base": self.base_scores, "now": self.scores},
            "audit": self.head,
            "warnings": list(self.warnings),
            "clients": [asdict(client) for client in self.clients],
        }


def server_status(run: Path) -> ServerStatus:
    """Return the status of a served run; safe while another process serves it.

    Raises:
        StoreError: if it was not served over the link, or its logs cannot be trusted.
    """
    folder = run / LINK
    if not folder.is_dir():
        raise StoreError(f"{run}: expected a run of fedtune serve; got none; for others there is fedtune runs status")
    status, server = run_status(run), holder(folder)
    history = audit_log.read_audit_log(folder / AUDIT)
    clients = client_statuses(history.entries)
    if server is None:
        clients = {name: gone(client) for name, client in clients.items()}
    # From the file and not the log: the operator edits it by hand.
    barred = blocklist.read_blocklist(folder / BARRED)
    clients |= {
        name: replace(clients.get(name, ClientStatus(name)), state="barred", error=reason)
        for name, reason in barred.items()
    }
    now = read_now(folder)
    if server is not None:
        clients = {name: replace(client, work=now.work.get(name, "")) for name, client in clients.items()}
    shown = [clients[name] for name in sorted(clients)]
    rounds = next((int(one.fields["rounds"]) for one in reversed(history.entries) if one.kind == "serving"), 0)
    scores = {one.kind: str(one.fields["scores"]) for one in history.entries if one.fields.get("scores")}
    return ServerStatus(
        run,
        status,
        shown,
        history.head,
        read_run_id(run),
        server,
        rounds,
        base_scores=scores.get("base", ""),
        scores=scores.get("committed", ""),
        warnings=now.warnings(now=time.time()),
    )


def gone(client: ClientStatus) -> ClientStatus:
    """Return the status of a client when no server is there for it."""
    return replace(client, state="away") if client.state in ("connected", "loading") else client


def client_statuses(entries: Sequence[Entry]) -> dict[str, ClientStatus]:
    """Return the status of each client after all entries of a log."""
    clients: dict[str, ClientStatus] = {}
    for entry in entries:
        if entry.kind == "enrolled":
            # Written when a server starts: clients of the process before it have to come again.
            names = str(entry.fields["clients"]).split()
            clients = {name: gone(client) for name, client in clients.items()}
            clients |= {name: ClientStatus(name, state="never seen") for name in names if name not in clients}
        elif name := str(entry.fields.get("client", "")):
            clients[name] = update_status(clients.get(name, ClientStatus(name)), entry)
    return clients


def update_status(client: ClientStatus, entry: Entry) -> ClientStatus:
    """Return the status of a client after one more entry of the log."""
    fields = entry.fields
    seen = replace(client, seen_ms=entry.unix_ms)
    # Its work may go on beside a refusal, which only its next hello ends.
    here = seen if client.state in ("connected", "refused") else replace(seen, state="loading")
    prefix = f"round {fields['round']}: " if fields.get("round") else ""
    match entry.kind:
        case "asked":
            # No sign of life: the server has asked, and the client may be away.
            return replace(client, down=client.down + fields["bytes"])
        case "hello":
            return replace(seen, state="connected" if client.state == "connected" else "loading")
        case "connected":
            back = client.state in ("refused", "loading", "away")
            return replace(seen, state="connected", error="" if back else client.error)
        case "answered":
            return replace(here, up=client.up + fields["bytes"])
        case "used":
            # What went wrong before is over: its update has come, and was used.
            return replace(client, state="connected", rounds=client.rounds + 1, error="")
        case "declined" if fields["veto"] == "SCORES_NOT_ALLOWED":
            return here  # what the site has chosen is no error
        case "unused" | "declined" | "rival" | "dropped":
            return replace(client, error=f"{prefix}{fields['reason']}")
        case "refused" | "unfit":
            # At the door, or for what its profile says; a refusal of one transfer leaves it connected.
            shut = entry.kind == "unfit" or fields.get("code") in SHUT
            return replace(seen, state="refused" if shut else client.state, error=f"{fields['reason']}")
        case "informed":  # that there is no work left: it goes by itself
            return replace(seen, state="away")
        case "lost" | "left":
            error = f"{prefix}{fields['reason']}" if "reason" in fields else client.error
            return replace(client, state=client.state if client.state == "refused" else "away", error=error)
        case _:
            return here


def load_audit_history(path: Path, *, head: str | None = None) -> AuditHistory:
    """Return the audit log of a run, of a site's state folder, or of a file, its chain verified.

    Args:
        path: of the directory, the folder or the file.
        head: SHA-256 (hex) of an entry that was noted earlier, and must be in the log.

    Raises:
        StoreError: if there is no log, its chain is broken, or the head is not in it.
    """
    places = [path / LINK / AUDIT, path / AUDIT, path]
    file = next((place for place in places if audit_files.exists(place)), places[0])
    history = audit_log.read_audit_log(file)
    # An entry anywhere, since the log has grown since its head was noted.
    if head is not None and head.lower() not in audit_log.record_digests(file):
        raise StoreError(f"{file}: expected an entry of digest {head[:16]}; got none; the log was cut or written anew")
    return history


def verify_receipts(run: Path, state: Path) -> int:
    """Compare a site's receipts with a run's journal, and return their number.

    A receipt names the number of the journal's records when it was given, and the digest of the last. It proves that a
    journal was cut or written anew afterwards, also if the server itself did it.

    Args:
        run: the run directory.
        state: the site's state folder.

    Raises:
        StoreError: naming the receipt that differs, or if the site has none of this run.
    """
    folder, heads = state / "runs" / read_run_id(run), list[str]()
    end = journal.read(run / "journal", lambda record: heads.append(record.prev))
    # heads[n] is the head after n records.
    heads.append(end.head)
    total = 0
    for path in sorted(folder.glob("*/receipt")):
        with store_errors(path):
            data = path.read_bytes()
        try:
            receipt = parse(pb.Header(), parse(pb.Envelope(), data).header).receipt
        except WireError as error:
            raise StoreError(f"{path}: {error}; the state folder is damaged") from None
        # Given before the run had a journal.
        if not receipt.journal_records:
            continue
        actual = heads[receipt.journal_records] if receipt.journal_records < len(heads) else "nothing"
        if actual != receipt.journal_head.hex():
            raise StoreError(
                f"{path}: expected the journal of {run} to have the head {receipt.journal_head.hex()[:16]} after "
                f"{receipt.journal_records} records, as was signed; got {actual[:16]}; it was cut or written anew"
            )
        total += 1
    if not total:
        raise StoreError(f"{folder}: expected receipts of the run {run}; got none; name the site's state folder")
    return total


def read_run_id(run: Path) -> str:
    """Return the run's id on the link; empty if it was never served."""
    path = run / LINK / ID
    with store_errors(path):
        # A damaged one is shown as it is; a number that is none has no receipts.
        return path.read_bytes().strip().decode(errors="replace") if path.exists() else ""
