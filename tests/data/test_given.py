"""What Python code gives in place of files is read by its form; a partitioner's parts become clients."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from fedtune.data.given import Given, check_given, given_notes, given_rows
from fedtune.data.settings import DataSettings, Split
from fedtune.errors import ConfigError

ROWS = [{"text": f"row {number}"} for number in range(6)]


class Parts:
    """A partitioner by hand, of the surface that flwr-datasets documents: the rows of each part by their number."""

    def __init__(self, *parts: Sequence[int], data: Any = None) -> None:
        self.parts, self._dataset = parts, data

    @property
    def dataset(self) -> Any:
        if self._dataset is None:
            raise AttributeError("the dataset should be set before")
        return self._dataset

    @dataset.setter
    def dataset(self, value: Any) -> None:
        if not isinstance(value, Dataset):
            raise TypeError("a Dataset")
        self._dataset = value

    def is_dataset_assigned(self) -> bool:
        return self._dataset is not None

    @property
    def num_partitions(self) -> int:
        return len(self.parts)

    def load_partition(self, number: int) -> Any:
        data: Any = self.dataset
        return data.select(self.parts[number])


def texts(rows: Any) -> list[str]:
    return [row["text"] for row in rows]


def test_the_parts_of_a_partitioner_are_clients_in_order_and_empty_ones_are_named() -> None:
    data = Dataset.from_list(ROWS)
    given = given_rows(Parts([0, 3], [], [5], data=data))
    assert {name: texts(rows) for name, rows in given.by_client.items()} == {
        "client-0": ["row 0", "row 3"],
        "client-2": ["row 5"],
    }
    assert given_notes(given) == ["data: the partitioner gives no row to client-1, which takes no part"]
    assert "client-1, client-2, which take no part" in given_notes(Given(empty=("client-1", "client-2")))[0]


def test_names_have_as_many_digits_as_the_last_one() -> None:
    given = given_rows(Parts(*([0] for _ in range(11)), data=Dataset.from_list(ROWS)))
    assert list(given.by_client) == sorted(given.by_client)
    assert list(given.by_client)[:2] == ["client-00", "client-01"]


def test_a_pair_leaves_the_partitioner_as_it_was() -> None:
    data, partitioner = Dataset.from_list(ROWS), Parts([0, 1], [2])
    assert texts(given_rows((data, partitioner)).by_client["client-1"]) == ["row 2"]
    assert not partitioner.is_dataset_assigned()
    assert list(given_rows((data, Parts([0], data=data))).by_client) == ["client-0"]


def test_what_was_read_is_not_read_again() -> None:
    given = given_rows({"a": ROWS})
    assert given_rows(given) is given
    assert given == Given(by_client={"a": ROWS})


def test_a_data_set_is_divided_and_a_dictionary_of_splits_brings_its_test() -> None:
    data = Dataset.from_list(ROWS)
    assert given_rows(data).whole is data
    assert given_rows(ROWS).whole is ROWS
    splits = DatasetDict(train=data, test=Dataset.from_list(ROWS[:1]), validation=data)
    given = given_rows(splits)
    assert given.whole is not None
    assert texts(given.test) == ["row 0"]
    assert given_notes(given) == ["data: not used: the splits validation"]


class Broken(Parts):
    def load_partition(self, number: int) -> Any:
        raise ValueError("alpha is too small\nmore")


class Bare:
    """Parts of one's own, which say nothing of a data set."""

    num_partitions = 1

    def __init__(self, part: Any) -> None:
        self.part = part

    def load_partition(self, number: int) -> Any:
        if isinstance(self.part, Exception):
            raise self.part
        return self.part


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "expected rows by client, one Dataset to divide, or a partitioner of flwr-datasets; got an int"),
        ([], "got no row"),
        ({}, "of one client at least; got none"),
        ([1, 2], "got a list"),
        (Dataset.from_list(ROWS).to_pandas(), r"got a DataFrame; give datasets\.Dataset\.from_pandas"),
        (iter(ROWS), "got a list_iterator"),
        (DatasetDict(a=Dataset.from_list(ROWS)), "a DatasetDict with a split 'train'; got a; .*dict"),
        (Parts([0]), "a partitioner whose data set is set; got Parts without one; set partitioner.dataset"),
        ((ROWS, Parts([0])), "a datasets.Dataset before its partitioner; got a list"),
        ((Dataset.from_list(ROWS), Parts([0], data=Dataset.from_list(ROWS))), "without a data set, beside one"),
        (Parts([], [], data=Dataset.from_list(ROWS)), "one part with a row; got 2 empty parts of Parts"),
        (
            Broken([0], data=Dataset.from_list(ROWS)),
            r"Broken can divide; got ValueError \(alpha is too small\)",
        ),
        (Bare(None), r"rows that Bare can divide; got TypeError \(object of type 'NoneType'"),
        (Bare(OSError("no such file")), r"rows that Bare can divide; got OSError \(no such file\)"),
        ((ROWS, Bare([])), "a partitioner without a data set, beside one; got a Bare with another one"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        given_rows(data)
    assert len(caught.value.faults) == 1


def test_a_split_that_the_rows_cannot_have_is_refused() -> None:
    by_client, whole = given_rows({"a": ROWS}), given_rows(ROWS)
    check_given(DataSettings("x", Split("key", by="group")), by_client)
    check_given(DataSettings("x", Split("iid", clients=2)), whole)
    with pytest.raises(ConfigError, match=r"data\.split\.kind: expected 'key'"):
        check_given(DataSettings("x", Split("iid", clients=2)), by_client)
    with pytest.raises(ConfigError, match=r"data\.split\.match: expected nothing beside rows"):
        check_given(DataSettings("x", Split("key", by="group", match="train")), by_client)
    with pytest.raises(ConfigError, match="any but 'files'"):
        check_given(DataSettings("x", Split("files")), whole)


def test_partitioners_of_flwr_datasets_give_their_own_parts() -> None:
    partitioners = pytest.importorskip("flwr_datasets.partitioner")
    labels = random.Random(0).choices("abc", k=90)
    data = Dataset.from_list([{"text": f"row {number}", "kind": kind} for number, kind in enumerate(labels)])
    made = [
        partitioners.IidPartitioner(7),
        partitioners.DirichletPartitioner(5, "kind", alpha=0.5, min_partition_size=0, seed=1),
        partitioners.NaturalIdPartitioner("kind"),
    ]
    for partitioner in made:
        given = given_rows((data, partitioner))
        partitioner.dataset = data
        own = [texts(partitioner.load_partition(number)) for number in range(partitioner.num_partitions)]
        assert [texts(rows) for rows in given.by_client.values()] == [rows for rows in own if rows]
        assert len(given.by_client) + len(given.empty) == len(own)
