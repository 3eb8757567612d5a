from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.data.labels import alike, class_names
from fedtune.data.settings import DataSettings, Split, faults
from fedtune.data.source import labels_of, read_source
from fedtune.errors import ConfigError


def source(root: Path, labels: list[Any], name: str = "x.jsonl") -> Any:
    rows = [json.dumps({"text": f"row {row}", "label": label}) for row, label in enumerate(labels)]
    (root / name).write_text("\n".join(rows))
    return read_source(DataSettings(name, Split("iid", clients=1)), root, task="classification")


def settings(**options: Any) -> DataSettings:
    return DataSettings("x.jsonl", Split("iid", clients=1), **options)


def test_the_classes_are_those_that_occur_or_those_that_are_named(tmp_path: Path) -> None:
    rows = source(tmp_path, ["yes", "no", "yes"])
    assert class_names(settings(), rows) == ["no", "yes"]
    assert class_names(settings(labels=("maybe", "yes", "no")), rows) == ["maybe", "yes", "no"]


def test_a_source_of_one_class_takes_part_where_the_classes_are_named(tmp_path: Path) -> None:
    rows = source(tmp_path, ["yes", "yes"])
    with pytest.raises(ConfigError, match=r"at least two classes; got only 'yes'; name all classes .* in data\.labels"):
        class_names(settings(), rows)
    assert class_names(settings(labels=("no", "yes")), rows) == ["no", "yes"]


def test_a_label_that_is_not_named_is_refused_with_its_row(tmp_path: Path) -> None:
    rows = source(tmp_path, ["yes", "Yes", "no"])
    with pytest.raises(ConfigError) as caught:
        class_names(settings(labels=("no", "yes")), rows)
    assert str(caught.value) == (
        f"data.labels: expected labels of data.labels (no, yes); got 'Yes' in row 2 of {tmp_path}/x.jsonl "
        "(1 such of 3); add it, or check its spelling"
    )
    test = source(tmp_path, ["maybe"], "t.jsonl")
    with pytest.raises(ConfigError, match=r"data\.test: expected classes that occur in the source"):
        class_names(settings(), rows, test)


def test_labels_that_differ_by_case_or_blanks_are_reported() -> None:
    assert alike(["a", "A ", "b"])[0].startswith("data.fields.label: 'a' and 'A ' differ only by case or blanks")
    assert alike(["a", "b", "ab"]) == []


def test_a_site_lists_its_labels_without_reading_its_texts(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "", "label": "b"}\n{"text": "t", "label": "a"}\n')
    assert list(labels_of(settings(), tmp_path)) == ["a", "b"]
    assert list(labels_of(settings(labels=("z", "a", "b")), tmp_path)) == ["z", "a", "b"]


def test_classes_are_named_once_each(tmp_path: Path) -> None:
    for labels in (("a",), ("a", "a"), ("a", "b", "a")):
        assert [fault.path for fault in faults(settings(labels=labels))] == ["data.labels"]
    assert faults(settings(labels=("a", "b"))) == []
