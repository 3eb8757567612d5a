"""Rows for others: every column as it was read, each row with one client, and test rows as they are divided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.data.exported import EVERYONE, HELD_OUT, TEST, TRAIN, exported_rows
from fedtune.data.settings import DataSettings, Split
from fedtune.errors import ConfigError

ROWS = [{"text": f"row {number}", "kind": "ab"[number % 2], "note": number} for number in range(20)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def test_every_row_is_with_one_client_and_keeps_its_columns(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", ROWS[:12]), write(tmp_path / "b.jsonl", ROWS[12:])
    settings = DataSettings([first, second], Split("iid", clients=3), held_out=0.2)
    rows = exported_rows(settings, task="causal", seed=1, root=tmp_path, column="client")
    notes = [
        note for split in (TRAIN, HELD_OUT) for table in rows.splits[split].values() for note in table.column("note")
    ]
    assert sorted(notes) == list(range(20))
    assert not rows.splits[TEST]
    for name, table in rows.splits[TRAIN].items():
        assert list(table.names) == ["text", "kind", "note", "client"]
        assert set(table.column("client")) == {name}
        assert [ROWS[number]["text"] for number in table.column("note")] == table.column("text")


def test_test_rows_are_divided_or_together(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "t.jsonl", ROWS[:6])
    split = Split("meta", by="kind", clients=2, match="train")
    rows = exported_rows(DataSettings("a.jsonl", split, test="t.jsonl"), task="causal", seed=1, root=tmp_path)
    assert {name: sorted(table.column("note")) for name, table in rows.splits[TEST].items()} == {
        "a": [0, 2, 4],
        "b": [1, 3, 5],
    }
    assert not rows.splits[HELD_OUT]
    settings = DataSettings("a.jsonl", Split("iid", clients=2), test="t.jsonl")
    assert list(exported_rows(settings, task="causal", seed=1, root=tmp_path).splits[TEST]) == [EVERYONE]


def test_a_column_that_is_there_and_rows_without_numbers_are_refused(tmp_path: Path) -> None:
    settings = DataSettings(write(tmp_path / "a.jsonl", ROWS), Split("iid", clients=2))
    with pytest.raises(ConfigError, match="--column: expected a name that no column of the rows has; got 'kind'"):
        exported_rows(settings, task="causal", seed=0, root=tmp_path, column="kind")
    with pytest.raises(ConfigError, match="--column: expected a name for the column; got an empty one"):
        exported_rows(settings, task="causal", seed=0, root=tmp_path, column="")
    plugin = DataSettings("proverbs", Split("key", by="group"), format="plugin")
    with pytest.raises(ConfigError, match="files, a saved data set or a hub's"):
        exported_rows(plugin, task="causal", seed=0, root=tmp_path)
