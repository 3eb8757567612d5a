"""The classes of a federation: those that a recipe names, or those that occur in the rows."""

from __future__ import annotations

from collections.abc import Sequence

from fedtune.data.partition import sorted_values
from fedtune.data.settings import DataSettings
from fedtune.data.source import Source
from fedtune.errors import ConfigError, Fault


def class_names(settings: DataSettings, source: Source, *others: Source | None, least: int = 2) -> list[str]:
    """Return the classes in order: those of `data.labels`, or those of the whole source.

    Of the whole source: a limit or a split must not change what a class is called.

    Raises: ConfigError naming row and file of a label that is none of them, or if there are fewer than `least`.
    """
    if settings.labels:
        for part in (source, *others):
            _check_known(part, settings.labels, "data.labels", "labels of data.labels", "add it, or check its spelling")
        return list(settings.labels)
    labels = sorted_values(source.rows.column("label"))
    if len(labels) < least:
        hint = "name all classes of the federation in data.labels"
        raise ConfigError(Fault("data.fields.label", "at least two classes", f"only {labels[0]!r}", hint))
    for part in others:
        _check_known(part, labels, "data.test", "classes that occur in the source", "check the labels' spelling")
    return labels


def alike(labels: Sequence[str]) -> list[str]:
    """Return a note on labels that differ only by case or blanks, and so are several classes.

    >>> alike(["No", "Yes", "yes "])
    ["data.fields.label: 'Yes' and 'yes ' differ only by case or blanks, and are different classes"]
    """
    spellings: dict[str, list[str]] = {}
    for label in labels:
        spellings.setdefault(" ".join(label.split()).casefold(), []).append(label)
    return [
        f"data.fields.label: {' and '.join(map(repr, group))} differ only by case or blanks, and are different classes"
        for group in spellings.values()
        if len(group) > 1
    ]


def _check_known(source: Source | None, labels: Sequence[str], key: str, expected: str, hint: str) -> None:
    if source is None or "label" not in source.rows.names:
        return
    values, known = source.rows.column("label"), set(labels)
    rows = [row for row, value in enumerate(values) if value not in known]
    if rows:
        got = f"{values[rows[0]]!r} in {source.place(rows[0])} ({len(rows)} such of {len(values)})"
        raise ConfigError(Fault(key, f"{expected} ({', '.join(list(labels)[:8])})", got, hint))
