"""What a served run's directory says: its id, its pinned base, the updates it has accepted, its result."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.config import Recipe, render
from fedtune.link import audit_files, audit_log, uploads
from fedtune.store import journal, manifest, result
from fedtune.store.files import write_text
from fedtune.store.history import has_begun
from fedtune.store.journal import Record
from fedtune.store.run_directory import read_summary
from fedtune.store.verify import status as run_status

LINK, AUDIT, ID, SPOOL, BARRED, BASE = "link", "audit", "id", "spool", "barred", "base"
"""Names below a run directory: the folder of the link, and the files in it."""


def pinned_base(run: Path) -> str:
    """Return the digest (hex) of the base that the first client of a run had; empty before one has come."""
    path = run / LINK / BASE
    return path.read_text().strip() if path.exists() else ""


def pin_base(run: Path, digest: str) -> None:
    """Note which base a run is of, before anything is trained: after a restart no other one is taken either."""
    write_text(run / LINK / BASE, digest)


def complete_summary(run: Path, recipe: Recipe) -> Mapping[str, Any] | None:
    """Return the summary of a run that has no round left; None if there is work."""
    status = run_status(run)
    if not status.finished:
        return None
    content = read_summary(run)
    if content is None:
        return None  # a resume writes it
    # A run may have ended before its last round (rounds.patience).
    selection = content.get("selection", {})
    ended = isinstance(selection, dict) and selection.get("ended")
    return content if ended or status.committed >= recipe.rounds.count else None


def result_files(run: Path) -> Mapping[str, memoryview]:
    """Return the files of a run's result, by their names below the run directory; none if it has none.

    What the provenance says of each client, such as its number of examples, stays on the server.

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
    text = manifest.spell(facts) if opened.listed is None else manifest.encode(facts, opened.listed)
    return {f"{folder.name}/{name}": data for name, data in {**files, manifest.NAME: memoryview(text)}.items()}


def plan_text(recipe: Recipe, run: Path) -> str:
    """Return the recipe as sites get it: the same at a resume, although a base was pinned in the run's own meanwhile.

    Updates that a site has signed before name the digest of this text.
    """
    if pinned_base(run) == recipe.model.digest:
        recipe = replace(recipe, model=replace(recipe.model, digest=None))
    return render(recipe)


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
    """Return the run's id, drawn when it is served for the first time: replies of another run never match it."""
    path = run / LINK / ID
    if not path.exists():
        write_text(path, secrets.token_hex(8))
    return path.read_text().strip()


def accepted_updates(run: Path) -> tuple[Mapping[tuple[int, str], str], int]:
    """Return the digests (hex) of the updates that a run's journal accepts, by round and client, and its last round."""
    accepted, committed = dict[tuple[int, str], str](), 0
    if not has_begun(run):
        return accepted, committed

    def take(record: Record) -> None:
        nonlocal committed
        # Over the link each update has a blob of its own, named by its digest.
        if record.kind in ("accept", "close"):
            for client, offset, _ in record.fields["updates"]:
                if not offset:
                    accepted[record.fields["round"], client] = record.fields["blob"]
        elif record.kind == "commit":
            committed = record.fields["round"]

    journal.read(run / "journal", take)
    return accepted, committed
