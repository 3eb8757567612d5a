"""Reading what only pyarrow can: Parquet files, and archives of Zstandard; imported where one is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet

from fedtune.data.table import Table, with_class_names
from fedtune.errors import ConfigError, Fault


@contextmanager
def open_zstd(path: Path) -> Iterator[IO[bytes]]:
    """Give an archive's content as a stream.

    Raises: OSError if it is damaged.
    """
    try:
        with pa.CompressedInputStream(pa.OSFile(str(path)), "zstd") as stream:
            yield stream
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def read_parquet(path: Path, key: str) -> Table:
    """Return the table in a Parquet file.

    Raises: ConfigError if it is damaged, or a column that is asked for is.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as stored:
            names, count = stored.schema_arrow.names, stored.metadata.num_rows
            classes = _class_names(stored.schema_arrow)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(Fault(key, "a readable Parquet file", f"{path} ({_first_line(error)})")) from error

    def column(name: str) -> Sequence[Any]:
        # Only those that are used: a type that means nothing here, such as a map, may stand in the others.
        try:
            with pyarrow.parquet.ParquetFile(path) as stored:
                values = stored.read(columns=[name]).column(name).to_pylist()
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            got = f"{path} ({_first_line(error)})"
            raise ConfigError(Fault(key, f"a readable column {name!r}", got)) from error
        return with_class_names(values, classes[name]) if name in classes else values

    return Table(names, count, column)


def write_parquet(path: Path, table: Table, kinds: Mapping[str, Any]) -> None:
    """Write a table as a Parquet file, in the types that `column_kinds` gives."""
    columns = {name: pa.array(table.column(name), type=kinds[name]) for name in table.names}
    pyarrow.parquet.write_table(pa.table(columns), path)


def column_kinds(table: Table) -> Mapping[str, Any]:
    """Return the Arrow type of each column over all rows: files of one type each can be read together.

    Raises: ConfigError naming a column whose values have no type in common.
    """
    kinds = {}
    for name in table.names:
        try:
            kinds[name] = pa.array(table.column(name)).type
        except (pa.ArrowException, TypeError, OverflowError) as error:
            got = f"column {name!r} ({_first_line(error)})"
            hint = "write the form jsonl"
            raise ConfigError(Fault("--form", "columns of one type each in Parquet", got, hint)) from error
    return kinds


def _class_names(schema: pa.Schema) -> Mapping[str, Sequence[str]]:
    """Return the names of the classes of each column that `datasets` wrote as numbers."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {name: kind for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
        return {name: list(kind["names"]) for name, kind in kinds.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
