"""Reading a YAML file of FederatedScope as plain values by dotted key; nothing of it can be code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedtune.errors import ConfigError, Fault, type_of

LARGEST = 2**20
"""Bytes of a file, at most."""
LISTED = (
    "llm.adapter.args",
    "data.splitter_args",
    "data.args",
    "llm.offsite_tuning.kwargs",
)
"""Keys whose value is a list with one table of arguments, which are named like keys below it."""


class _Loader(yaml.SafeLoader):
    """Reads plain values; without aliases, of which a small file could make a huge one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        events: Any = self
        if events.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="an alias", problem_mark=events.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise yaml.MarkedYAMLError(problem=f"{repeated[0]!r} twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Return the values of a file by dotted key, such as `train.optimizer.lr`.

    Raises:
        ConfigError: if it cannot be read, is no YAML, gives a key twice or holds no tables.
    """
    label = path.name
    try:
        content = path.read_bytes()
        if len(content) > LARGEST:
            raise ConfigError(Fault("", f"at most {LARGEST:,} bytes", f"{len(content):,}"), source=label)
        tables = yaml.load(content.decode("utf-8-sig"), Loader=_Loader)  # a SafeLoader
    except OSError as error:
        raise ConfigError(Fault("", "a YAML file", error.strerror or str(error)), source=str(path)) from error
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        got = f"{error.problem or 'something else'}{line}"
        raise ConfigError(Fault("", "YAML with each key once and no aliases", got), source=label) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        got = str(error).partition("\n")[0][:100] or type(error).__name__
        raise ConfigError(Fault("", "YAML in UTF-8", got), source=label) from error
    if not isinstance(tables, dict) or not tables:
        raise ConfigError(Fault("", "tables of settings", "nothing" if not tables else type_of(tables)), source=label)
    values: dict[str, Any] = {}
    try:
        for key, value in flat_values(tables):
            if key in values:  # spelt with dots beside a table
                raise ConfigError(Fault(key, "one value", "two", "leave one of them out"), source=label)
            values[key] = value
    except RecursionError:
        raise ConfigError(Fault("", "YAML", "tables nested too deeply"), source=label) from None
    return values


def flat_values(tables: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested tables by dotted key; of `LISTED` keys those of the one table in the list."""
    for name, value in tables.items():
        key = f"{prefix}{name}"
        if key in LISTED and isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, dict) and value:
            yield from flat_values(value, f"{key}.")
        else:
            yield key, value
