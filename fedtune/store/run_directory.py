"""The run directory itself, its recipe.toml, its partition.jsonl and its summary.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedtune.errors import StoreError
from fedtune.store.files import store_errors, write_text
from fedtune.store.typed_json import nan_to_null

VERSION = 1
"""Of rounds.jsonl and of summary.json."""
SUMMARY_ADVICE = "delete it and resume the run, which writes it again"
PARTITION = "partition.jsonl"
REMEDY = "put back a copy of the run directory, or start the run again with --fresh"


def check_vacant(path: Path, *, fresh: bool = False) -> Path:
    """Make and return an empty run directory: `path`, or with `fresh` the next free one: demo, demo-2, demo-3, ...

    Raises:
        StoreError: if it holds something already and `fresh` is off, or cannot be made.
    """
    chosen = vacant(path, fresh=fresh)
    with store_errors(path):
        # Not durable yet: the journal syncs the name when the run begins.
        chosen.mkdir(parents=True, exist_ok=True)
    return chosen


def vacant(path: Path, *, fresh: bool = False) -> Path:
    """Return the folder that `check_vacant` would make, and make nothing.

    Raises:
        StoreError: if it holds something already and `fresh` is off.
    """
    with store_errors(path):
        number, chosen = 2, path
        while chosen.exists() and (not chosen.is_dir() or any(chosen.iterdir())):
            if not fresh:
                raise StoreError(
                    f"{path}: expected a new or an empty folder; it holds a run or other files; "
                    "pass --resume to continue a run, --fresh to start another run beside it, --out to choose a folder"
                )
            chosen, number = path.with_name(f"{path.name}-{number}"), number + 1
    return chosen


def write_recipe(run: Path, recipe: str) -> None:
    write_text(run / "recipe.toml", recipe)


def write_partition(run: Path, partition: str) -> None:
    """Write who holds which rows; nothing where that is not known."""
    if partition:
        write_text(run / PARTITION, partition)


def partition_digest(run: Path) -> str:
    """Return the SHA-256 (hex) of partition.jsonl; empty where there is none."""
    path = run / PARTITION
    with store_errors(path):
        return sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def write_summary(run: Path, summary: Mapping[str, Any]) -> None:
    write_text(
        run / "summary.json", json.dumps(nan_to_null({"version": VERSION, **summary}), indent=1, allow_nan=False) + "\n"
    )


def read_summary(run: Path) -> Mapping[str, Any] | None:
    """Return the content of summary.json; None where there is none.

    Raises:
        StoreError: if it is damaged, or of another version.
    """
    path = run / "summary.json"
    if not path.exists():
        return None
    with store_errors(path):
        data = path.read_bytes()
    try:
        content = json.loads(data.decode("utf-8"))
    # RecursionError: brackets within brackets, thousands deep.
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: expected JSON; got {str(error)[:100]}; {SUMMARY_ADVICE}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if not isinstance(content, dict) or version != VERSION:
        raise StoreError(f"{path}: expected version {VERSION}; got {version!r}; read it with the fedtune that wrote it")
    return content


def summary_digest(run: Path) -> str:
    """Return the SHA-256 (hex) of summary.json; empty where there is none."""
    path = run / "summary.json"
    with store_errors(path):
        return sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def check_run(run: Path) -> None:
    """Refuse what is no run directory; a run that was killed is one, though it has no summary.

    Raises:
        StoreError: if there is no recipe.toml.
    """
    if not (run / "recipe.toml").is_file():
        raise StoreError(f"{run}: expected a run directory (with recipe.toml); make one with fedtune simulate")


def check_records(run: Path) -> None:
    """Refuse what has neither a recipe nor rounds; of a run that was copied in part the rounds are enough to show it.

    Raises:
        StoreError: if there is no recipe.toml and no rounds.jsonl.
    """
    if not (run / "rounds.jsonl").is_file():
        check_run(run)
