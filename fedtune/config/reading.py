"""From a file, a text or tables, and the command line's `--set`, to one table in long form."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.errors import ConfigError, Fault

SHORT: Mapping[tuple[str, ...], str] = {
    ("method",): "name",
    ("planner",): "name",
    ("engine",): "name",
    ("fleet",): "name",
    ("method", "server_optimizer"): "name",
    ("method", "robust"): "name",
    ("data", "split"): "kind",
}
"""Tables that may be written as one word, and the key that the word then is."""


def read(source: Path | str | Mapping[str, Any]) -> tuple[str, str, Path, Mapping[str, Any]]:
    """Return the name for messages, the name of the run, the folder and the tables of a recipe."""
    if isinstance(source, Mapping):
        return "", "run", Path.cwd(), source
    if isinstance(source, str) and "\n" in source:
        return "", "run", Path.cwd(), parse(source, "the recipe")
    path = Path(source)
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        fault = Fault("", "a recipe file", "no such file", '"fedtune demo --write recipe.toml" writes one')
        raise ConfigError(fault, source=str(source)) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path, or bytes that are not UTF-8
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(Fault("", "a recipe file in TOML, UTF-8", reason), source=str(source)) from None
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem)[:100].strip(".-") or "run"
    return path.name, stem, path.absolute().parent, parse(text, path.name)


def parse(text: str, label: str) -> Mapping[str, Any]:
    try:
        return tomllib.loads(text.removeprefix("\ufeff"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(Fault("", "TOML", str(error), "mind quotes and brackets there"), source=label) from None
    except RecursionError:
        raise ConfigError(Fault("", "TOML", "brackets nested too deeply"), source=label) from None


def apply_overrides(table: Mapping[str, Any], overrides: Sequence[str], faults: list[Fault]) -> dict[str, Any]:
    """Return the tables with short forms written out and each `a.b=c` put in place."""
    edited = expand_short_forms(copy.deepcopy(dict(table)))
    for override in overrides:
        key, equals, text = override.partition("=")
        path = [part.strip() for part in key.split(".")]
        if not equals or not all(path):
            faults.append(Fault(f"--set {override}", "table.key=value", "something else", "e.g. --set rounds.count=10"))
            continue
        node: Any = edited
        for part in path[:-1]:
            node = enter(node, part)
        if isinstance(node, dict):
            node[path[-1]] = value_of(text)
        else:
            faults.append(
                Fault(f"--set {override}", "a key inside a table", f"{'.'.join(path[:-1])}, which is no table")
            )
        edited = expand_short_forms(edited)
    return edited


def enter(node: Any, part: str) -> Any:
    """Return the table or list item below a node, made if the node is a table that lacks it."""
    if isinstance(node, list):
        return node[int(part)] if part.isdecimal() and int(part) < len(node) else None
    return node.setdefault(part, {}) if isinstance(node, dict) else None


def value_of(text: str) -> Any:
    """Return the TOML value that a text is, or the text itself.

    >>> value_of("3e-4"), value_of("[4, 8]"), value_of("flora")
    (0.0003, [4, 8], 'flora')
    """
    try:
        table = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return table["value"] if len(table) == 1 else text


def expand_short_forms(table: dict[str, Any]) -> dict[str, Any]:
    """Return the tables with one-word tables such as `method = "flora"` written out."""
    for (*above, last), key in SHORT.items():
        node: Any = table
        for part in above:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and isinstance(node.get(last), str):
            node[last] = {key: node[last]}
    return table
