"""Reading rows: files, saved data sets and hub names become one data set with canonical columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk

from fedtune.data.files import ENDINGS, Table, from_rows, read_file, with_class_names
from fedtune.data.partition import sorted_values
from fedtune.data.paths import Place, group_names, places
from fedtune.data.rows import absent, cells, choose, read_parts
from fedtune.data.settings import GROUP, DataSettings, Task
from fedtune.errors import ConfigError, Fault

HUB_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, pa.ArrowException)
"""What `datasets` raises for a name that it cannot read."""


@dataclass(frozen=True)
class Source:
    """Rows with canonical columns, and where each of them was read."""

    rows: Dataset
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


def load(settings: DataSettings, root: Path, *, task: Task) -> Dataset:
    """Return the training rows: the parts that the task uses (text, messages, instruction, ...), and group.

    Every value is text, a conversation's is JSON; labels are class names where the source knows them.

    Raises: ConfigError as `read_source`.
    """
    return read_source(settings, root, task=task).rows


def load_test(settings: DataSettings, root: Path, *, task: Task) -> Dataset | None:
    """Return the rows of `settings.test` without groups, or None if there is no separate test data."""
    source = read_test(settings, root, task=task)
    return None if source is None else source.rows


def read_source(settings: DataSettings, root: Path, *, task: Task) -> Source:
    """Return the training rows and where each was read.

    Local files are read whole, here and not by `load_dataset`, which would copy them into a cache and report each use
    of its readers to the hub.

    Raises: ConfigError if a file is missing or malformed, a column is absent, or a cell is empty that must not be.
    """
    return _read(settings, root, settings.source, task=task, key="data.source", grouped=True)


def read_test(settings: DataSettings, root: Path, *, task: Task) -> Source | None:
    """Return the rows of `settings.test` without groups, or None if there is no separate test data.

    Raises: ConfigError as `read_source`.
    """
    if settings.test is None:
        return None
    return _read(settings, root, settings.test, task=task, key="data.test", grouped=False)


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
        table = stored_table(given) if isinstance(given, Dataset) else _given_table(given, where)
        if not table.count:
            raise ConfigError(Fault("data", "at least one row for every client", f"none for {client!r}"))
        chosen = choose(settings, table.names, where, task)
        parts = {**read_parts(chosen, table, where), GROUP: [client] * table.count}
        _append(read, parts, "data", where)
        files.append((where, table.count))
        notes += [chosen.note] if chosen.note else []
    return Source(Dataset.from_dict(read), files, list(dict.fromkeys(notes)))


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
    chosen_places, note = places([source] if isinstance(source, str) else source, settings.format, root, key)
    names = group_names([place.name for place in chosen_places]) if grouped and by_file else []
    notes, files = [note] if note else [], []
    for number, place in enumerate(chosen_places):
        table = _table(place, settings, key)
        if not table.count:
            raise ConfigError(Fault(key, "at least one row", f"none in {place.name}"))
        chosen = choose(settings, table.names, place.name, task)
        parts = dict(read_parts(chosen, table, place.name))
        if names:
            parts[GROUP] = [names[number]] * table.count
        elif grouped and by is not None:
            if by not in table.names:
                raise ConfigError(absent("data.split.by", by, table.names, place.name))
            parts[GROUP] = cells(GROUP, table.column(by), f"column {by!r} of {place.name}")
        _append(rows, parts, key, place.name)
        files.append((place.name, table.count))
        notes += [chosen.note] if chosen.note else []
    return Source(Dataset.from_dict(rows), files, list(dict.fromkeys(notes)))


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
    return _read_stored(place, settings, key)


def _read_stored(place: Place, settings: DataSettings, key: str) -> Table:
    """Return what `datasets` itself stores: a saved data set, or the split of a hub data set."""
    form, streaming = place.form, settings.streaming and key == "data.source"
    name, _, split = place.name.partition(":") if form == "hub" else (place.name, "", "")
    try:
        if form != "hub":
            data = load_from_disk(name)
        elif streaming:
            data = load_dataset(name, settings.subset, split=split or "train", streaming=True)
            return _read_stream(data, settings.limit)
        else:
            # Data scripts are code from the network; `datasets` 4 and later refuse to run them, and so does fedtune.
            data = load_dataset(name, settings.subset, split=split or "train")
    except HUB_ERRORS as error:
        expected = "a reachable hub name or an existing path" if form == "hub" else "a folder made by save_to_disk"
        hint = "give a local path, or download it once and set HF_HOME" if form == "hub" else "save it again"
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(Fault(key, expected, f"{place.name!r} ({reason})", hint)) from error
    if isinstance(data, DatasetDict):
        if "train" not in data:
            raise ConfigError(Fault(key, "a data set with a split 'train'", f"{', '.join(data)} in {name}"))
        data = data["train"]
    return stored_table(data)


def stored_table(data: Dataset) -> Table:
    """Return a data set as a table, classes by their names."""
    classes = {name: kind.names for name, kind in data.features.items() if isinstance(kind, ClassLabel)}

    def column(name: str) -> Sequence[Any]:
        # Through the data set, not its table: one that was filtered or shuffled holds the rows' places beside it.
        values = data.select_columns([name]).with_format("arrow")[:].column(name).to_pylist()
        return with_class_names(values, classes[name]) if name in classes else values

    return Table(list(data.column_names), len(data), column)


def _read_stream(data: Iterable[Mapping[str, Any]], limit: int | None) -> Table:
    """Return the first rows of a stream, classes by their names where it knows them."""
    table = from_rows([dict(row) for row in islice(data, limit)])
    kinds = dict(getattr(data, "features", None) or {})
    classes = {name: kind.names for name, kind in kinds.items() if isinstance(kind, ClassLabel)}
    columns = {name: table.column(name) for name in table.names}
    named = {name: with_class_names(values, classes[name]) for name, values in columns.items() if name in classes}
    return Table(table.names, table.count, lambda name: named.get(name, columns[name]))


def _given_table(given: Any, where: str) -> Table:
    rows = list(given)
    if not all(isinstance(row, Mapping) for row in rows):
        raise ConfigError(Fault("data", "a Dataset, or a sequence of mappings from column to value", where))
    return from_rows(rows)
