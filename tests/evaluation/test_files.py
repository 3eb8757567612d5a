from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import ConfigError
from fedtune.evaluation.files import Row, read_rows, split_file
from tests.evaluation.conftest import arc_row, mmlu_row, write


def test_rows_know_their_file_and_number(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", mmlu_row(1), mmlu_row(2))
    second = read_rows(path, "--data mmlu")[1]
    assert second.place == f"{path} row 2"
    assert second.values == mmlu_row(2)


def test_parquet_rows_keep_their_lists_and_structures(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([arc_row(1)]), tmp_path / "test-00000-of-00001.parquet")
    assert split_file(tmp_path, ("test",), "--data arc", "") == tmp_path / "test-00000-of-00001.parquet"
    [row] = read_rows(tmp_path / "test-00000-of-00001.parquet", "--data arc")
    assert row.values == arc_row(1)


def test_the_first_split_of_a_folder_is_taken(tmp_path: Path) -> None:
    for name in ("validation.jsonl", "test.json", "testament.jsonl", "test.md"):
        (tmp_path / name).write_text("")
    assert split_file(tmp_path, ("test", "validation"), "--data x", "").name == "test.json"
    assert split_file(tmp_path, ("dev", "validation"), "--data x", "").name == "validation.jsonl"
    assert split_file(tmp_path / "test.md", ("dev",), "--data x", "").name == "test.md"
    with pytest.raises(ConfigError, match=r"expected a file such as dev.jsonl .*; got .*test.md.*; ask for it"):
        split_file(tmp_path, ("dev",), "--data x", "ask for it")


@pytest.mark.parametrize("value", [None, "", "  ", 3, ["text"]])
def test_a_text_is_a_text(value: Any) -> None:
    with pytest.raises(ConfigError, match="place: expected "):
        Row("place", {"question": value, "other": "x"}).text("question")


def test_the_first_of_several_names_counts() -> None:
    assert Row("place", {"instruction": "b", "question": None}).text("question", "instruction") == "b"
    with pytest.raises(ConfigError, match="place: expected the column a or b; got no value"):
        Row("place", {"c": None}).first("a", "b")
