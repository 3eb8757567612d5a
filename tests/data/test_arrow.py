from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedtune.data.arrow import column_kinds, open_zstd, read_parquet, write_parquet
from fedtune.data.table import from_rows
from fedtune.errors import ConfigError


def test_columns_of_any_type_may_stand_beside_those_that_are_used(tmp_path: Path) -> None:
    odd = {
        "map": pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int32())),
        "duration": pa.array([1, 2], pa.duration("s")),
        "decimal": pa.array([None, None], pa.decimal128(5)),
        "union": pa.array([{"a": [b"\xff"]}] * 2),
    }
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pa.table({"text": pa.array(["one", "zwei"]).dictionary_encode(), **odd}), path)
    table = read_parquet(path, "data.source")
    assert (list(table.names), table.count) == (["text", *odd], 2)
    assert table.column("text") == ["one", "zwei"]


def test_classes_of_a_parquet_file_of_datasets_keep_their_names(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    data = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    pyarrow.parquet.write_table(data.data.table, tmp_path / "x.parquet")
    assert read_parquet(tmp_path / "x.parquet", "data.source").column("label") == ["pos", "neg", None]


def test_a_parquet_file_that_is_torn_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "y.parquet").write_bytes(whole[:-9])
    with pytest.raises(ConfigError, match=r"data\.source: expected a readable Parquet file; got .*y\.parquet"):
        read_parquet(tmp_path / "y.parquet", "data.source")


def test_a_damaged_archive_is_one_kind_of_error(tmp_path: Path) -> None:
    packed = pa.compress(b"text" * 99, codec="zstd", asbytes=True)
    (tmp_path / "x.zst").write_bytes(packed)
    with open_zstd(tmp_path / "x.zst") as stream:
        assert stream.read() == b"text" * 99
    for damaged in (packed[:-3], b"no zstd", packed[:8] + b"\xff" * 8):
        (tmp_path / "y.zst").write_bytes(damaged)
        with pytest.raises(OSError), open_zstd(tmp_path / "y.zst") as stream:  # noqa: PT011 - words of a library
            stream.read(2**20)


def test_a_table_is_written_in_the_types_of_all_rows_and_read_again(tmp_path: Path) -> None:
    table = from_rows([{"a": 1, "b": None}, {"a": 2, "b": "x"}])
    kinds = column_kinds(table)
    write_parquet(tmp_path / "x.parquet", table.select([0]), kinds)
    read = read_parquet(tmp_path / "x.parquet", "data.source")
    assert (read.column("a"), read.column("b")) == ([1], [None])
    with pytest.raises(ConfigError, match=r"--form: expected columns of one type each.*column 'a'"):
        column_kinds(from_rows([{"a": 1}, {"a": "x"}]))
