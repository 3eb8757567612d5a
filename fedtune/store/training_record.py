"""What a run's journal proves of its training, in few bytes: its head, and a digest of each round's updates."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedtune.errors import StoreError
from fedtune.store import journal
from fedtune.store.journal import Record, canonical


def training_record(run: Path) -> Mapping[str, Any]:
    """Return number, journal head, rounds and versions of a run, as they go into the manifest of an export.

    A round's `set` is the SHA-256 of the canonical JSON of its accepted updates, sorted: of each the client, its blob,
    and the place of its bytes in there. With the journal it can be computed again; without it, it names no client.

    Raises:
        StoreError: if there is no journal, or it is damaged.
    """
    if not (run / "journal").exists():
        raise StoreError(f"{run}: expected a run with a journal; got none; give the folder of a run")
    started: dict[str, Any] = {}
    accepted: dict[int, list[Any]] = {}
    waiting: dict[str, list[Any]] = {}
    """Of an asynchronous run, by client: an accepted update that no round has used yet."""
    rounds: list[Mapping[str, Any]] = []

    def take(record: Record) -> None:
        fields = record.fields
        match record.kind:
            case "start":
                started.update({"run": fields["run"], "versions": fields["inputs"].get("versions", "")})
                started["recipe"] = fields["inputs"].get("recipe_digest", "")
            case "ask":
                for client in fields["clients"]:
                    waiting[client] = []
            case "accept" | "close" | "settle":
                for client, offset, length in fields["updates"]:
                    place = [client, fields["blob"], offset, length]
                    if client in waiting:
                        waiting[client] = place
                    else:
                        accepted.setdefault(fields["round"], []).append(place)
                for client in fields.get("used", ()):
                    accepted.setdefault(fields["round"], []).append(waiting[client])
            case "commit":
                number = fields["round"]
                places = sorted(accepted.pop(number, []))
                digest = sha256(canonical({"updates": places})).hexdigest()
                entry = {"round": number, "accepted": len(places), "set": digest, "state": fields["state"]}
                rounds.append(entry)

    end = journal.read(run / "journal", take)
    return {**started, "journal": {"records": end.count, "head": end.head}, "rounds": rounds}


def check_journal(run: Path, recorded: Mapping[str, Any]) -> None:
    """Hold the journal head that a manifest states against the run's journal, which may have grown since.

    Raises:
        StoreError: if the journal has another record there, or none: it was cut or written anew.
    """
    heads = list[str]()
    end = journal.read(run / "journal", lambda record: heads.append(record.prev))
    heads.append(end.head)
    stated = recorded.get("journal", {})
    number, head = (stated.get("records"), stated.get("head")) if isinstance(stated, dict) else (None, None)
    if not isinstance(number, int) or not 0 <= number < len(heads) or heads[number] != head:
        actual = heads[number][:16] if isinstance(number, int) and 0 <= number < len(heads) else "nothing"
        raise StoreError(
            f"{run / 'journal'}: expected the head {str(head)[:16]} after {number} records, as was signed; "
            f"got {actual}; the journal was cut or written anew, or is another run's"
        )
