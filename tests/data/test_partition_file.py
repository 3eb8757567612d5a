from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data.partition_file import (
    ClientRows,
    Division,
    all_rows,
    division_digest,
    pool,
    read_division,
    write_division,
)
from fedtune.errors import ConfigError

SIX = pool([bytes([row]) * 16 for row in range(6)])


def rows(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def write(path: Path, *lines: Any) -> Path:
    file = path / "p.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def test_one_line_for_each_client_and_one_for_the_rows_that_are_left_out() -> None:
    clients = {"a": ClientRows(rows(0, 3), rows(1)), "b": ClientRows(rows(5), rows())}
    text = write_division(Division(clients, rows(2, 4), SIX))
    first, *lines = text.splitlines()
    assert json.loads(first) == {"version": 1, "rows": 6, "digest": SIX.digest}
    assert lines == [
        '{"client": "a", "rows": [0, 3], "held_out": [1]}',
        '{"client": "b", "rows": [5], "held_out": []}',
        '{"left_out": [2, 4]}',
    ]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(["north", "south", "held north", "held south", ""]), min_size=6, max_size=6), st.data())
def test_what_is_written_is_read_the_same(
    tmp_path_factory: pytest.TempPathFactory, owners: list[str], data: st.DataObject
) -> None:
    def of(owner: str) -> list[int]:
        return [row for row, own in enumerate(owners) if own == owner]

    clients = {
        name: ClientRows(rows(*of(name)), rows(*data.draw(st.permutations(of(f"held {name}")))))
        for name in ("north", "south")
    }
    division = Division(clients, rows(*of("")), SIX)
    file = tmp_path_factory.mktemp("p") / "p.jsonl"
    file.write_text(write_division(division))
    again = read_division(file, SIX, None)
    assert write_division(again) == write_division(division)
    assert division_digest(again) == division_digest(division)
    assert sorted([row for own in again.clients.values() for row in all_rows(own).tolist()] + of("")) == list(range(6))


def test_a_file_by_hand_needs_no_first_line_and_no_held_out_rows(tmp_path: Path) -> None:
    file = write(tmp_path, {"client": "b", "rows": [5, 0]}, "", {"client": "a", "rows": [1, 2, 3, 4], "test": [1]})
    division = read_division(file, SIX, pool([b"x", b"y"]))
    assert list(division.clients) == ["a", "b"]
    assert division.clients["b"].rows.tolist() == [0, 5]
    assert division.clients["b"].held_out is None
    assert division.clients["a"].test is not None


WHOLE = {"client": "a", "rows": [0, 1, 2, 3, 4, 5]}


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([{"client": "a", "rows": [0, 1, 2]}], "3 of 6 rows nowhere in .*, the first of them row 3; give them to a"),
        ([{"client": "a", "rows": [0, 1, 2, 3, 4, 5, 1]}], "every row of the source in one place; got row 1 twice, of"),
        ([WHOLE, {"client": "b", "rows": [5]}], "row 5 twice, of 'a' and 'b'"),
        ([WHOLE | {"held_out": [2]}], "row 2 twice, of 'a'"),
        ([WHOLE, {"left_out": [2]}], "row 2 twice, of 'a' and left_out"),
        ([WHOLE, {"client": "left_out", "rows": [2]}], "row 2 twice, of 'a' and 'left_out'"),
        ([{"client": "a", "rows": [0, 1, 2, 3, 4, 6]}], "row numbers below 6, the rows of the source; got 6 of 'a'"),
        ([{"client": "a", "rows": [-1]}], "row numbers, from 0; got -1 as rows of 'a' in line 1"),
        ([{"client": "a", "rows": [True]}], "got True as rows of 'a'"),
        ([{"client": "a", "rows": [1.0]}], r"got 1\.0 as rows of 'a'"),
        ([{"client": "a", "rows": 3}], "a list of row numbers, from 0; got an int as rows of 'a'"),
        ([{"client": "a"}], "the rows of 'a'; got client in line 1"),
        ([WHOLE | {"train": []}], "no other keys than client, rows, held_out, test; got 'train' in line 1"),
        ([WHOLE, {"client": "a", "rows": []}], "one line for each client; got 'a' again in line 2"),
        ([{"client": "../a", "rows": []}], "a client's name of letters, digits"),
        ([{"client": 3, "rows": []}], "a client's name of letters, digits"),
        ([{"rows": [0]}], "a line with client and rows, or with left_out; got rows in line 1"),
        ([WHOLE, {"version": 1}], "a line with client and rows"),
        ([{"version": 2}, WHOLE], "version 1; got 2 in line 1"),
        ([{"version": 1, "rows": 7}, WHOLE], r"a partition of the 6 rows of data\.source; got a file about 7 rows"),
        ([{"version": 1, "rows": 6, "digest": "0"}, WHOLE], "a file about 6 rows with another digest"),
        ([{"version": 1, "columns": 6}, WHOLE], "got 'columns' in line 1"),
        (["[1]"], "one JSON object per line; got a list in line 1"),
        (["{"], "one JSON object per line"),
        (["[" * 100_000], "one JSON object per line"),
        ([""], "at least one line with a client; got none"),
        ([{"left_out": [0, 1, 2, 3, 4, 5]}], "at least one line with a client; got none"),
    ],
)
def test_a_file_that_is_no_partition_is_refused_by_line_client_and_row(
    tmp_path: Path, lines: list[Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.split\.file: expected .*{text}"):
        read_division(write(tmp_path, *lines), SIX, None)


def test_test_rows_are_checked_too(tmp_path: Path) -> None:
    two = pool([b"x", b"y"])
    for test, text in (([2], "row numbers below 2, the rows of the test data; got 2 of 'a'"), ([1, 1], "row 1 twice")):
        with pytest.raises(ConfigError, match=text):
            read_division(write(tmp_path, WHOLE | {"test": test}), SIX, two)
    first = {"version": 1, "test_rows": 3, "test_digest": two.digest}
    with pytest.raises(ConfigError, match=r"a partition of the 2 rows of data\.test; got a file about 3 rows"):
        read_division(write(tmp_path, first, WHOLE | {"test": [1]}), SIX, two)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a partition file in JSON lines, UTF-8; got .*none\.jsonl \(No such file"):
        read_division(tmp_path / "none.jsonl", SIX, None)
    (tmp_path / "x").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_division(tmp_path / "x", SIX, None)
