"""A recipe's split as files that others read: one for each client, and the partition file with the numbers of rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedtune.config import bind
from fedtune.data.exported import ExportedRows, exported_rows
from fedtune.data.partition_file import division_digest, write_division
from fedtune.data.table import Table, concatenate
from fedtune.errors import ExtraError, StoreError
from fedtune.runs.split import row_counts
from fedtune.store.files import fill, new_folder
from fedtune.store.run_directory import PARTITION

SplitForm = Literal["jsonl", "parquet"]


@dataclass(frozen=True)
class SplitFiles:
    """What was written."""

    path: Path
    split: Mapping[str, Any]
    """Kind, digest, rows of each client, rows of none: as `fedtune plan` has them."""
    files: int
    """Files of rows."""


def write_split(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    form: SplitForm = "jsonl",
    column: str | None = None,
    overrides: Sequence[str] = (),
) -> SplitFiles:
    """Write who holds which rows of a recipe into a new folder, and return what it holds.

    Args:
        recipe: path, text or tables; its data must be here.
        out: folder with `train/CLIENT.jsonl`, `validation/CLIENT.jsonl` for rows that are held out, `test/` for those
            of `data.test`, and `partition.jsonl`, which `data.split.file` reads.
        form: `jsonl` or `parquet`.
        column: a column with the client's name to add to every row.
        overrides: `table.key=value`, as for `simulate`.

    Raises:
        ConfigError: if data cannot be read, divided or written in that form.
        StoreError: if the folder holds files already, or cannot be written.
        ExtraError: if Parquet is asked for and pyarrow is not installed.
    """
    if form == "parquet":
        _check_pyarrow()
    bound, target = bind(recipe, overrides=overrides), Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target}: expected a new or an empty folder; it holds files; choose another with --out")
    rows = exported_rows(bound.data, task=bound.model.task, seed=bound.seed, root=bound.root, column=column)
    with new_folder(target) as folder:
        files = sum(_write_files(folder / split, parts, form) for split, parts in rows.splits.items() if parts)
        fill(folder / PARTITION, write_division(rows.division).encode())
    return SplitFiles(target, split_numbers(rows, bound.data.split.kind), files)


def split_numbers(rows: ExportedRows, kind: str) -> Mapping[str, Any]:
    """Return the numbers of a split, as `fedtune plan` shows them."""
    division = rows.division
    clients = {name: row_counts(own) for name, own in division.clients.items()}
    return {
        "kind": kind,
        "digest": division_digest(division),
        "clients": clients,
        "left_out": len(division.left_out),
    }


def _check_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401 - before any row is read
    except ModuleNotFoundError as error:
        hint = 'run pip install "fedtune[data]", or leave --form out for JSON lines'
        raise ExtraError(f"--form parquet: expected the package pyarrow; got none; {hint}") from error


def _write_files(folder: Path, parts: Mapping[str, Table], form: SplitForm) -> int:
    """Write a file for each client, and return how many there are."""
    folder.mkdir()
    if form == "parquet":
        from fedtune.data.arrow import column_kinds, write_parquet

        kinds = column_kinds(concatenate(list(parts.values())))
        for name, table in parts.items():
            write_parquet(folder / f"{name}.parquet", table, kinds)
    else:
        for name, table in parts.items():
            fill(folder / f"{name}.jsonl", json_lines(table).encode())
    return len(parts)


def json_lines(table: Table) -> str:
    """Return a table as JSON lines; what JSON cannot say, such as a day, is written as text, and NaN as null."""
    columns = [table.column(name) for name in table.names]
    rows = (dict(zip(table.names, values, strict=True)) for values in zip(*columns, strict=True))
    return "".join(f"{json.dumps(without_nan(row), ensure_ascii=False, default=str)}\n" for row in rows)


def without_nan(value: Any) -> Any:
    """Return a value with None in place of numbers that are not finite, which readers of JSON refuse.

    >>> without_nan({"score": float("nan"), "parts": [1.5, float("inf")]})
    {'score': None, 'parts': [1.5, None]}
    """
    if isinstance(value, Mapping):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
