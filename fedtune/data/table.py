"""Rows as named columns: what every format is read into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Named columns of rows; those of a large file are read when they are asked for."""

    names: Sequence[str]
    count: int
    """Rows."""
    column: Callable[[str], Sequence[Any]]
    """From a column's name to its values, as Python objects."""

    def select(self, rows: Iterable[int]) -> Table:
        """Return the rows at these places, in their order."""
        places = list(rows)
        return Table(self.names, len(places), lambda name: _at(self.column(name), places))

    def with_column(self, name: str, values: Sequence[Any]) -> Table:
        """Return the rows with one column more, behind the others."""
        return Table([*self.names, name], self.count, lambda other: values if other == name else self.column(other))


def table_of(columns: Mapping[str, Sequence[Any]]) -> Table:
    """Return columns that were read as a whole."""
    return Table(list(columns), len(next(iter(columns.values()), ())), lambda name: columns[name])


def from_rows(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return rows as a table; a key that a row lacks is None there."""
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(list(names), len(rows), lambda name: [row.get(name) for row in rows])


def concatenate(tables: Sequence[Table]) -> Table:
    """Return the rows of several tables one after the other; a column that a table lacks is None in its rows."""
    names = list(dict.fromkeys(name for table in tables for name in table.names))

    def column(name: str) -> Sequence[Any]:
        parts = [table.column(name) if name in table.names else [None] * table.count for table in tables]
        return [value for part in parts for value in part]

    return Table(names, sum(table.count for table in tables), column)


def with_class_names(values: Sequence[Any], names: Sequence[str]) -> Sequence[Any]:
    """Return the names of classes that are stored by number; -1 is how a test set hides them, and becomes None."""
    return [names[value] if value is not None and 0 <= value < len(names) else None for value in values]


def _at(values: Sequence[Any], places: Sequence[int]) -> Sequence[Any]:
    return [values[place] for place in places]
