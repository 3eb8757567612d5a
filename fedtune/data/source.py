"""Reading rows: files, saved data sets and hub names become one data set with canonical columns."""

from __future__ import annotations

import csv
import difflib
import glob
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk

from fedtune.data.settings import GROUP, DataSettings, Part, Task
from fedtune.errors import ConfigError, Fault

Columns = Mapping[str, Sequence[Any]]

_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


def load(settings: DataSettings, root: Path, *, task: Task) -> Dataset:
    """Return the training rows: the parts that the task uses (text, instruction, input, output, label), and group.

    Every value is text; labels are class names where the source knows them. Local files are read whole, here and not
    by `load_dataset`, which would copy them into a cache and report each use of its readers to the hub.

    Raises: ConfigError if a file is missing or malformed, a column is absent, or a cell is empty that must not be.
    """
    by = GROUP if settings.split.kind == "files" else settings.split.by
    return _load(settings, root, settings.source, task=task, key="data.source", by=by)


def load_test(settings: DataSettings, root: Path, *, task: Task) -> Dataset | None:
    """Return the rows of `settings.test` without groups, or None if there is no separate test data."""
    if settings.test is None:
        return None
    return _load(settings, root, settings.test, task=task, key="data.test", by=None)


def load_rows(settings: DataSettings, rows: Mapping[str, Any], *, task: Task) -> Dataset:
    """Return the rows that Python code gives by client, as `load` returns those of files: group is the client.

    Args:
        settings: the recipe's table `data`; its source and its split are not read.
        rows: by client, a `datasets.Dataset` or a sequence of mappings from column to value.
        task: which parts are read.

    Raises: ConfigError as `load`.
    """
    read: dict[str, list[Any]] = {}
    for client, given in sorted(rows.items()):
        where = f"the rows of {client!r}"
        if not isinstance(given, Dataset) and not all(isinstance(row, Mapping) for row in given):
            raise ConfigError(Fault("data", "a Dataset, or a sequence of mappings from column to value", where))
        columns = _columns(given) if isinstance(given, Dataset) else _to_columns(list(given))
        count = len(next(iter(columns.values()), ()))
        if not count:
            raise ConfigError(Fault("data", "at least one row for every client", f"none for {client!r}"))
        chosen = _select_columns(settings, columns, where, task)
        parts = {
            part: _cells(part, columns[column], f"column {column!r} of {where}") for part, column in chosen.items()
        }
        if read and read.keys() != {*parts, GROUP}:
            expected = f"the columns of the first client ({', '.join(part for part in read if part != GROUP)})"
            raise ConfigError(Fault("data", expected, f"{', '.join(parts) or 'none'} in {where}"))
        for part, values in {**parts, GROUP: [client] * count}.items():
            read.setdefault(part, []).extend(values)
    return Dataset.from_dict(read)


def _load(
    settings: DataSettings, root: Path, source: str | Sequence[str], *, task: Task, key: str, by: str | None
) -> Dataset:
    rows: dict[str, list[Any]] = {}
    for name, form in _places([source] if isinstance(source, str) else source, settings.format, root, key):
        columns = _READERS[form](name, key) if form in _READERS else _read_stored(name, form, settings.subset, key)
        count = len(next(iter(columns.values()), ()))
        if not count:
            raise ConfigError(Fault(key, "at least one row", f"none in {name}"))
        chosen = _select_columns(settings, columns, name, task)
        read = {part: _cells(part, columns[column], f"column {column!r} of {name}") for part, column in chosen.items()}
        if by == GROUP:
            read[GROUP] = [Path(name).stem] * count
        elif by is not None:
            if by not in columns:
                raise ConfigError(_absent("data.split.by", by, columns, name))
            read[GROUP] = _cells(GROUP, columns[by], f"column {by!r} of {name}")
        if rows and rows.keys() != read.keys():
            expected = f"the columns of the first file ({', '.join(rows)})"
            got = f"{', '.join(read) or 'none'} in {name}"
            raise ConfigError(Fault(key, expected, got, "give files of one layout"))
        for part, values in read.items():
            rows.setdefault(part, []).extend(values)
    return Dataset.from_dict(rows)


