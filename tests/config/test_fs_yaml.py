from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.config.fs_yaml import LARGEST, read_yaml
from fedtune.errors import ConfigError


def write(path: Path, text: str) -> Path:
    file = path / "c.yaml"
    file.write_text(text)
    return file


def test_values_by_dotted_key_with_lists_of_one_table_as_that_table(tmp_path: Path) -> None:
    text = """
    use_gpu: True
    train: {local_update_steps: 30, optimizer: {lr: 5e-3}}
    data: {splits: [0.9, 0.1, 0.0], splitter_args: [{alpha: 0.5}]}
    llm: {adapter: {use: yes, args: [{r: 8, lora_alpha: 16}]}}
    """
    assert read_yaml(write(tmp_path, text)) == {
        "use_gpu": True,
        "train.local_update_steps": 30,
        "train.optimizer.lr": "5e-3",  # a text in YAML 1.1
        "data.splits": [0.9, 0.1, 0.0],
        "data.splitter_args.alpha": 0.5,
        "llm.adapter.use": True,
        "llm.adapter.args.r": 8,
        "llm.adapter.args.lora_alpha": 16,
    }


def test_no_key_is_lost_where_a_table_is_empty(tmp_path: Path) -> None:
    text = "llm: {adapter: {args: [{}]}}\ndata: {splitter_args: [], args: [{}, {}]}\ntrain: {scheduler: {}}"
    assert read_yaml(write(tmp_path, text)) == {
        "llm.adapter.args": {},
        "data.splitter_args": [],
        "data.args": [{}, {}],
        "train.scheduler": {},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "YAML with each key once and no aliases; got 'a' twice in line 1"),
        ("a: {b: 1, c: {d: 1, d: 2}}", "got 'd' twice in line 1"),
        ("a: {b: 1}\na.b: 2", "a.b: expected one value; got two"),
        ("a: &x [1]\nb: *x", "got an alias in line 2"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: &c [*b, *b]", "got an alias in line 2"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor for the tag"),
        ("a: [1", "expected YAML with each key once"),
        ("[1, 2]", "expected tables of settings; got a list"),
        ("", "expected tables of settings; got nothing"),
        ("- " * 5000, "got"),
        ("a: " + "{b: " * 3000 + "1" + "}" * 3000, "got"),
        ("x" * (LARGEST + 1), "at most 1,048,576 bytes; got 1,048,577"),
    ],
    ids=range(12),
)
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_yaml(write(tmp_path, text))


def test_a_file_that_is_absent_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: 1 fault\n  expected a YAML file; got No such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="expected YAML in UTF-8"):
        read_yaml(tmp_path / "x.yaml")
