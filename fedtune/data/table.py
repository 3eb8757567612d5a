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


def table_of(columns: Mapping[str, Sequence[Any]]) -> Table:
    """Return columns that were read as a whole."""
    return Table(list(columns), len(next(iter(columns.values()), ())), lambda name: columns[name])


def from_rows(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return rows as a table; a key that a row lacks is None there."""
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(list(names), len(rows), lambda name: [row.get(name) for row in rows])


def with_class_names(values: Sequence[Any], names: Sequence[str]) -> Sequence[Any]:
    """Return the names of classes that are stored by number; -1 is how a test set hides them, and becomes None."""
    return [names[value] if value is not None and 0 <= value < len(names) else None for value in values]


def _at(values: Sequence[Any], places: Sequence[int]) -> Sequence[Any]:
    return [values[place] for place in places]
