"""The partition file: which rows each client trains on and holds out, one JSON line per client, written and read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.data.partition import Rows, client_names
from fedtune.errors import ConfigError, Fault, type_of

VERSION = 1
KEY = "data.split.file"
LISTS = ("rows", "held_out", "test")
"""Keys of a client's line that hold numbers of rows: those of `test` count in the test data."""
SOURCES = ("rows", "digest", "test_rows", "test_digest")
"""Keys of the first line, beside `version`."""
NO_CLIENT = ""
"""In place of a client's name, which is never empty: of the rows that are left out."""


@dataclass(frozen=True)
class Pool:
    """What is divided: how many rows, and a digest of their texts in order."""

    rows: int
    digest: str


@dataclass(frozen=True)
class ClientRows:
    """Numbers of one client's rows, from 0."""

    rows: Rows
    """Of the source: those that it trains on, ascending."""
    held_out: Rows | None = None
    """Of the source: those that it holds out, in the order in which they are scored. None: drawn from its rows."""
    test: Rows | None = None
    """Of the test data: those that it is scored on, in that order. None: the test data are not divided."""


@dataclass(frozen=True)
class Division:
    """Who holds which rows."""

    clients: Mapping[str, ClientRows]
    """By name, sorted."""
    left_out: Rows
    """Rows of the source that no client holds, ascending."""
    source: Pool
    test: Pool | None = None
    """None unless the test data are divided as well."""


def all_rows(own: ClientRows) -> Rows:
    """Return a client's rows of the source, held-out ones included, ascending."""
    return own.rows if own.held_out is None else np.sort(np.concatenate([own.rows, own.held_out]))


def pool(fingerprints: Sequence[bytes]) -> Pool:
    """Return the count and the digest of rows, given the fingerprint of each."""
    return Pool(len(fingerprints), hashlib.sha256(b"".join(fingerprints)).hexdigest())


def write_division(division: Division) -> str:
    """Return a division as the text of a partition file: equal divisions give equal bytes."""
    return "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in _lines(division))


def _lines(division: Division) -> Iterator[Mapping[str, Any]]:
    first = {"version": VERSION, "rows": division.source.rows, "digest": division.source.digest}
    if division.test is not None:
        first |= {"test_rows": division.test.rows, "test_digest": division.test.digest}
    yield first
    for name, own in division.clients.items():
        values = {key: getattr(own, key) for key in LISTS}
        yield {"client": name} | {key: rows.tolist() for key, rows in values.items() if rows is not None}
    if len(division.left_out):
        yield {"left_out": division.left_out.tolist()}


def division_digest(division: Division) -> str:
    """Return the SHA-256 (hex) of a division's partition file."""
    return hashlib.sha256(write_division(division).encode()).hexdigest()


def read_division(path: Path, source: Pool, test: Pool | None) -> Division:
    """Return the division that a partition file describes, and that it is one: every row is in one place.

    The first line may be left out in a file that was written by hand: then it is not known whose rows it numbers.

    Args:
        path: of the file.
        source: the rows that it divides.
        test: the test rows that it may divide; None if there are none, or they are not to be divided.

    Raises:
        ConfigError: naming the line, the client and the row that is missing, repeated or no row of the source.
    """
    clients: dict[str, ClientRows] = {}
    left_out: list[Any] = []
    for number, line in _read_lines(path):
        where = f"line {number} of {path}"
        if "client" in line:
            name = _client_name(line["client"], where)
            if name in clients:
                raise _fault("one line for each client", f"{name!r} again in {where}", "join its lines")
            _check_keys(line, ("client", *LISTS), where)
            clients[name] = _client_rows(line, name, where)
        elif "left_out" in line:
            _check_keys(line, ("left_out",), where)
            left_out += _numbers(line["left_out"], f"left_out in {where}")
        elif number == 1 and "version" in line:
            _check_keys(line, ("version", *SOURCES), where)
            _check_first(line, source, test, where)
        else:
            got = f"{', '.join(line) or 'nothing'} in {where}"
            raise _fault(
                "a line with client and rows, or with left_out",
                got,
                'write, say, {"client": "north", "rows": [0, 1, 2]}',
            )
    if not clients:
        raise _fault("at least one line with a client", f"none in {path}")
    parts = {name: all_rows(own).tolist() for name, own in clients.items()}
    _check_partition({**parts, NO_CLIENT: left_out}, source.rows, "the source", path, whole=True)
    tests = {name: own.test.tolist() for name, own in clients.items() if own.test is not None}
    if tests and test is not None:
        _check_partition(tests, test.rows, "the test data", path, whole=False)
    return Division(dict(sorted(clients.items())), _rows(sorted(left_out)), source, test if tests else None)