def _places(sources: Sequence[str], form: str, root: Path, key: str) -> list[tuple[str, str]]:
    """Return (path or hub name, format) of every file meant, globs expanded in sorted order."""
    places = []
    for source in sources:
        path = root / source
        if form == "hub":
            places.append((source, form))
        elif path.exists():
            places.append((str(path), _form(path, form, key)))
        elif matches := sorted(glob.glob(str(path), recursive=True)):
            places.extend((name, _form(Path(name), form, key)) for name in matches)
        elif form == "auto" and _may_be_hub_name(source):
            places.append((source, "hub"))
        else:
            raise ConfigError(Fault(key, "an existing file, glob or folder", repr(source), f"paths start from {root}"))
    return places


def _form(path: Path, form: str, key: str) -> str:
    if form != "auto":
        return form
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        return "saved"
    if path.suffix.lower() in _ENDINGS and path.is_file():
        return _ENDINGS[path.suffix.lower()]
    expected = f"a saved dataset's folder or a file ending in {', '.join(_ENDINGS)}"
    raise ConfigError(Fault(key, expected, str(path), "set data.format"))


def _may_be_hub_name(source: str) -> bool:
    name = source.partition(":")[0]
    plain = name.replace("/", "", 1).replace("-", "").replace("_", "").replace(".", "")
    return Path(name).suffix.lower() not in _ENDINGS and plain.isalnum() and not name.startswith((".", "/"))


def _read_stored(name: str, form: str, subset: str | None, key: str) -> Columns:
    """Read what `datasets` itself stores: a saved data set, or the split of a hub data set."""
    place, _, split = name.partition(":") if form == "hub" else (name, "", "")
    try:
        # Data scripts are code from the network; `datasets` 4 and later refuse to run them, and so does fedtune.
        data = load_dataset(place, subset, split=split or "train") if form == "hub" else load_from_disk(place)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        expected = "a reachable hub name or an existing path" if form == "hub" else "a folder made by save_to_disk"
        hint = "give a local path, or download it once and set HF_HOME" if form == "hub" else "save it again"
        raise ConfigError(Fault(key, expected, f"{name!r} ({_first_line(error)})", hint)) from error
    if isinstance(data, DatasetDict):
        if "train" not in data:
            raise ConfigError(Fault(key, "a data set with a split 'train'", f"{', '.join(data)} in {name}"))
        data = data["train"]
    return _columns(data)


def _columns(data: Dataset) -> Columns:
    """Return every column as a list, classes by their names."""
    columns = {}
    for name, feature in data.features.items():
        values = data.data.column(name).to_pylist()
        if isinstance(feature, ClassLabel):  # -1 is how a test set hides its labels
            values = [feature.names[value] if value is not None and value >= 0 else None for value in values]
        columns[name] = values
    return columns


def _parquet(name: str, key: str) -> Columns:
    try:
        return _columns(Dataset(pyarrow.parquet.read_table(name)))
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(Fault(key, "a readable Parquet file", f"{name} ({_first_line(error)})")) from error


def _text(name: str, key: str) -> Columns:
    return {"text": [line for line in _read(name, key).split("\n") if line.strip()]}


