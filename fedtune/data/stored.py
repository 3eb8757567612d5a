"""Reading what `datasets` itself stores: saved data sets, and those of a hub; imported where one is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk

from fedtune.data.settings import DataSettings
from fedtune.data.table import Table, from_rows, with_class_names
from fedtune.errors import ConfigError, Fault

HUB_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, pa.ArrowException)
"""What `datasets` raises for a name that it cannot read."""


def read_saved(name: str, key: str) -> Table:
    """Return the table in the folder of a saved data set; of several splits, `train`.

    Raises: ConfigError if `datasets` cannot read it.
    """
    try:
        data = load_from_disk(name)
    except HUB_ERRORS as error:
        raise ConfigError(
            Fault(key, "a folder made by save_to_disk", f"{name!r} ({_reason(error)})", "save it again")
        ) from error
    return stored_table(_training_split(data, name, key))


def read_hub(source: str, settings: DataSettings, key: str) -> Table:
    """Return a split of a data set of a hub: what follows a colon in its name, otherwise `train`.

    Raises: ConfigError if `datasets` cannot read it.
    """
    name, _, split = source.partition(":")
    try:
        if settings.streaming and key == "data.source":
            data = load_dataset(
                name, settings.subset, split=split or "train", streaming=True, revision=settings.revision
            )
            return _read_stream(data, settings.limit)
        # Data scripts are code from the network; `datasets` 4 and later refuse to run them, and so does fedtune.
        data = load_dataset(name, settings.subset, split=split or "train", revision=settings.revision)
    except HUB_ERRORS as error:
        hint = "give a local path, or download it once and set HF_HOME"
        got = f"{source!r} ({_reason(error)})"
        raise ConfigError(Fault(key, "a reachable hub name or an existing path", got, hint)) from error
    return stored_table(_training_split(data, name, key))


def _training_split(data: Dataset | DatasetDict, name: str, key: str) -> Dataset:
    if not isinstance(data, DatasetDict):
        return data
    if "train" not in data:
        raise ConfigError(Fault(key, "a data set with a split 'train'", f"{', '.join(data)} in {name}"))
    return data["train"]


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


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
