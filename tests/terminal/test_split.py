from __future__ import annotations

from typing import Any

import pytest

from fedtune.terminal.split import lines


def split(clients: dict[str, list[int]], labels: list[str], **more: Any) -> dict[str, Any]:
    return {
        "kind": "meta",
        "digest": "0" * 64,
        "clients": {name: {"train": sum(own), "held_out": 0, **more} for name, own in clients.items()},
        "left_out": 0,
        "mix": {
            "label": "category",
            "labels": labels,
            "counts": clients,
            "distances": dict.fromkeys(clients, 0.25),
            "mean_distance": 0.25,
        },
    }


def test_sizes_labels_and_distances_by_hand() -> None:
    assert list(lines(split({"north": [1200, 3], "south": [0, 40]}, ["qa", "open"], test=7))) == [
        "Split meta: 2 clients hold 1,243 rows; 0 go to none",
        "client                      train  held out    test  distance",
        "north                       1,203         0       7     0.250",
        "south                          40         0       7     0.250",
        "",
        "Rows of the labels in 'category'",
        "client                      qa  open",
        "north                    1,200     3",
        "south                        0    40",
        "all                      1,200    43",
        "    mean total-variation distance of a client from all rows together: 0.250",
    ]


def test_the_largest_labels_are_shown_and_the_rest_is_folded() -> None:
    labels = [f"label number {place}" for place in range(12)]
    text = list(lines(split({"a": list(range(12)), "b": [1] * 12}, labels)))
    assert "Rows of the labels in 'category', the 3 largest of 12" in text
    row = next(line for line in text[6:] if line.startswith("a "))
    assert row.split() == ["a", "11", "10", "9", str(sum(range(9)))]


@pytest.mark.parametrize("labels", [1, 4, 77])
@pytest.mark.parametrize("count", [1, 9_999_999])
def test_no_line_is_longer_than_eighty_columns(labels: int, count: int) -> None:
    clients = {f"a client with a long name {place}": [count] * labels for place in range(30)}
    text = list(lines(split(clients, [f"a very long label, number {place}" for place in range(labels)], test=3)))
    assert max(map(len, text)) <= 80
    assert "and 6 clients more; --json lists every client" in text


def test_rows_without_labels_have_sizes_alone() -> None:
    content = split({"a": [3]}, ["x"])
    del content["mix"]
    assert list(lines(content))[1:] == [
        "client                      train  held out",
        "a                               3         0",
    ]
