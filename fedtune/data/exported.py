"""Every client's rows as their files have them, all columns and by split: what `fedtune split` writes for others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.data.division import divide
from fedtune.data.partition import Rows
from fedtune.data.partition_file import Division
from fedtune.data.repeats import fingerprints
from fedtune.data.settings import PYTHON, DataSettings, Task, faults
from fedtune.data.source import read_original, read_source, read_test
from fedtune.data.table import Table
from fedtune.errors import ConfigError, Fault

TRAIN, HELD_OUT, TEST = "train", "validation", "test"
"""Names of the splits, which are also those of their folders: `datasets` knows them."""
EVERYONE = "all"
"""In place of a client's name: of test rows that belong to no client."""


@dataclass(frozen=True)
class ExportedRows:
    """The rows of a federation, by split and client."""

    division: Division
    columns: Sequence[str]
    """Of the rows that are trained on, in the order of the files."""
    splits: Mapping[str, Mapping[str, Table]]
    """By split, of each client its rows; a client without a row of a split is left out of it."""


def exported_rows(
    settings: DataSettings, *, task: Task, seed: int, root: Path, column: str | None = None
) -> ExportedRows:
    """Return who holds which rows in a recipe, with every column that they have in their files.

    Args:
        settings: the recipe's table `data`.
        task: what the base is trained for, which says what columns must be there.
        seed: the run's.
        root: folder that relative paths start from.
        column: a column with the client's name to add to every row; none adds none.

    Raises: ConfigError if data cannot be read or divided, or have that column already.
    """
    if wrong := faults(settings):
        raise ConfigError(wrong)
    if settings.format == "plugin" or PYTHON in (settings.source, settings.test):
        expected = "files, a saved data set or a hub's: rows of a package or of Python have none to number"
        raise ConfigError(Fault("data.source", expected, repr(settings.source)))
    source, test = read_source(settings, root, task=task), read_test(settings, root, task=task)
    prints = fingerprints(source.rows), [] if test is None else fingerprints(test.rows)
    division = divide(settings, source, test, prints=prints, seed=seed, root=root)
    rows = read_original(settings, root, settings.source, key="data.source")
    _check_column(column, rows, "data.source")
    splits: dict[str, dict[str, Table]] = {TRAIN: {}, HELD_OUT: {}, TEST: {}}
    for name, own in division.clients.items():
        _add(splits[TRAIN], name, rows, own.rows, column)
        _add(splits[HELD_OUT], name, rows, own.held_out, column)
    if test is not None and settings.test is not None:
        tests = read_original(settings, root, settings.test, key="data.test")
        _check_column(column, tests, "data.test")
        for name, own in division.clients.items():
            _add(splits[TEST], name, tests, own.test, column)
        if division.test is None:
            splits[TEST][EVERYONE] = tests
    return ExportedRows(division, rows.names, splits)


def _add(split: dict[str, Table], client: str, table: Table, rows: Rows | None, column: str | None) -> None:
    if rows is None or not len(rows):
        return
    own = table.select(rows.tolist())
    split[client] = own if column is None else own.with_column(column, [client] * own.count)


def _check_column(column: str | None, table: Table, key: str) -> None:
    if column == "":
        raise ConfigError(Fault("--column", "a name for the column", "an empty one"))
    if column in table.names:
        got = f"{column!r}, which {key} has already"
        raise ConfigError(Fault("--column", "a name that no column of the rows has", got, "choose another one"))
