"""The run directory: recipe.toml, rounds.jsonl, summary.json and the adapter, each whole at any moment."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.errors import StoreError
from fedtune.store import files
from fedtune.store.files import append_line, store_errors, write_text

VERSION = 1
"""Of the JSON lines and of the summary."""
REMEDY = "put back a copy of the run directory, or start the run again with --fresh"


def check_vacant(path: Path, *, fresh: bool = False) -> Path:
    """Make and return an empty run directory: `path`, or with `fresh` the next free one: demo, demo-2, demo-3, ...

    Raises:
        StoreError: if it holds something already and `fresh` is off, or cannot be made.
    """
    with store_errors(path):
        number, chosen = 2, path
        while chosen.exists() and (not chosen.is_dir() or any(chosen.iterdir())):
            if not fresh:
                raise StoreError(
                    f"{path}: expected a new or an empty folder; it holds a run or other files; "
                    "pass --resume to go on with it, --fresh to start another run beside it, --out to choose a folder"
                )
            chosen, number = path.with_name(f"{path.name}-{number}"), number + 1
        chosen.mkdir(parents=True, exist_ok=True)
    return chosen


def write_recipe(run: Path, recipe: str) -> None:
    write_text(run / "recipe.toml", recipe)


def append_round(run: Path, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Append one round's line to rounds.jsonl, and return the record as `read_rounds` will."""
    line = json.dumps(finite({"version": VERSION, **record}), allow_nan=False)
    append_line(run / "rounds.jsonl", line)
    return parse_line(line)


def read_rounds(run: Path) -> Sequence[Mapping[str, Any]]:
    """Return the records of rounds.jsonl, none if there is no such file; a torn last line is left out.

    Raises:
        StoreError: if a line is damaged, of another version, or not of the round after the one before it.
    """
    return scan(run / "rounds.jsonl")[0]


def mend_rounds(run: Path) -> None:
    """Cut a torn last line off rounds.jsonl and sync the others; only for the process that writes the run.

    A process that was killed may have left a whole line that is not synced: after a power cut it would be missing,
    though the run had gone on from it.

    Raises:
        StoreError: if more than that is wrong with it, or it cannot be written.
    """
    path = run / "rounds.jsonl"
    _, num_bytes = scan(path)
    if not path.exists():
        return
    with store_errors(path):
        descriptor = files.append_to(path)
        try:
            if os.fstat(descriptor).st_size > num_bytes:
                files.truncate(descriptor, num_bytes)
            files.sync(descriptor)
            files.sync_folder(run)
        finally:
            os.close(descriptor)


def scan(path: Path) -> tuple[Sequence[Mapping[str, Any]], int]:
    """Return the records of a file of rounds, and the bytes of their lines."""
    with store_errors(path):
        data = path.read_bytes() if path.exists() else b""
    *lines, rest = data.split(b"\n")
    records, num_bytes = list[Mapping[str, Any]](), 0
    for number, line in enumerate(lines, 1):
        try:
            record = parse_line(line)
            found = record["version"], record["round"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not rest:
                break  # a crash cut its writing short: what is whole was synced before it
            raise StoreError(f"{path}, line {number}: expected the record of a round; {error!r}; {REMEDY}") from error
        expected = VERSION, records[-1]["round"] + 1 if records else found[1]
        if found != expected:
            raise StoreError(
                f"{path}, line {number}: expected round {expected[1]} in version {expected[0]}; "
                f"got round {found[1]} in version {found[0]}; {REMEDY}"
            )
        records.append(record)
        num_bytes += len(line) + 1
    return records, num_bytes


def parse_line(line: str | bytes) -> Mapping[str, Any]:
    record: Mapping[str, Any] = json.loads(line)
    return record


def write_summary(run: Path, summary: Mapping[str, Any]) -> None:
    write_text(
        run / "summary.json", json.dumps(finite({"version": VERSION, **summary}), indent=1, allow_nan=False) + "\n"
    )


def check_run(run: Path) -> None:
    """Refuse what is no run directory; a run that was killed is one, though it has no summary.

    Raises:
        StoreError: if there is no recipe.toml.
    """
    if not (run / "recipe.toml").is_file():
        raise StoreError(f"{run}: expected a run directory (with recipe.toml); make one with fedtune simulate")


def finite(value: Any) -> Any:
    """Return a JSON value with null for every number that JSON cannot hold: the loss of a model that has diverged."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_summary(run: Path) -> Mapping[str, Any]:
    """Return the summary of a run.

    Raises:
        StoreError: if the folder is not a run directory, or its summary cannot be read.
    """
    check_run(run)
    path = run / "summary.json"
    with store_errors(path):
        text = path.read_text(encoding="utf-8")
    try:
        summary = json.loads(text)
    except json.JSONDecodeError as error:
        raise StoreError(f"{path}: expected JSON; {error}; run the simulation again") from error
    if not isinstance(summary, dict) or summary.get("version") != VERSION:
        raise StoreError(f"{path}: expected a summary of version {VERSION}; it was written by another fedtune")
    return summary
