"""The rows of a benchmark's local files: which file of a folder, which columns, and what to do where one is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.data.files import ENDINGS, format_of, read_file
from fedtune.errors import ConfigError, Fault, type_of


@dataclass(frozen=True)
class Row:
    """One row of a file, with the place that messages name."""

    place: str
    values: Mapping[str, Any]

    def text(self, *names: str) -> str:
        """Return the first of these columns that the row has, as a text that is not empty."""
        name, value = self.first(*names)
        if not isinstance(value, str) or not value.strip():
            raise self.fault(f"{name} as a text", "an empty text" if isinstance(value, str) else type_of(value))
        return value

    def first(self, *names: str) -> tuple[str, Any]:
        """Return name and value of the first of these columns that the row has."""
        for name in names:
            if self.values.get(name) is not None:
                return name, self.values[name]
        got = ", ".join(name for name, value in self.values.items() if value is not None) or "no value"
        raise self.fault(f"the column {' or '.join(names)}", got[:200])

    def texts(self, name: str, value: Any) -> Sequence[str]:
        """Return a value of this column as a list of texts."""
        if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
            got = type_of(value) if not isinstance(value, list) else "a list with something else in it"
            raise self.fault(f"{name} as a list of texts", got)
        return value

    def fault(self, expected: str, got: str, hint: str = "") -> ConfigError:
        """Return the error of this row."""
        return ConfigError(Fault(self.place, expected, got, hint))


def read_rows(path: Path, key: str) -> Sequence[Row]:
    """Return the rows of a file in any of the formats that data sets may have.

    Args:
        path: of the file.
        key: the option that names it, for messages.
    """
    form = format_of(path)
    if form is None or form == "text":
        raise ConfigError(Fault(key, f"a file of rows ({', '.join(ENDINGS)})".replace(", .txt", ""), str(path)))
    table = read_file(path, form, key)
    columns = {name: table.column(name) for name in table.names}
    if not table.count:
        raise ConfigError(Fault(key, "at least one row", f"none in {path}"))
    return [
        Row(f"{path} row {number + 1}", {name: values[number] for name, values in columns.items()})
        for number in range(table.count)
    ]


def split_file(source: Path, splits: Sequence[str], key: str, hint: str) -> Path:
    """Return the file itself, or the one of a folder that is named after the first of these splits it has.

    Names are those of the data sets hub: `test.jsonl`, `test-00000-of-00001.parquet`.

    Raises:
        ConfigError: if there is none, or more than one.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise ConfigError(Fault(key, "a file, or a folder of files", f"{source}, which is not there", hint))
    for split in splits:
        files = sorted(files_of(source, split))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ConfigError(Fault(key, f"one file {split}.* in {source}", names, "name the file itself"))
        if files:
            return files[0]
    names = ", ".join(sorted(file.name for file in source.iterdir())[:8]) or "an empty folder"
    wanted = " or ".join(f"{split}.jsonl" for split in splits)
    raise ConfigError(Fault(key, f"a file such as {wanted} in {source}", names, hint))


def files_of(folder: Path, split: str) -> Iterator[Path]:
    """Yield a folder's files of one split."""
    for file in folder.iterdir():
        if format_of(file) is not None and file.name.split(".")[0].split("-")[0] == split:
            yield file
