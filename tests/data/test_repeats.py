from __future__ import annotations

import numpy as np

from fedtune.data.repeats import fingerprints, note_on_held_out, note_on_test
from fedtune.data.table import table_of

ROWS = fingerprints(table_of({"text": ["a", "b", "a", "c"], "label": ["0", "1", "1", "0"], "group": list("xxyy")}))
TRAINED = {"x": np.array([0, 1]), "y": np.array([3])}


def test_a_row_is_its_texts_without_label_and_group() -> None:
    assert len(set(ROWS)) == 3
    assert ROWS[0] == ROWS[2]
    pairs = table_of({"instruction": ["a", "a"], "input": ["", "b"]})
    assert fingerprints(pairs)[0] == fingerprints(table_of({"instruction": ["a"]}))[0]
    assert fingerprints(pairs)[0] != fingerprints(pairs)[1]


def test_held_out_rows_that_any_client_trains_on_are_counted_by_client() -> None:
    (note,) = note_on_held_out(ROWS, TRAINED, {"x": [], "y": [ROWS[2]], "z": [b"new"]})
    assert note.startswith("data: 1 of 2 held-out rows equal a row that is trained on (y: 1); their scores are better")
    assert note_on_held_out(ROWS, {"x": np.array([1])}, {"y": [ROWS[2]]}) == []


def test_test_rows_that_are_trained_on_are_counted() -> None:
    (note,) = note_on_test(ROWS, TRAINED, [ROWS[0], ROWS[1], b"new"])
    assert note.startswith("data.test: 2 of 3 rows equal a row that is trained on")
    assert note_on_test(ROWS, TRAINED, [b"new"]) == []
