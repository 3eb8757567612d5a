"""Reading one file, compressed or not, into a table of named columns: JSON lines, JSON, CSV, Parquet and plain text."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, cast

from fedtune.data.table import Table, from_rows, table_of
from fedtune.errors import ConfigError, ExtraError, Fault, type_of

ENDINGS: Mapping[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
"""Formats by the ending of a file's name."""
MAGIC: Mapping[bytes, str] = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\xfd7zXZ\x00": ".xz",
    b"BZh": ".bz2",
    b"PK\x03\x04": ".zip",
    b"PAR1": ".parquet",
}
"""First bytes of files that are no text, and the ending that such files have."""
DELIMITERS = ",;\t|"
LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV field, at most; Python's own limit is 131,072."""
CHUNK = 2**20
"""Bytes that are unpacked at a time."""
SMALL, RATIO = 64 * 2**20, 200
"""What an archive may unpack to: so many bytes, or so many times its size; text is packed by a factor of 3 to 30."""


def format_of(path: Path) -> str | None:
    """Return the format that a file's ending names, that of a compressed one beneath; None if it names none.

    >>> format_of(Path("a.jsonl")), format_of(Path("a.csv.gz")), format_of(Path("a.xlsx"))
    ('jsonl', 'csv', None)
    """
    plain = path.with_suffix("") if path.suffix.lower() in _OPENERS else path
    return ENDINGS.get(plain.suffix.lower())


def without_endings(name: str) -> str:
    """Return a file's name without the endings of format and compression.

    >>> without_endings("notes.v2.jsonl.gz"), without_endings("plain")
    ('notes.v2', 'plain')
    """
    stem = name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in _OPENERS else name
    return stem[: -len(Path(stem).suffix)] if Path(stem).suffix.lower() in ENDINGS else stem


def read_file(path: Path, form: str, key: str) -> Table:
    """Return the table in a file of a format that `ENDINGS` names.

    Args:
        path: of the file; its ending says whether it is compressed.
        form: its format.
        key: the recipe's key that names it, for messages.

    Raises: ConfigError with the place in the file if it is damaged, or not of this format.
    """
    if form == "parquet":
        return _parquet(path, key)
    text = _text_of(path, key)
    match form:
        case "jsonl":
            return _jsonl(text, path, key)
        case "json":
            return _json(text, path, key)
        case "csv":
            return _csv(text, path, key)
    # Not by splitlines, which cuts at form feeds, too; a carriage return before the line break is a part of that.
    return table_of({"text": [line.removesuffix("\r") for line in text.split("\n") if line.strip()]})


def _text_of(path: Path, key: str) -> str:
    content = b""
    try:
        content = _unpack(path, key) if path.suffix.lower() in _OPENERS else path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        ending = next((ending for magic, ending in MAGIC.items() if content.startswith(magic)), None)
        got = f"byte {error.object[error.start]:#04x} at offset {error.start} of {path}"
        remedy = "unpack it" if ending == ".zip" else "give it that ending"
        hint = f"its first bytes are those of a {ending} file: {remedy}" if ending else ""
        raise ConfigError(Fault(key, "a text file in UTF-8", got, hint)) from error
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise ConfigError(Fault(key, "a readable file", f"{path} ({reason})")) from error
    if "\0" in text:
        got = f"a NUL byte at character {text.index(chr(0))} of {path}"
        raise ConfigError(Fault(key, "a text file in UTF-8", got))
    return text


def _gzip(path: Path) -> AbstractContextManager[IO[bytes]]:
    stream: Any = gzip.GzipFile(path)
    return cast(IO[bytes], stream)


def _zstd(path: Path) -> AbstractContextManager[IO[bytes]]:
    try:
        from fedtune.data.arrow import open_zstd
    except ModuleNotFoundError as error:
        raise without_package("pyarrow", "Zstandard", str(path)) from error
    return open_zstd(path)


_OPENERS: Mapping[str, Callable[[Path], AbstractContextManager[IO[bytes]]]] = {
    ".gz": _gzip,
    ".zst": _zstd,
    ".xz": lzma.LZMAFile,
    ".bz2": bz2.BZ2File,
}
"""How a compressed file is opened, by its ending."""


def _unpack(path: Path, key: str) -> bytes:
    """Return what a compressed file holds, and stop before an archive that unpacks to a thousand times its size."""
    limit, content = max(SMALL, RATIO * path.stat().st_size), bytearray()
    try:
        with _OPENERS[path.suffix.lower()](path) as stream:
            while chunk := stream.read(CHUNK):
                content += chunk
                if len(content) > limit:
                    expected = f"an archive that unpacks to at most {RATIO} times its size"
                    raise ConfigError(Fault(key, expected, f"more in {path}", "unpack it, if its content is meant"))
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        got = f"{path} ({_first_line(error)})"
        raise ConfigError(Fault(key, f"a whole {path.suffix} archive", got, "pack or copy it again")) from error
    return bytes(content)