def _read_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
        raise _fault("a partition file in JSON lines, UTF-8", f"{path} ({reason})") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _fault("one JSON object per line", f"{str(error)[:80]} in line {number} of {path}") from error
        if not isinstance(content, dict):
            raise _fault("one JSON object per line", f"{type_of(content)} in line {number} of {path}")
        yield number, content


def _client_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or client_names([name]) != [name]:
        expected = "a client's name of letters, digits, `_`, `-` and `.`"
        raise _fault(expected, f"{str(name)[:60]!r} in {where}")
    return name


def _client_rows(line: Mapping[str, Any], name: str, where: str) -> ClientRows:
    if "rows" not in line:
        raise _fault(f"the rows of {name!r}", f"{', '.join(line)} in {where}")
    lists = {key: _numbers(line[key], f"{key} of {name!r} in {where}") for key in LISTS if key in line}
    ordered = {key: _rows(sorted(values) if key == "rows" else values) for key, values in lists.items()}
    return ClientRows(**ordered)


def _numbers(values: Any, where: str) -> list[int]:
    if not isinstance(values, list):
        raise _fault("a list of row numbers, from 0", f"{type_of(values)} as {where}")
    for value in values:
        if type(value) is not int or not 0 <= value < 2**62:
            raise _fault("row numbers, from 0", f"{repr(value)[:40]} as {where}")
    return values


def _check_keys(line: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if unknown := [key for key in line if key not in known]:
        raise _fault(f"no other keys than {', '.join(known)}", f"{unknown[0]!r} in {where}")


def _check_first(line: Mapping[str, Any], source: Pool, test: Pool | None, where: str) -> None:
    """Refuse a file of another version, or whose numbers are those of other rows."""
    if line["version"] != VERSION:
        raise _fault(f"version {VERSION}", f"{line['version']!r} in {where}", "read it with the fedtune that wrote it")
    pools = {"": ("data.source", source)} | ({} if test is None else {"test_": ("data.test", test)})
    for prefix, (key, own) in pools.items():
        given = {name: line[f"{prefix}{name}"] for name in ("rows", "digest") if f"{prefix}{name}" in line}
        if given and given != {name: value for name, value in vars(own).items() if name in given}:
            got = f"a file about {given.get('rows', own.rows)} rows with another digest, {where}"
            if given.get("rows", own.rows) != own.rows:
                got = f"a file about {given['rows']} rows, {where}"
            raise _fault(f"a partition of the {own.rows} rows of {key}", got, "give the rows that it was written for")


def _check_partition(parts: Mapping[str, Sequence[int]], count: int, what: str, path: Path, *, whole: bool) -> None:
    """Refuse a row beyond the last one, a row in two places and, of a whole partition, a row in none."""
    owner: dict[int, str] = {}
    for name, rows in parts.items():
        for row in rows:
            if row >= count:
                raise _fault(f"row numbers below {count}, the rows of {what}", f"{row} of {_owner(name)} in {path}")
            if row in owner:
                both = _owner(name) if owner[row] == name else f"{_owner(owner[row])} and {_owner(name)}"
                got = f"row {row} twice, of {both}, in {path}"
                raise _fault(f"every row of {what} in one place", got)
            owner[row] = name
    if whole and len(owner) < count:
        first = next(row for row in range(count) if row not in owner)
        got = f"{count - len(owner)} of {count} rows nowhere in {path}, the first of them row {first}"
        hint = 'give them to a client, or list them in a line {"left_out": [...]}'
        raise _fault(f"every row of {what} with a client or in left_out", got, hint)


def _owner(name: str) -> str:
    return "left_out" if name == NO_CLIENT else repr(name)


def _rows(values: Sequence[int]) -> Rows:
    return np.array(values, dtype=np.int64)


def _fault(expected: str, got: str, hint: str = "") -> ConfigError:
    return ConfigError(Fault(KEY, expected, got, hint))