def _csv(name: str, key: str) -> Columns:
    # Not through pandas: it turns the answers "NA", "None" and "null" into missing values.
    reader = csv.DictReader(io.StringIO(_read(name, key), newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                expected = f"{len(reader.fieldnames or ())} columns in every row"
                raise ConfigError(Fault(key, expected, f"another number in line {reader.line_num} of {name}"))
            rows.append(row)
    except csv.Error as error:
        raise ConfigError(Fault(key, "well-formed CSV", f"{error} in line {reader.line_num} of {name}")) from error
    return {column: [row[column] for row in rows] for column in reader.fieldnames or ()}


def _jsonl(name: str, key: str) -> Columns:
    # Not through Arrow's JSON reader: it guesses timestamps from text, and knows no line to complain about.
    lines = _read(name, key).split("\n")  # splitlines would also cut at separators that JSON allows inside strings
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:  # also a number of too many digits, and too deep nesting
            reason = _first_line(error)
            if isinstance(error, json.JSONDecodeError):  # its text counts lines from the start of this one
                reason = f"{error.msg.removesuffix(' at')} at character {error.colno}"
            got = f"{reason} in line {number} of {name}"
            raise ConfigError(Fault(key, "one JSON object per line", got)) from error
        if not isinstance(rows[-1], dict):
            got = f"a {type(rows[-1]).__name__} in line {number} of {name}"
            raise ConfigError(Fault(key, "one JSON object per line", got, 'for a list of objects set format = "json"'))
    return _to_columns(rows)


def _json(name: str, key: str) -> Columns:
    try:
        rows = json.loads(_read(name, key))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several objects: JSON lines under the other ending
            return _jsonl(name, key)
        got = f"{error.msg} in line {error.lineno} of {name}"
        raise ConfigError(Fault(key, "a list of JSON objects", got)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(Fault(key, "a list of JSON objects", f"{_first_line(error)} in {name}")) from error
    if isinstance(rows, dict):  # JSON lines of one line
        rows = [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(Fault(key, "a list of JSON objects", f"something else in {name}"))
    return _to_columns(rows)


_READERS: Mapping[str, Callable[[str, str], Columns]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "text": _text,
}


def _read(name: str, key: str) -> str:
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#04x} at offset {error.start} of {name}"
        raise ConfigError(Fault(key, "a text file in UTF-8", got)) from error
    except OSError as error:
        raise ConfigError(Fault(key, "a readable file", f"{name} ({error.strerror})")) from error
    if "\0" in text:
        raise ConfigError(Fault(key, "a text file in UTF-8", f"a NUL byte at character {text.index(chr(0))} of {name}"))
    return text


def _to_columns(rows: Sequence[Mapping[str, Any]]) -> Columns:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _select_columns(settings: DataSettings, columns: Columns, name: str, task: Task) -> dict[str, str]:
    """Return the column of each part that the task uses: what it does not use may be empty or odd."""
    chosen = {part: column for part in get_args(Part) if (column := _column(settings, part, columns, name))}
    if task == "causal":
        unused = ["label", "text"] if "output" in chosen else ["label", "instruction", "input"]
    else:
        unused = ["output", "instruction"] if "text" in chosen else ["output"]
    return {part: column for part, column in chosen.items() if part not in unused}


def _column(settings: DataSettings, part: Part, columns: Columns, name: str) -> str | None:
    """Return the column that plays a part, or None if nothing does and nothing was asked to."""
    column = settings.fields.get(part)
    if column is None:
        return part if part in columns else None
    if column not in columns:
        raise ConfigError(_absent(f"data.fields.{part}", column, columns, name))
    return column


def _absent(key: str, column: str, columns: Columns, name: str) -> Fault:
    near = difflib.get_close_matches(column, columns, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "map a column that is there with fields = {...}"
    return Fault(key, f"column {column!r}", f"{', '.join(columns)} in {name}", hint)


def _cells(part: str, values: Sequence[Any], where: str) -> list[str]:
    cells = [_cell(part, value) for value in values]
    usable = [cell for cell in cells if cell is not None]
    if len(usable) == len(cells):
        return usable
    row = cells.index(None)
    got = f"{str(values[row])[:60]!r} in row {row + 1} of {where} ({len(cells) - len(usable)} such of {len(cells)})"
    key = "data.split.by" if part == GROUP else f"data.fields.{part}"
    raise ConfigError(Fault(key, "text or a whole number in every row", got, "fill or remove these rows"))


def _cell(part: str, value: object) -> str | None:
    """Return the value as text, or None if it is nothing to learn from; only `input` may be empty or missing."""
    if value is None:
        return "" if part == "input" else None
    if isinstance(value, float) and value.is_integer():  # whole numbers beside missing ones are stored as floats
        value = int(value)
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str) or (part != "input" and not value.strip()):
        return None
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no character
        return None
    return value


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
