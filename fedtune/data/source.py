"""Reading rows: files, saved data sets and hub names become one data set with canonical columns."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.data.files import ENDINGS, read_file, without_package
from fedtune.data.partition import sorted_values
from fedtune.data.paths import Place, group_names, places
from fedtune.data.presets import naming_file
from fedtune.data.rows import absent, cells, choose, read_parts
from fedtune.data.settings import GROUP, DataSettings, Task
from fedtune.data.table import Table, concatenate, from_rows, table_of
from fedtune.errors import ConfigError, Fault


@dataclass(frozen=True)
class Source:
    """Rows with canonical columns, and where each of them was read."""

    rows: Table
    files: Sequence[tuple[str, int]]
    """Each file, data set or client, with its number of rows, in order."""
    notes: Sequence[str] = ()
    """What a user should know: files that were named twice, columns that are not used."""

    def place(self, row: int) -> str:
        """Return where a row was read, for messages."""
        for name, count in self.files:
            if row < count:
                return f"row {row + 1} of {name}"
            row -= count
        return f"row {row + 1}"


def read_source(settings: DataSettings, root: Path, *, task: Task) -> Source:
    """Return the training rows and where each was read.

    Local files are read whole, here and not by `load_dataset`, which would copy them into a cache and report each use
    of its readers to the hub.

    Raises: ConfigError if a file is missing or malformed, a column is absent, or a cell is empty that must not be.
    """
    read = _read(settings, root, settings.source, task=task, key="data.source", grouped=True)
    _check_hub_keys(settings, root)
    return read


def _check_hub_keys(settings: DataSettings, root: Path) -> None:
    """Refuse keys of hub data sets where neither the training nor the test rows come from a hub."""
    given = {"data.subset": settings.subset, "data.revision": settings.revision}
    wrong = {key: value for key, value in given.items() if value is not None}
    sources = {"data.source": settings.source, "data.test": settings.test or []} if wrong else {}
    named = [
        place
        for key, source in sources.items()
        for place in places([source] if isinstance(source, str) else source, settings.format, root, key)[0]
    ]
    if wrong and not any(place.form == "hub" for place in named):
        expected, hint = f"none for local files, such as {named[0].name}", "leave it out: only hub data sets have it"
        raise ConfigError([Fault(key, expected, repr(value), hint) for key, value in wrong.items()])


def read_test(settings: DataSettings, root: Path, *, task: Task) -> Source | None:
    """Return the rows of `settings.test`, with groups only to match them; None if there is no separate test data.

    Raises: ConfigError as `read_source`.
    """
    if settings.test is None:
        return None
    grouped = settings.split.match is not None
    return _read(settings, root, settings.test, task=task, key="data.test", grouped=grouped)


def read_rows(settings: DataSettings, rows: Mapping[str, Any], *, task: Task) -> Source:
    """Return the rows that Python code gives by client, as `read_source` returns those of files: group is the client.

    Args:
        settings: the recipe's table `data`; its source and its split are not read.
        rows: by client, a `datasets.Dataset` or a sequence of mappings from column to value.
        task: which parts are read.

    Raises: ConfigError as `read_source`.
    """
    read: dict[str, list[str]] = {}
    files, notes = [], list[str]()
    for client, given in sorted(rows.items()):
        where = f"the rows of {client!r}"
        table = _given_table(given, where)
        if not table.count:
            raise ConfigError(Fault("data", "at least one row for every client", f"none for {client!r}"))
        chosen = choose(settings, table.names, where, task)
        parts = {**read_parts(chosen, table, where), GROUP: [client] * table.count}
        _append(read, parts, "data", where)
        files.append((where, table.count))
        notes += [chosen.note] if chosen.note else []
    return Source(table_of(read), files, list(dict.fromkeys(notes)))


def read_whole(settings: DataSettings, rows: Any, *, task: Task, key: str) -> Source:
    """Return rows that Python code gives together, as `read_source` returns those of a file: the split divides them.

    Args:
        settings: the recipe's table `data`.
        rows: a `datasets.Dataset` or a sequence of mappings from column to value.
        task: which parts are read.
        key: `data.source`, or `data.test` for test rows, which have groups only to match them.

    Raises: ConfigError as `read_source`.
    """
    where = "the rows that Python gives" if key == "data.source" else "the test rows that Python gives"
    table = _given_table(rows, where)
    grouped = key == "data.source" or settings.split.match is not None
    parts, notes = _parts(settings, table, where, task=task, key=key, by=settings.split.by if grouped else None)
    return Source(table_of(parts), [(where, table.count)], notes)


def read_original(settings: DataSettings, root: Path, source: str | Sequence[str], *, key: str) -> Table:
    """Return rows in the order of `read_source` or `read_test`, with every column as the files have it.

    Raises: ConfigError if a file is missing or malformed.
    """
    with naming_file(settings.preset):
        chosen, _ = places([source] if isinstance(source, str) else source, settings.format, root, key)
    rows = concatenate([_table(place, settings, key) for place in chosen])
    # Read once here: every client takes its rows of every column.
    return Table(rows.names, rows.count, {name: rows.column(name) for name in rows.names}.__getitem__)


def labels_of(settings: DataSettings, root: Path) -> Sequence[str]:
    """Return the labels that occur in a site's own rows, or those of `data.labels`; no other column is read.

    Raises: ConfigError as `read_source`.
    """
    if settings.labels:
        return settings.labels
    labels: set[str] = set()
    sources = [settings.source] if isinstance(settings.source, str) else settings.source
    for place in places(sources, settings.format, root, "data.source")[0]:
        table = _table(place, settings, "data.source")
        column = choose(settings, table.names, place.name, "classification").columns["label"]
        labels |= set(cells("label", table.column(column), f"column {column!r} of {place.name}"))
    return sorted_values(labels)


def _read(
    settings: DataSettings, root: Path, source: str | Sequence[str], *, task: Task, key: str, grouped: bool
) -> Source:
    by, by_file = settings.split.by, settings.split.kind == "files"
    rows: dict[str, list[str]] = {}
    with naming_file(settings.preset):
        chosen_places, note = places([source] if isinstance(source, str) else source, settings.format, root, key)
    names = group_names([place.name for place in chosen_places]) if grouped and by_file else []
    notes, files = [note] if note else [], []
    for number, place in enumerate(chosen_places):
        table = _table(place, settings, key)
        parts, remarks = _parts(settings, table, place.name, task=task, key=key, by=by if grouped else None)
        if names:
            parts[GROUP] = [names[number]] * table.count
        _append(rows, parts, key, place.name)
        files.append((place.name, table.count))
        notes += remarks
    return Source(table_of(rows), files, list(dict.fromkeys(notes)))


def _parts(
    settings: DataSettings, table: Table, where: str, *, task: Task, key: str, by: str | None
) -> tuple[dict[str, Sequence[str]], list[str]]:
    """Return the parts of one table, with its groups by the column `by`, and what a user should know of them."""
    if not table.count:
        raise ConfigError(Fault(key, "at least one row", f"none in {where}"))
    chosen = choose(settings, table.names, where, task)
    parts = dict(read_parts(chosen, table, where))
    if by is not None:
        if by not in table.names:
            raise ConfigError(absent("data.split.by", by, table.names, where))
        parts[GROUP] = cells(GROUP, table.column(by), f"column {by!r} of {where}")
    return parts, [chosen.note] if chosen.note else []


def _append(rows: dict[str, list[str]], parts: Mapping[str, Sequence[str]], key: str, where: str) -> None:
    """Add the rows of one file to those of the files before it, which must have the same parts."""
    if rows and rows.keys() != parts.keys():
        first = "client" if key == "data" else "file"
        expected = f"the columns of the first {first} ({', '.join(part for part in rows if part != GROUP)})"
        got = f"{', '.join(part for part in parts if part != GROUP) or 'none'} in {where}"
        raise ConfigError(Fault(key, expected, got, "give files of one layout"))
    for part, values in parts.items():
        rows.setdefault(part, []).extend(values)


def _table(place: Place, settings: DataSettings, key: str) -> Table:
    if place.form in ENDINGS.values():
        if settings.streaming and key == "data.source":
            expected = "a hub data set, with data.streaming"
            raise ConfigError(Fault("data.source", expected, place.name, "leave streaming out: files are local"))
        return read_file(Path(place.name), place.form, key)
    try:
        from fedtune.data.stored import read_hub, read_saved
    except ModuleNotFoundError as error:
        got = f"{place.name!r}, which is no file here," if place.form == "hub" else place.name
        raise without_package("datasets", "saved data sets and those of a hub", got) from error
    with naming_file(settings.preset if place.form == "hub" else None):
        return read_hub(place.name, settings, key) if place.form == "hub" else read_saved(place.name, key)


def _given_table(given: Any, where: str) -> Table:
    # Rows of `datasets` come from code that has imported it: reading others loads nothing of it.
    kind = getattr(sys.modules.get("datasets"), "Dataset", ())
    if isinstance(given, kind):
        from fedtune.data.stored import stored_table

        return stored_table(given)
    rows = list(given)
    if not all(isinstance(row, Mapping) for row in rows):
        raise ConfigError(Fault("data", "a Dataset, or a sequence of mappings from column to value", where))
    return from_rows(rows)
