from __future__ import annotations

import numpy as np

from fedtune.data.federation import Federation
from fedtune.data.mix import Mix
from fedtune.data.partition_file import ClientRows, Division, division_digest, pool
from fedtune.runs.split import split_of


def rows(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, dtype=np.int64)


def test_a_split_as_numbers_by_hand() -> None:
    clients = {"a": ClientRows(rows(0, 1), rows(2), rows(0)), "b": ClientRows(rows(3), rows(), rows())}
    division = Division(clients, rows(4, 5), pool([b""] * 6), pool([b""]))
    mix = Mix("kind", ["x", "y"], {"a": [3, 0], "b": [0, 1]})
    assert split_of(Federation({}, (), (), (), division=division, mix=mix), "meta") == {
        "kind": "meta",
        "digest": division_digest(division),
        "clients": {"a": {"train": 2, "held_out": 1, "test": 1}, "b": {"train": 1, "held_out": 0, "test": 0}},
        "left_out": 2,
        "mix": {
            "label": "kind",
            "labels": ["x", "y"],
            "counts": {"a": [3, 0], "b": [0, 1]},
            "distances": {"a": 0.25, "b": 0.75},
            "mean_distance": 0.5,
        },
    }


def test_data_at_sites_and_rows_without_labels_have_no_numbers_of_their_own() -> None:
    assert split_of(Federation({}, (), (), ()), "key") == {}
    division = Division({"a": ClientRows(rows(0), rows())}, rows(), pool([b""]))
    split = split_of(Federation({}, (), (), (), division=division), "iid")
    assert "mix" not in split
    assert split["clients"] == {"a": {"train": 1, "held_out": 0}}
