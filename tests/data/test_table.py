from __future__ import annotations

import numpy as np

from fedtune.data.table import Table, concatenate, from_rows, table_of, with_class_names


def test_selected_rows_keep_the_given_order() -> None:
    table = table_of({"text": ["a", "b", "c"], "label": [1, 2, 3]})
    part = table.select(np.array([2, 0]))
    assert (list(part.names), part.count, part.column("text"), part.column("label")) == (
        ["text", "label"],
        2,
        ["c", "a"],
        [3, 1],
    )
    assert part.select([1]).column("text") == ["a"]
    assert table.select([]).count == 0


def test_a_column_is_read_when_it_is_asked_for() -> None:
    asked: list[str] = []

    def column(name: str) -> list[str]:
        asked.append(name)
        return ["x"]

    part = Table(["a", "b"], 1, column).select([0])
    assert asked == []
    assert (part.column("b"), asked) == (["x"], ["b"])


def test_a_key_that_a_row_lacks_is_none() -> None:
    table = from_rows([{"a": 1}, {"b": 2}])
    assert (list(table.names), table.column("a"), table.column("b")) == (["a", "b"], [1, None], [None, 2])
    assert table_of({}).count == 0


def test_hidden_classes_are_none() -> None:
    assert with_class_names([1, -1, None, 0], ["neg", "pos"]) == ["pos", None, None, "neg"]


def test_tables_are_joined_and_widened() -> None:
    table = concatenate([from_rows([{"a": 1}]), from_rows([{"b": 2}, {"a": 3}])]).with_column("c", "xyz")
    assert list(table.names) == ["a", "b", "c"]
    assert (table.count, table.column("a"), table.column("b")) == (3, [1, None, 3], [None, 2, None])
    assert table.select([2, 0]).column("c") == ["z", "x"]
