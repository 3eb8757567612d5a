"""What a served run's directory says: its id, its pinned base, the updates it has accepted, its result."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedtune.config import Recipe, render
from fedtune.errors import StoreError
from fedtune.link import audit_files, audit_log, provenance, uploads
from fedtune.link.provenance import Signer
from fedtune.store import journal, manifest, result
from fedtune.store.files import store_errors, write_text
from fedtune.store.history import History, has_begun, replay_journal
from fedtune.store.journal import Record
from fedtune.store.run_directory import read_summary
from fedtune.store.run_journal import RunJournal
from fedtune.store.training_record import training_record
from fedtune.store.verify import status as run_status

LINK, AUDIT, ID, SPOOL, BARRED, BASE = "link", "audit", "id", "spool", "barred", "base"
"""Names below a run directory: the folder of the link, and the files in it."""


def pinned_base(run: Path) -> str:
    """Return the digest (hex) of the base that the first client of a run had; empty before one has come."""
    path = run / LINK / BASE
    with store_errors(path):
        digest = path.read_bytes().strip().decode(errors="replace") if path.exists() else ""
    if digest and not re.fullmatch("[0-9a-f]{64}", digest):
        raise StoreError(f"{path}: expected the digest of a base, 64 hex digits; got {digest[:40]!r}; put back a copy")
    return digest


def pin_base(run: Path, digest: str) -> None:
    """Note which base a run is of, before anything is trained: after a restart no other one is taken either."""
    write_text(run / LINK / BASE, digest)


def complete_summary(run: Path, recipe: Recipe) -> Mapping[str, Any] | None:
    """Return the summary of a run that has no round left; None if there is work, or one of its files is damaged.

    A damaged result or summary is work: it is written again, from the state, as soon as sites say what their base is.
    """
    status = run_status(run)
    if not status.finished:
        return None
    try:
        content = read_summary(run)
        result_files(run)
    except StoreError:
        return None
    if content is None:
        return None
    # A run may have ended before its last round (rounds.patience).
    selection = content.get("selection", {})
    ended = isinstance(selection, dict) and selection.get("ended")
    return content if ended or status.committed >= recipe.rounds.count else None


def result_files(run: Path, signer: Signer | None = None) -> Mapping[str, memoryview]:
    """Return the files of a run's result, by their names below the run directory; none if it has none.

    What the provenance says of each client, such as its number of examples, stays on the server. With a signer a
    signed statement of the files comes with them, which each site verifies on arrival and anybody can later.

    Raises:
        StoreError: if a file was changed since it was written.
    """
    folder = result.folder(run)
    if not folder.exists():
        return {}
    opened = manifest.open_folder(folder)
    # Before the first byte leaves: every site would get the damage, signed.
    opened.check()
    files = {name: uploads.map_file(folder / name) for name in manifest.plain_files(folder)}
    facts = {key: value for key, value in opened.facts.items() if key != "clients"}
    if opened.listed is None:
        files[manifest.NAME] = memoryview(manifest.spell(facts))
    else:
        facts |= {"training": training_record(run)} if signer else {}
        text = manifest.encode(facts, opened.listed)
        files[manifest.NAME] = memoryview(text)
        if signer:
            digest = sha256(text).hexdigest()
            envelope = provenance.make_envelope(opened.listed, digest, facts, signer, now=int(time.time()))
            files[provenance.WIRE_NAME] = memoryview(envelope)
    return {f"{folder.name}/{name}": data for name, data in files.items()}


def sign_result(run: Path, signer: Signer) -> None:
    """Sign the result in a run directory; one that 0.2.0 wrote has no digests to sign, and stays as it is.

    Raises:
        StoreError: if a file was changed since it was written.
    """
    folder = result.folder(run)
    if folder.exists() and not result.remark(run):
        provenance.sign_folder(folder, signer, now=int(time.time()), training=training_record(run))


def plan_text(recipe: Recipe, run: Path) -> str:
    """Return the recipe as sites get it: the same at a resume, although a base was pinned in the run's own meanwhile.

    Updates that a site has signed before name the digest of this text.
    """
    if pinned_base(run) == recipe.model.digest:
        recipe = replace(recipe, model=replace(recipe.model, digest=None))
    return render(recipe)


def unsettled_orders(run: Path) -> Mapping[str, int]:
    """Return the rounds of the orders that the journal of an asynchronous run has not settled, by client."""
    history = replay_journal(run)[0] if has_begun(run) else History()
    return {name: order.round for name, order in history.sent.items()}


def informed_clients(path: Path) -> Collection[str]:
    """Return the clients that know by the audit log that the run is complete; none if more rounds have begun since."""
    informed = set[str]()
    for entry in audit_log.read_audit_log(path).entries if audit_files.exists(path) else ():
        if entry.kind == "informed":
            informed.add(str(entry.fields["client"]))
        elif entry.kind == "round":
            informed.clear()
    return informed


def run_id(run: Path) -> str:
    """Return the run's id, drawn when it is served for the first time: replies of another run never match it.

    Raises:
        StoreError: if it is no id, or another one than the journal notes.
    """
    path, noted = run / LINK / ID, noted_run_id(run)
    if not path.exists():
        write_text(path, noted or secrets.token_hex(8))
    with store_errors(path):
        number = path.read_bytes().strip().decode(errors="replace")
    # Under another number, the updates of its sites would count for another run, and its receipts for none.
    if not re.fullmatch("[0-9a-f]{16}", number) or noted not in ("", number):
        expected = f"the run's number {noted}, as the journal notes" if noted else "a number of 16 hex digits"
        advice = "remove the file: it is written again from there" if noted else "put back a copy of it"
        raise StoreError(f"{path}: expected {expected}; got {number[:40]!r}; {advice}")
    return number


def noted_run_id(run: Path) -> str:
    """Return the id that the journal of a served run notes; empty before it began, and of one that 0.2.0 began."""
    inputs = RunJournal.inputs(run) if has_begun(run) else {}
    return str(inputs.get("number", ""))


def accepted_updates(run: Path) -> tuple[Mapping[tuple[int, str], str], int]:
    """Return the digests (hex) of the updates that a run's journal accepts, by round and client, and its last round."""
    accepted, committed = dict[tuple[int, str], str](), 0
    if not has_begun(run):
        return accepted, committed

    asked = dict[str, int]()

    def take(record: Record) -> None:
        nonlocal committed
        # Over the link each update has a blob of its own, named by its digest.
        if record.kind in ("accept", "close", "settle"):
            for client, offset, _ in record.fields["updates"]:
                if not offset:
                    # Of an asynchronous run, an update may answer an order of an earlier round.
                    accepted[asked.get(client, record.fields["round"]), client] = record.fields["blob"]
        elif record.kind == "ask":
            asked.update(dict.fromkeys(record.fields["clients"], record.fields["round"]))
        elif record.kind == "commit":
            committed = record.fields["round"]

    journal.read(run / "journal", take)
    return accepted, committed
