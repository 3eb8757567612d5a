"""From a `Recipe` back to TOML, to a digest, and to what differs between two of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import Any

from fedtune.config.recipe import ARM_KEYS, Override, Recipe

TABLES: Mapping[str, str] = {
    "model": "the base that every client holds, frozen",
    "adapter": "what is trained on top of it",
    "method": "what is sent, and how the server combines it",
    "planner": "what each client is asked to do",
    "pruning": "how clients' models are made smaller",
    "personal": "a model of its own for each client",
    "client": "how a client trains in one round",
    "descend": "how a client that descends trains in one round",
    "rounds": "how many rounds, and who takes part",
    "asynchronous": "when a round ends that does not wait for its clients",
    "data": "where the examples come from, and who holds which",
    "evaluate": "when and on how much the global model is scored",
    "fleet": "which devices the clients are taken to be",
    "engine": "what runs the clients on this machine",
    "report": "what is written beside the records",
    "search": "which settings fedtune search tries",
}
OUTCOME_FREE = ("name", "engine", "report", "search", "root", "objects")
"""Fields of a recipe that change neither the adapter nor its scores."""


def render(recipe: Recipe) -> str:
    """Return the recipe as TOML with all defaults written out; `bind(render(recipe)) == recipe`."""
    lines = ["# As bound: every value, defaults included.", *entries({"name": recipe.name, "seed": recipe.seed})]
    for table, comment in TABLES.items():
        if getattr(recipe, table) is not None:
            lines += ["", f"# {comment}", f"[{table}]", *entries(table_of(getattr(recipe, table)))]
    for override in recipe.override:
        lines += ["", "[[override]]", *entries(override_keys(override))]
    for device in recipe.device:
        profile = {} if device.profile is None else {"profile": device.profile}
        lines += ["", "[[device]]", *entries({"clients": device.clients} | profile | dict(device.fields))]
    return "\n".join(lines) + "\n"


def entries(table: Mapping[str, Any]) -> Iterator[str]:
    return (f"{key} = {toml(value)}" for key, value in table.items())


def table_of(settings: Any) -> dict[str, Any]:
    """Return the keys of a settings dataclass, without those that are none and would be none when left out."""
    values = {each.name: (getattr(settings, each.name), each.default) for each in written_fields(settings)}
    return {key: value for key, (value, default) in values.items() if value is not None or default is not None}


def written_fields(settings: Any) -> Iterator[Field[Any]]:
    """Yield the fields of a dataclass that count: those marked `omit_default` only where they differ from it."""
    for field in fields(settings):
        if not (field.metadata.get("omit_default") and getattr(settings, field.name) == field.default):
            yield field


def plain(value: Any) -> Any:
    """Return settings as nested mappings, with the fields that count."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in written_fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return tuple(map(plain, value)) if isinstance(value, tuple | list) else value


def tables(recipe: Recipe) -> dict[str, Any]:
    """Return everything in a recipe that changes the result."""
    parts = {field.name: getattr(recipe, field.name) for field in written_fields(recipe)}
    return {name: plain(part) for name, part in parts.items() if name not in OUTCOME_FREE}


def override_keys(override: Override) -> dict[str, Any]:
    rank: dict[str, Any] = {} if override.rank is None else {"rank": override.rank}
    rank |= {key: value for key in ("ratio", *ARM_KEYS) if (value := getattr(override, key)) is not None}
    verb = {} if override.verb is None else {"verb": override.verb}
    descend = {"descend": dict(override.descend)} if override.descend else {}
    return {"clients": override.clients} | rank | verb | descend | dict(override.training) | dict(override.resources)


def toml(value: Any) -> str:
    """Return a value as TOML writes it; None is "none"."""
    if is_dataclass(value) and not isinstance(value, type):
        value = table_of(value)
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {toml(v)}' for key, v in value.items())} }}" if value else "{}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's too, but for the delete character, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return '"none"' if value is None else f"[{', '.join(map(toml, value))}]"


def digest(recipe: Recipe) -> str:
    """Return the SHA-256 of everything in the recipe that changes the result: not its name, folder, engine or report.

    Local data and models count by their absolute path; what is in the files is for others to digest.
    """
    return hashlib.sha256(json.dumps(tables(recipe), sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def changes(old: Recipe, new: Recipe) -> Sequence[str]:
    """Return a line `client.steps: 10 -> 20` for each key that changes the result and differs."""
    before, after = flat(tables(old)), flat(tables(new))
    return [
        f"{key}: {toml(before.get(key))} -> {toml(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def flat(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return the leaves of nested tables by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in table.items():
        leaves |= flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return leaves
