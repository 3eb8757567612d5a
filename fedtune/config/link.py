"""A server's own file: how it listens, with which patience and quotas; nothing in it changes what a run computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.config.reading import apply_overrides, read
from fedtune.config.tables import bind_table, unknown_keys
from fedtune.errors import ConfigError, Fault
from fedtune.link.settings import EnrolmentSettings, LinkSettings

TABLES = ("link", "enrolment")


def bind_link(path: Path | None, overrides: tuple[str, ...] = ()) -> tuple[LinkSettings, Path]:
    """Read, check and freeze how a server listens; see `bind_server`."""
    settings, _, root = bind_server(path, overrides)
    return settings, root


def bind_server(path: Path | None, overrides: tuple[str, ...] = ()) -> tuple[LinkSettings, EnrolmentSettings, Path]:
    """Read, check and freeze a server file; without one, and without overrides, everything has its default.

    Returns: the settings of link and enrolment, and the folder that paths in them are relative to.

    Raises:
        ConfigError: with every fault at once, or the reason why the file cannot be read.
    """
    if path is not None and not path.is_file():
        raise ConfigError(Fault("", "a server file in TOML", f"none at {path}"), source=str(path))
    faults: list[Fault] = []
    label, root = "server", Path.cwd()
    tables: Mapping[str, Any] = {}
    if path is not None:
        label, _, root, tables = read(path)
    table = apply_overrides(tables, overrides, faults)
    faults.extend(unknown_keys(table, TABLES, ""))
    settings = bind_table(LinkSettings, table.get("link", {}), "link", faults)
    enrolment = bind_table(EnrolmentSettings, table.get("enrolment", {}), "enrolment", faults)
    if faults:
        raise ConfigError(faults, source=label)
    return settings, enrolment, root
