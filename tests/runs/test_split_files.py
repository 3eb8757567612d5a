"""Files of a split: the same clients when they are read again, by fedtune and by `datasets`, in both forms."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from fedtune.data.table import from_rows
from fedtune.errors import ConfigError, ExtraError, StoreError
from fedtune.runs.split_files import json_lines, write_split

ROWS = [{"text": f"row {number}", "kind": "abc"[number % 3]} for number in range(30)]


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    split = {"kind": "dirichlet", "by": "kind", "clients": 3, "alpha": 1.0}
    return {"model": {"base": "embedded"}, "data": {"source": str(path), "split": split, "held_out": 0.2}}


def contents(folder: Path) -> dict[str, list[str]]:
    return {path.stem: sorted(path.read_text().splitlines()) for path in sorted(folder.iterdir())}


def test_the_files_and_the_numbers_are_the_same_split_again(recipe: dict[str, Any], tmp_path: Path) -> None:
    written = write_split(recipe, tmp_path / "parts")
    assert written.files == 6
    assert sum(own["train"] + own["held_out"] for own in written.split["clients"].values()) == 30
    by_numbers = {
        **recipe,
        "data": {**recipe["data"], "split": {"kind": "file", "file": str(tmp_path / "parts/partition.jsonl")}},
    }
    again = write_split(by_numbers, tmp_path / "again")
    assert again.split["digest"] == written.split["digest"]
    assert contents(tmp_path / "again/validation") == contents(tmp_path / "parts/validation")
    train = {"source": str(tmp_path / "parts/train"), "split": {"kind": "files"}, "held_out": 0.0}
    whole = write_split({**recipe, "data": train}, tmp_path / "whole")
    assert contents(tmp_path / "whole/train") == contents(tmp_path / "parts/train")
    assert list(whole.split["clients"]) == list(written.split["clients"])


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_datasets_reads_the_folder_with_its_splits(form: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    write_split(recipe, tmp_path / "parts", form=form, column="client")
    kind = "json" if form == "jsonl" else form
    read = load_dataset(kind, data_dir=str(tmp_path / "parts"), cache_dir=str(tmp_path / "cache"))
    assert {*read} == {"train", "validation"}
    assert sorted([*read["train"]["text"], *read["validation"]["text"]]) == sorted(row["text"] for row in ROWS)
    assert {*read["train"]["client"]} == {"client-0", "client-1", "client-2"}


def test_a_folder_that_holds_files_is_left_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="expected a new or an empty folder"):
        write_split(recipe, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.split\.alpha"):
        write_split(recipe, tmp_path / "parts", overrides=["data.split.alpha=0"])
    assert not (tmp_path / "parts").exists()


def test_a_column_of_several_types_is_refused_in_parquet_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "extra": 1}\n{"text": "b", "extra": "x"}\n')
    recipe = {"model": {"base": "embedded"}, "data": {"source": str(path), "split": {"kind": "iid", "clients": 2}}}
    with pytest.raises(ConfigError, match=r"--form: expected columns of one type .*'extra'.*write the form jsonl"):
        write_split(recipe, tmp_path / "parts", form="parquet")
    assert [one.name for one in tmp_path.iterdir()] == ["rows.jsonl"]
    assert write_split(recipe, tmp_path / "parts").files == 2


def test_parquet_without_its_package_is_refused_before_a_row_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ExtraError, match=r'expected the package pyarrow; got none; run pip install "fedtune\[data\]"'):
        write_split({"model": {"base": "embedded"}, "data": {"source": "absent"}}, tmp_path / "parts", form="parquet")
    assert not (tmp_path / "parts").exists()


def test_numbers_that_are_not_finite_are_null() -> None:
    text = json_lines(from_rows([{"score": float("nan"), "more": {"parts": [float("inf"), 1.5]}}]))
    assert text == '{"score": null, "more": {"parts": [null, 1.5]}}\n'


def test_what_json_cannot_say_is_text() -> None:
    assert json_lines(from_rows([{"a": 1, "b": Path("x")}, {"a": None, "b": "ü"}])) == (
        '{"a": 1, "b": "x"}\n{"a": null, "b": "ü"}\n'
    )
