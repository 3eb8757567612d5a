from __future__ import annotations

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from fedtune.data.settings import DataSettings, Split, Task
from fedtune.data.source import read_source, read_test
from fedtune.data.table import Table
from fedtune.errors import ConfigError, ExtraError

ROWS = [{"text": "eins", "label": 1, "site": "b"}, {"text": "NA", "label": 0, "site": "a"}]
WANTED = [{"text": "eins", "label": "1", "group": "b"}, {"text": "NA", "label": "0", "group": "a"}]
BY_SITE = Split("key", by="site")


def read(root: Path, source: Any, *, task: Task = "classification", **settings: Any) -> list[dict[str, Any]]:
    options = DataSettings(source, **{"split": BY_SITE, **settings})
    return listed(read_source(options, root, task=task).rows)


def listed(table: Table) -> list[dict[str, Any]]:
    values = (table.column(name) for name in table.names)
    return [dict(zip(table.names, row, strict=True)) for row in zip(*values, strict=True)]


def refusal(root: Path, source: Any = "x.jsonl", **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(root, source, **{"split": Split("iid", clients=1), "task": "causal", **settings})
    return str(caught.value)


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_all_formats_give_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    (tmp_path / "c.csv").write_text("text,label,site\neins,1,b\nNA,0,a\n")
    data = Dataset.from_list(ROWS)
    pyarrow.parquet.write_table(data.data.table, tmp_path / "d.parquet")
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "both")
    for source in ("a.jsonl", "b.json", "c.csv", "d.parquet", "saved", "both"):
        assert read(tmp_path, source) == WANTED, source


def test_text_files_give_one_row_per_line_that_is_not_blank(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\n\n  \ntwo\u2028still two\n")
    rows = read(tmp_path, "x.txt", task="causal", split=Split("iid", clients=1))
    assert rows == [{"text": "one"}, {"text": "two\u2028still two"}]


def test_files_and_globs_are_read_in_sorted_order_and_name_the_group(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b", "a"):
        (tmp_path / "sub" / f"{name}.jsonl").write_text(lines([{"text": f"of {name}"}]))
    rows = read(tmp_path, "sub/*.jsonl", task="causal", split=Split("files"))
    assert rows == [{"text": "of a", "group": "a"}, {"text": "of b", "group": "b"}]
    ordered = read(tmp_path, ["sub/b.jsonl", "sub/a.jsonl"], task="causal", split=Split("files"))
    assert [row["group"] for row in ordered] == ["b", "a"]


def test_columns_are_mapped_and_those_the_task_does_not_use_may_be_odd(tmp_path: Path) -> None:
    row = {"q": "why?", "input": None, "response": 7, "label": None, "text": "", "extra": [1, "a"]}
    (tmp_path / "x.jsonl").write_text(lines([row]))
    fields = {"instruction": "q", "output": "response"}
    rows = read(tmp_path, "x.jsonl", task="causal", fields=fields, split=Split("iid", clients=1))
    assert rows == [{"instruction": "why?", "input": "", "output": "7"}]


def test_the_test_file_is_read_without_the_split_column(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(lines([{"text": "x", "label": 1}]))
    settings = DataSettings("x.jsonl", BY_SITE, test="t.jsonl")
    source = read_test(settings, tmp_path, task="classification")
    assert source is not None
    assert listed(source.rows) == [{"text": "x", "label": "1"}]
    assert read_test(replace(settings, test=None), tmp_path, task="causal") is None
    with pytest.raises(ConfigError, match=r"data\.test: expected an existing file"):
        read_test(replace(settings, test="gone.jsonl"), tmp_path, task="causal")


def test_an_absent_column_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(lines([{"text": "a", "responses": "b"}]))
    text = refusal(tmp_path, fields={"output": "response"})
    assert text.startswith("data.fields.output: expected column 'response'; got text, responses in ")
    assert text.endswith("did you mean 'responses'?")
    assert refusal(tmp_path, split=BY_SITE).startswith("data.split.by: expected column 'site'; got text, responses")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data.source: expected at least one row; got none in"),
        (b"\n\n", "expected at least one row"),
        (b"\x93\xff\x00\x01", "expected a text file in UTF-8; got byte 0x93 at offset 0"),
        ("text".encode("utf-16"), "expected a text file in UTF-8"),
        (b'{"text": "a"}\x00\n', "a NUL byte at character 13"),
        (b'{"text": "a"}\n\n{"text": "b', "expected one JSON object per line; got Unterminated string"),
        (b'{"text": "a"}\n\n{"text": "b', "Unterminated string starting at character 10 in line 3 of"),
        (b"{}\nno\n", "got Expecting value at character 1 in line 2 of"),
        (b'{"text": "a"}\n[1]\n', "got a list in line 2 of"),
        (b"[" * 100_000, "in line 1 of"),
        (b'{"text": ' + b"1" * 5000 + b"}", "in line 1 of"),
        (b'{"text": "a"}\n{"other": "b"}\n', "got 'None' in row 2 of column 'text'"),
        (b'{"text": "a"}\n{"text": " "}\n{"text": ""}\n', "got ' ' in row 2 of column 'text'"),
        (b'{"text": "a"}\n{"text": " "}\n{"text": ""}\n', "(2 such of 3)"),
        (b'{"text": "a"}\n{"text": ["b"]}\n', "in row 2 of column 'text'"),
        (b'{"text": "a"}\n{"text": 0.5}\n', "text or a whole number in every row; got '0.5' in row 2"),
        (b'{"text": "\\ud800"}\n', "in row 1 of column 'text'"),
    ],
)
def test_hostile_lines_are_refused_with_their_place(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"text,label\n", "expected at least one row; got none"),
        ("x.csv", b"text,label\na,1\nb\n", "expected 2 columns in every row; got another number in line 3"),
        ("x.csv", b"text,label\na,1,2\n", "expected 2 columns in every row; got another number in line 2"),
        ("x.csv", b'text\n"a\n', "expected well-formed CSV"),
        ("x.csv", b"text\na\x00b\n", "a NUL byte"),
        ("x.json", b'[{"text": "a"}', "expected a list of JSON objects; got Expecting ',' delimiter in line 1"),
        ("x.json", b'["a"]', "expected a list of JSON objects; got something else"),
        ("x.json", b"[" + b"1" * 5000 + b"]", "expected a list of JSON objects"),
        ("x.parquet", b"PAR1 and no more", "expected a readable Parquet file"),
        ("x.xlsx", b"?", "save it as CSV"),
        ("x.tar.gz", b"?", "unpack it"),
        ("x.dat", b"?", "set data.format"),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refusal(tmp_path, name)


def test_a_csv_with_an_unnamed_index_column_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(',text\n0,"two\nlines"\n')
    assert read(tmp_path, "x.csv", task="causal", split=Split("iid", clients=1)) == [{"text": "two\nlines"}]


def test_files_of_different_layout_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"text": "a"}]))
    (tmp_path / "b.jsonl").write_text(lines([{"instruction": "a", "output": "b"}]))
    assert "expected the columns of the first file (text); got instruction, output" in refusal(tmp_path, "*.jsonl")


