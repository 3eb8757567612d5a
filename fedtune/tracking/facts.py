"""What a tracker learns of a run beside its rounds: flat parameters, versions and digests, and no client's name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

from fedtune.errors import StoreError
from fedtune.report.reader import recipe_table
from fedtune.store.history import has_begun
from fedtune.store.run_journal import RunJournal
from fedtune.tracking.tracker import Value

MOST_CHARACTERS = 250
"""Of a parameter's value; trackers cut or refuse longer ones."""
NAMES_CLIENTS = ("data.split.only",)
"""Keys whose values are names of clients; tables in lists, such as `override`, are only counted for the same reason."""
LISTS_FILES = ("data.source", "data.test")
"""Keys whose values are only counted where they are lists: a client may be named after its file."""
PACKAGES = ("fedtune", "torch", "transformers", "peft")


def parameters(run: Path) -> Mapping[str, Value]:
    """Return the recipe of a run by dotted key; of absolute paths the last part, which says nothing of this machine.

    Raises:
        StoreError: if the recipe is no TOML.
    """
    return dict(leaves(recipe_table(run)))


def leaves(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Value]]:
    """Yield the values of nested tables by dotted key, each as a number or a short text."""
    for name, value in table.items():
        key = f"{path}{name}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{key}.")
        elif isinstance(value, list) and (holds_tables(value) or key in LISTS_FILES + NAMES_CLIENTS):
            yield f"{key}.count", len(value)
        elif key not in NAMES_CLIENTS:
            yield key, plain(value)


def holds_tables(value: list[Any]) -> bool:
    return any(isinstance(part, Mapping) for part in value)


def plain(value: Any) -> Value:
    """Return a value as it is shown: numbers as they are, paths by their last part, all else as a text that is cut.

    >>> plain(3), plain("/data/bases/tiny-llama"), plain(["q_proj", "v_proj"])
    (3, 'tiny-llama', 'q_proj, v_proj')
    """
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, list):
        return ", ".join(str(plain(part)) for part in value)[:MOST_CHARACTERS]
    text = str(value)
    return (PurePath(text).name if PurePath(text).is_absolute() else text)[:MOST_CHARACTERS]


def tags(run: Path) -> Mapping[str, str]:
    """Return versions and digests of a run, as far as its directory has them; of a run in progress this machine's."""
    summary = read_leniently(run / "summary.json")
    base = summary.get("base", {}).get("digest") if isinstance(summary.get("base"), Mapping) else None
    versions = summary.get("versions")
    known = dict(versions) if isinstance(versions, Mapping) else dict(package_versions())
    facts = {
        **{f"version.{name}": text for name, text in known.items()},
        "base_digest": base or journal_base(run),
        "recipe_digest": summary.get("recipe_digest"),
        "state_digest": summary.get("state_digest"),
    }
    return {f"fedtune.{name}": str(text)[:MOST_CHARACTERS] for name, text in facts.items() if text}


def read_leniently(path: Path) -> Mapping[str, Any]:
    """Return a JSON object, or nothing if there is none: a tag that is missing must not keep the numbers back."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def journal_base(run: Path) -> str:
    """Return the digest of the base that the journal notes; empty where there is no journal."""
    try:
        return str(RunJournal.inputs(run).get("base", "")) if has_begun(run) else ""
    except StoreError:
        return ""


def package_versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
