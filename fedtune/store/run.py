"""The run directory: recipe.toml, rounds.jsonl, summary.json and the adapter, each whole at any moment."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.errors import StoreError
from fedtune.store.files import append_line, guarded, write_text

VERSION = 1
"""Of the JSON lines and of the summary."""


def vacant(path: Path, *, fresh: bool = False) -> Path:
    """Make and return an empty run directory: `path`, or with `fresh` the next free one: demo, demo-2, demo-3, ...

    Raises:
        StoreError: if it holds something already and `fresh` is off, or cannot be made.
    """
    with guarded(path):
        number, chosen = 2, path
        while chosen.exists() and (not chosen.is_dir() or any(chosen.iterdir())):
            if not fresh:
                raise StoreError(
                    f"{path}: expected a new or an empty folder; it holds a run or other files; "
                    "pass --fresh to start another run beside it, or --out to choose the folder"
                )
            chosen, number = path.with_name(f"{path.name}-{number}"), number + 1
        chosen.mkdir(parents=True, exist_ok=True)
    return chosen


def write_recipe(run: Path, recipe: str) -> None:
    write_text(run / "recipe.toml", recipe)


def append_round(run: Path, record: Mapping[str, Any]) -> None:
    """Append one round's line to rounds.jsonl."""
    append_line(run / "rounds.jsonl", json.dumps(finite({"version": VERSION, **record}), allow_nan=False))


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
    with guarded(path):
        text = path.read_text(encoding="utf-8")
    try:
        summary = json.loads(text)
    except json.JSONDecodeError as error:
        raise StoreError(f"{path}: expected JSON; {error}; run the simulation again") from error
    if not isinstance(summary, dict) or summary.get("version") != VERSION:
        raise StoreError(f"{path}: expected a summary of version {VERSION}; it was written by another fedtune")
    return summary
