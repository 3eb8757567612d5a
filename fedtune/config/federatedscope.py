"""From a configuration of FederatedScope-LLM to a recipe: `fedtune import-fs`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from fedtune.config.error_text import nearest
from fedtune.config.fs_given import Given, Remark, Setting, Values, wrong
from fedtune.config.fs_keys import ARGUMENTS, GROUPS, KEYS, SWITCHES
from fedtune.config.fs_names import FREE, OTHERS, is_known
from fedtune.config.fs_options import asynchronous_part, method_part, personal_part, search_part
from fedtune.config.fs_parts import client_part, data_part, model_part, rounds_part, run_part
from fedtune.config.render import entries, toml


@dataclass(frozen=True)
class Entry:
    """What became of one key of the file."""

    key: str
    value: Any
    ours: Sequence[str]
    """The recipe's lines that it has made, such as `client.steps = 30`."""
    note: str
    known: bool = True
    """Whether FederatedScope has such a key."""


@dataclass(frozen=True)
class Converted:
    """A recipe's tables, and what became of every key."""

    tables: Mapping[str, Any]
    entries: Sequence[Entry]
    """One for each key of the file, in its order."""
    defaults: Sequence[str]
    """Lines of the recipe that FederatedScope's own defaults have made."""


Part: TypeAlias = Callable[["Given"], Iterator[Setting | Remark]]


def convert(
    values: Values, *, base: str | None = None, data: str | None = None, space: Values | None = None
) -> Converted:
    """Return the recipe that a configuration is, and what became of each of its keys.

    Args:
        values: by dotted key; see `read_yaml`.
        base: in place of the model that it names.
        data: a file, in place of the data that it names.
        space: what is in the file that `hpo.ss` names, by dotted key; None where it is not here.

    Raises:
        ConfigError: naming the key of a value that is none of its type, or whose meaning is not to be had.
    """
    for key in ARGUMENTS:
        if values.get(key) not in (None, [], {}):
            raise wrong(key, "a list of one table of arguments", values[key])
    given = Given(values, space_by_key(space or {}))
    items = [item for part in PARTS for item in part(given)]
    settings = [item for item in items if isinstance(item, Setting)]
    if base is not None:
        settings = [Setting(s.path, base, s.of) if s.path == "model.base" else s for s in settings]
    if data is not None:
        others = [setting for setting in settings if setting.path != "data.source"]
        settings = [*others, Setting("data.source", data, ("data.type", "data.root"))]
    remarks = [item for item in items if isinstance(item, Remark)]
    entries = [entry_of(key, value, values, settings, remarks) for key, value in values.items()]
    defaults = [line(each) for each in settings if not any(key in values for key in each.of)]
    return Converted(tables_of(settings), entries, defaults)


def entry_of(key: str, value: Any, values: Values, settings: Sequence[Setting], remarks: Sequence[Remark]) -> Entry:
    """Return what became of one key."""
    if key not in KEYS and not is_known(key):
        return Entry(key, value, (), "; ".join(["no key of FederatedScope-LLM", *near_names(key)]), known=False)
    own = [remark.text for remark in remarks if remark.key == key]
    if lines := [line(setting) for setting in settings if key in setting.of]:
        note = KEYS[key].note if key in KEYS else ""
        return Entry(key, value, lines, "; ".join([*own, *([note] if note else [])]))
    switch = next((table for table in SWITCHES if key.startswith(table)), None)
    if switch is not None and key != f"{switch}use" and values.get(f"{switch}use", False) is False:
        return Entry(key, value, (), f"no effect: {switch}use is false")
    if key in KEYS:
        usual = "nothing to write: this is what a recipe does without a key" if KEYS[key].ours else KEYS[key].note
        return Entry(key, value, (), "; ".join(own or [usual]))
    why = next(why for start, why in GROUPS.items() if key.startswith(start))
    # A table that may hold any name: one that is almost that of a key may be a slip all the same.
    return Entry(key, value, (), "; ".join([*own, why, *near_names(key)]))


def near_names(key: str) -> Sequence[str]:
    """Return what an unknown key may have been meant as, in none or one phrase.

    >>> near_names("train.optimizer.lrr"), near_names("train.optimizer.nesterov")
    (['did you mean train.optimizer.lr?'], [])
    """
    if key in OTHERS:
        return []
    table = next((table for table in FREE if key.startswith(table)), "")
    names = [name.removeprefix(table) for name in (*KEYS, *OTHERS) if name.startswith(table)]
    near = nearest(key.removeprefix(table), names)
    return [f"did you mean {table}{near}?"] if near else []


def recipe_text(converted: Converted, source: str) -> str:
    """Return the recipe in TOML, with what has no counterpart as comments at its end."""
    lines = [f"# Imported from {source}, a configuration of FederatedScope-LLM"]
    tables = converted.tables
    lines += entries({key: value for key, value in tables.items() if not isinstance(value, Mapping)})
    for name, table in tables.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{name}]", *entries(table)]
    if converted.defaults:
        lines += ["", "# Not in the file; FederatedScope's defaults:", *comments(converted.defaults)]
    if left := [f"{entry.key} = {entry.value!r}: {entry.note}" for entry in converted.entries if not entry.ours]:
        lines += ["", "# Without a line here:", *comments(left)]
    if noted := [f"{entry.key}: {entry.note}" for entry in converted.entries if entry.ours and entry.note]:
        lines += ["", "# Read so:", *comments(noted)]
    return "\n".join(lines) + "\n"


def comments(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts as comments, without anything that would end one."""
    return (f"#   {' '.join(''.join(c if c.isprintable() else ' ' for c in text).split())}" for text in texts)


def line(setting: Setting) -> str:
    return f"{setting.path} = {toml(setting.value)}"


def tables_of(settings: Sequence[Setting]) -> dict[str, Any]:
    """Return settings as nested tables."""
    tables: dict[str, Any] = {}
    for setting in settings:
        *above, last = setting.path.split(".")
        node = tables
        for name in above:
            node = node.setdefault(name, {})
        node[last] = setting.value
    return tables


def space_by_key(space: Values) -> Mapping[str, Mapping[str, Any]]:
    """Return a search space by the keys that it is about.

    >>> space_by_key({"train.optimizer.lr.type": "float", "train.optimizer.lr.lower": 0.1})
    {'train.optimizer.lr': {'type': 'float', 'lower': 0.1}}
    """
    tables: dict[str, dict[str, Any]] = {}
    for key, value in space.items():
        about, _, name = key.rpartition(".")
        tables.setdefault(about, {})[name] = value
    return tables


PARTS: Sequence[Part] = (
    run_part,
    model_part,
    method_part,
    client_part,
    rounds_part,
    data_part,
    personal_part,
    asynchronous_part,
    search_part,
)
