from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedtune.data.settings import DataSettings, Split, faults
from fedtune.data.source import read_rows
from tests.data.test_source import BY_SITE, ROWS, lines, listed, read, refusal


def test_classes_of_a_stored_data_set_keep_their_names(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).save_to_disk(tmp_path / "saved")
    rows = read(tmp_path, "saved", split=Split("iid", clients=1))
    assert [row["label"] for row in rows] == ["pos", "neg"]


def test_a_damaged_saved_data_set_is_refused(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"junk")
    assert "expected a folder made by save_to_disk" in refusal(tmp_path, "saved")


def test_a_filtered_data_set_gives_the_rows_that_are_left() -> None:
    data = Dataset.from_dict({"text": ["a", "b", "c"]}).filter(lambda row: row["text"] != "a").select([1, 0])
    rows = read_rows(DataSettings("x", Split("key", by="group")), {"me": data}, task="causal").rows
    assert listed(rows) == [{"text": "c", "group": "me"}, {"text": "b", "group": "me"}]


def test_a_stream_gives_its_first_rows_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    data = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)

    def load_dataset(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return data.to_iterable_dataset() if options.get("streaming") else data

    monkeypatch.setattr("fedtune.data.stored.load_dataset", load_dataset)
    options: dict[str, Any] = {"split": Split("iid", clients=1), "limit": 2}
    assert read(tmp_path, "meta/data:test", streaming=True, **options) == [
        {"text": "a", "label": "pos"},
        {"text": "b", "label": "neg"},
    ]
    assert asked == [(("meta/data", None), {"split": "test", "streaming": True, "revision": None})]
    assert len(read(tmp_path, "meta/data", **options)) == 3  # the limit is drawn later, at random
    (tmp_path / "x.jsonl").write_text(lines(ROWS))
    assert "data.source: expected a hub data set, with data.streaming; got" in refusal(
        tmp_path, streaming=True, limit=1
    )
    assert [fault.path for fault in faults(DataSettings("meta/data", BY_SITE, streaming=True))] == ["data.limit"]


@pytest.mark.parametrize("error", [ConnectionError("no way"), RuntimeError("no way"), ValueError("no way")])
def test_whatever_a_hub_answers_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr("fedtune.data.stored.load_dataset", load_dataset)
    assert "data.source: expected a reachable hub name or an existing path; got 'meta/data' (no way)" in (
        refusal(tmp_path, "meta/data")
    )