def test_a_missing_file_is_told_apart_from_a_hub_name(tmp_path: Path) -> None:
    assert "data.source: expected an existing file, glob or folder; got 'gone.jsonl'" in refusal(tmp_path, "gone.jsonl")
    assert "expected an existing file, glob or folder" in refusal(tmp_path, "../gone/*.csv")
    for name in ("meta/absent-data", "meta/absent-data:test"):
        text = refusal(tmp_path, name)
        assert f"data.source: expected a reachable hub name or an existing path; got '{name}' (" in text
        assert text.endswith("give a local path, or download it once and set HF_HOME")


def test_keys_of_a_hub_are_refused_for_local_files(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    message = refusal(tmp_path, revision="v1", subset="main")
    assert "data.revision: expected none for local files, such as " in message
    assert "data.subset: expected none for local files" in message
    assert "only hub data sets have it" in message
    with pytest.raises(ConfigError, match=r"data\.revision: expected none for local files"):
        read(tmp_path, "x.jsonl", revision="v1", test="x.jsonl")
    # Its test may be the one that the hub has.
    assert len(read(tmp_path, "x.jsonl", revision="v1", test="some/name:test", split=Split("iid", clients=1))) == 1


def test_reading_local_files_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    table = pa.table({"text": ["a"]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    read(tmp_path, "x.parquet", task="causal", split=Split("iid", clients=1))
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


def test_files_of_one_name_are_several_clients(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(lines([{"text": f"of {name}"}]))
    rows = read(tmp_path, "*/train.jsonl", task="causal", split=Split("files"))
    assert rows == [{"text": "of a", "group": "a"}, {"text": "of b", "group": "b"}]


def test_a_column_that_is_called_group_may_name_the_clients(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(lines([{"text": "a", "group": "north"}]))
    rows = read(tmp_path, "x.jsonl", task="causal", split=Split("key", by="group"))
    assert rows == [{"text": "a", "group": "north"}]


def test_where_a_row_was_read_is_known_over_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"text": "1"}, {"text": "2"}]))
    (tmp_path / "b.jsonl").write_text(lines([{"text": "3"}]))
    source = read_source(DataSettings("*.jsonl", Split("files")), tmp_path, task="causal")
    assert source.place(1) == f"row 2 of {tmp_path}/a.jsonl"
    assert source.place(2) == f"row 1 of {tmp_path}/b.jsonl"


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in ("b", "a"):
        (tmp_path / "d" / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines([{"text": f"of {name}"}]).encode()))
    rows = read(tmp_path, "d", task="causal", split=Split("files"))
    assert rows == [{"text": "of a", "group": "a"}, {"text": "of b", "group": "b"}]


@pytest.mark.parametrize(
    ("package", "name"), [("pyarrow", "x.parquet"), ("pyarrow", "x.jsonl.zst"), ("datasets", "saved")]
)
def test_what_needs_a_package_that_is_absent_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    (tmp_path / "x.jsonl.zst").write_bytes(b"?")
    for module in ("arrow", "stored"):
        monkeypatch.delitem(sys.modules, f"fedtune.data.{module}", raising=False)
        monkeypatch.delattr(f"fedtune.data.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExtraError) as caught:
        read(tmp_path, name, task="causal", split=Split("iid", clients=1))
    text = str(caught.value)
    assert "\n" not in text
    assert name in text
    assert package in text
    assert "save the rows as JSON lines" in text


def test_files_of_text_are_read_without_datasets_and_pyarrow(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(lines(ROWS))
    (tmp_path / "y.csv").write_text("text\na\n")
    code = f"""
import sys
from pathlib import Path
from fedtune.data import federation
from fedtune.data.settings import DataSettings, Split
from fedtune.data.source import read_rows, read_source
for name in ("x.jsonl", "y.csv"):
    read_source(DataSettings(name, Split("iid", clients=1)), Path({str(tmp_path)!r}), task="causal")
read_rows(DataSettings("x", Split("key", by="group")), {{"me": [{{"text": "a"}}]}}, task="causal")
print(*({{"datasets", "pyarrow", "pandas", "torch", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