def _parquet(path: Path, key: str) -> Table:
    try:
        from fedtune.data.arrow import read_parquet
    except ModuleNotFoundError as error:
        raise without_package("pyarrow", "Parquet", str(path)) from error
    table = read_parquet(path, key)
    _check_distinct(table.names, path, key)
    return table


def without_package(package: str, reads: str, got: str) -> ExtraError:
    """Return the error of rows that need a package which the small file of the edge client leaves out."""
    hint = 'save the rows as JSON lines, or run pip install "fedtune[data]"'
    return ExtraError(f"data: expected the package {package}, which reads {reads}; got {got} and no {package}; {hint}")


def _csv(text: str, path: Path, key: str) -> Table:
    # Not through pandas: it turns the answers "NA", "None" and "null" into missing values.
    former = csv.field_size_limit(LONGEST_FIELD)
    try:
        header, rows, delimiter = _csv_rows(text, path, key)
    finally:
        csv.field_size_limit(former)
    _check_distinct(header, path, key)
    # A spreadsheet writes the empty rows below a table, too.
    while rows and not any(rows[-1][1]):
        rows.pop()
    for line, row in rows:
        if len(row) != len(header):
            expected, got = f"{len(header)} columns in every row", f"another number in line {line} of {path}"
            raise ConfigError(Fault(key, expected, got, f"its header is divided by {delimiter!r}"))
    return table_of({name: [row[place] for _, row in rows] for place, name in enumerate(header)})


def _csv_rows(text: str, path: Path, key: str) -> tuple[list[str], list[tuple[int, list[str]]], str]:
    """Return the header, each row with the line that it ends in, and the delimiter."""
    # Excel may write the delimiter into a line of its own.
    text = re.sub(r"\Asep=[,;\t|]\r?\n", "\n", text)
    delimiter = _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise ConfigError(Fault(key, "well-formed CSV", f"{error} in line {reader.line_num} of {path}")) from error
    return (rows[0][1] if rows else []), rows[1:], delimiter


def _delimiter(text: str) -> str:
    """Return which of `DELIMITERS` stands most often in the header, outside quotes; the first of those if several."""
    unquoted = "".join(re.split("[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0].split('"')[::2])
    return max(DELIMITERS, key=unquoted.count)


def _check_distinct(names: Sequence[str], path: Path, key: str) -> None:
    """Refuse a header that gives two columns one name: which of them was meant cannot be known."""
    if repeated := [name for name, count in Counter(names).items() if name and count > 1]:
        got = f"{repeated[0]!r} {names.count(repeated[0])} times in {path}"
        raise ConfigError(Fault(key, "columns that each have a name of their own", got, "rename or remove one"))


def _jsonl(text: str, path: Path, key: str) -> Table:
    return from_rows(list(_json_lines(text, path, key)))


def _json_lines(text: str, path: Path, key: str) -> Iterator[Mapping[str, Any]]:
    # Not through Arrow's JSON reader: it guesses timestamps from text, and knows no line to complain about.
    lines = text.split("\n")  # splitlines would also cut at separators that JSON allows inside strings
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of too many digits, and too deep nesting
            reason = _first_line(error)
            if isinstance(error, json.JSONDecodeError):  # its text counts lines from the start of this one
                reason = f"{error.msg.removesuffix(' at')} at character {error.colno}"
            got = f"{reason} in line {number} of {path}"
            raise ConfigError(Fault(key, "one JSON object per line", got)) from error
        if not isinstance(row, dict):
            got = f"{type_of(row)} in line {number} of {path}"
            raise ConfigError(Fault(key, "one JSON object per line", got, 'for a list of objects set format = "json"'))
        yield row


def _json(text: str, path: Path, key: str) -> Table:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several objects: JSON lines under the other ending
            return _jsonl(text, path, key)
        got = f"{error.msg} in line {error.lineno} of {path}"
        raise ConfigError(Fault(key, "a list of JSON objects", got)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(Fault(key, "a list of JSON objects", f"{_first_line(error)} in {path}")) from error
    if isinstance(rows, dict):  # JSON lines of one line
        rows = [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(Fault(key, "a list of JSON objects", f"something else in {path}"))
    return from_rows(rows)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
