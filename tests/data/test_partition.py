from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data.partition import client_names, match_rows, partition, sorted_values
from fedtune.data.settings import Split
from fedtune.errors import ConfigError

GROUPS = st.lists(st.sampled_from(["a", "b", "c", "ä/1", "10", "9"]), min_size=1, max_size=60)


def test_key_gives_one_client_per_value_with_its_rows() -> None:
    parts = partition(Split("key", by="author"), rows=4, groups=["b", "a", "b", "c"], seed=0)
    assert {name: rows.tolist() for name, rows in parts.items()} == {"a": [1], "b": [0, 2], "c": [3]}


def test_numeric_keys_sort_as_numbers() -> None:
    groups = [str(value) for value in range(12)]
    parts = partition(Split("key", by="site"), rows=12, groups=groups, seed=0)
    assert list(parts) == sorted(parts) == [f"{value:02d}" for value in range(12)]
    assert [rows.tolist() for rows in parts.values()] == [[value] for value in range(12)]


def test_key_keeps_only_the_first_clients_by_name() -> None:
    parts = partition(Split("key", by="x", clients=2), rows=3, groups=["c", "a", "b"], seed=0)
    assert list(parts) == ["a", "b"]


def test_iid_parts_differ_by_at_most_one_row() -> None:
    parts = partition(Split("iid", clients=11), rows=100, groups=None, seed=0)
    assert list(parts) == sorted(parts)
    assert list(parts)[-1] == "client-10"
    assert {len(rows) for rows in parts.values()} == {9, 10}


def test_sizes_are_met_and_the_rest_is_left_over() -> None:
    parts = partition(Split("sizes", sizes=[3, 1]), rows=10, groups=None, seed=0)
    assert [len(rows) for rows in parts.values()] == [3, 1]
    with pytest.raises(ConfigError, match=r"data\.split\.sizes: expected sizes that sum to at most 3 rows; got 4"):
        partition(Split("sizes", sizes=[3, 1]), rows=3, groups=None, seed=0)


@settings(deadline=None, max_examples=50)
@given(GROUPS, st.integers(0, 2**32), st.integers(1, 5))
def test_every_row_goes_to_exactly_one_client(groups: list[str], seed: int, clients: int) -> None:
    clients = min(clients, len(groups))
    for split in (Split("key", by="x"), Split("files"), Split("iid", clients=clients)):
        parts = partition(split, rows=len(groups), groups=groups, seed=seed)
        assert np.sort(np.concatenate(list(parts.values()))).tolist() == list(range(len(groups)))
        assert list(parts) == sorted(parts)


@settings(deadline=None, max_examples=50)
@given(GROUPS, st.integers(0, 2**32), st.floats(0.05, 100), st.integers(1, 4), st.integers(1, 3))
def test_dirichlet_covers_every_row_and_respects_min_examples(
    groups: list[str], seed: int, alpha: float, clients: int, least: int
) -> None:
    split = Split("dirichlet", by="x", clients=clients, alpha=alpha, min_examples=least)
    try:
        parts = partition(split, rows=len(groups), groups=groups, seed=seed)
    except ConfigError:
        return  # refused, never silently smaller
    assert np.sort(np.concatenate(list(parts.values()))).tolist() == list(range(len(groups)))
    assert min(len(rows) for rows in parts.values()) >= least


def test_dirichlet_is_skewed_for_small_alpha_and_even_for_large() -> None:
    groups = ["a"] * 300 + ["b"] * 300

    def largest_share(alpha: float) -> float:
        split = Split("dirichlet", by="x", clients=3, alpha=alpha)
        parts = partition(split, rows=600, groups=groups, seed=1)
        return max(np.count_nonzero(rows < 300) / 300 for rows in parts.values())

    assert largest_share(1e5) < 0.35
    assert largest_share(0.1) > 0.6


def test_dirichlet_shuffles_a_group_before_it_is_shared_out() -> None:
    split = Split("dirichlet", by="x", clients=2, alpha=1e5)
    first = partition(split, rows=200, groups=["a"] * 200, seed=1)["client-0"]
    assert first.tolist() != list(range(len(first)))
    assert np.count_nonzero(first < 100) < 0.7 * len(first)  # both halves of a sorted file reach every client


def test_an_impossible_dirichlet_split_says_which_client_and_what_to_do() -> None:
    split = Split("dirichlet", by="x", clients=6, alpha=0.01, min_examples=50)
    with pytest.raises(ConfigError) as caught:
        partition(split, rows=400, groups=["a", "b"] * 200, seed=0)
    text = str(caught.value)
    assert text.startswith("data.split: expected at least 50 examples per client; got ")
    assert "for client-" in text
    assert "after 100 draws with dirichlet alpha 0.01 and 6 clients; raise alpha, lower clients or min_examples" in text


def test_too_many_clients_for_the_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 0 for client-2"):
        partition(Split("iid", clients=3), rows=2, groups=None, seed=0)
    with pytest.raises(ConfigError, match=r"at least 3 x 1 rows; got 2"):
        partition(Split("dirichlet", by="x", clients=3, alpha=1.0), rows=2, groups=["a", "b"], seed=0)


@pytest.mark.parametrize(
    "split",
    [Split("iid", clients=4), Split("dirichlet", by="x", clients=4, alpha=1.0), Split("sizes", sizes=[20, 30])],
    ids=lambda split: split.kind,
)
def test_the_seed_and_nothing_else_decides_a_drawn_split(split: Split) -> None:
    groups = ["a", "b"] * 50

    def rows(seed: int) -> list[list[int]]:
        return [part.tolist() for part in partition(split, rows=100, groups=groups, seed=seed).values()]

    assert rows(3) == rows(3)
    assert rows(3) != rows(4)


def test_client_names_are_plain_and_unique() -> None:
    assert client_names(["Dickens, Charles", "a/b", "a b", "a-b-2", "..", "Brontë"]) == [
        "Dickens-Charles",
        "a-b",
        "a-b-2",
        "a-b-2-2",
        "client",
        "Brontë",
    ]


def test_whole_numbers_are_ordered_by_value_and_text_by_letters() -> None:
    assert sorted_values(["10", "9", "9"]) == ["9", "10"]
    assert sorted_values(["10", "9", "x"]) == ["10", "9", "x"]


def test_meta_deals_nine_values_out_to_four_clients() -> None:
    sizes = dict(zip("abcdefghi", (9, 8, 7, 6, 5, 4, 3, 2, 1), strict=True))
    groups = [value for value, count in sizes.items() for _ in range(count)]
    parts = partition(Split("meta", by="x", clients=4), rows=45, groups=groups, seed=0)
    values = {name: sorted({groups[row] for row in rows.tolist()}) for name, rows in parts.items()}
    # 9 8 7 6 first; then e to d (11), f to c (11), g to b (11), h to a (11), i to a: the first of four equal ones.
    assert values == {"a": ["a", "h", "i"], "b": ["b", "g"], "c": ["c", "f"], "d": ["d", "e"]}
    assert [len(rows) for rows in parts.values()] == [12, 11, 11, 11]


def test_meta_does_not_depend_on_seed_order_of_rows_or_order_of_a_set() -> None:
    groups = ["x", "y", "z", "x", "w", "y"]

    def sorted_parts(groups: list[str], seed: int) -> dict[str, list[str]]:
        parts = partition(Split("meta", by="g", clients=2), rows=len(groups), groups=groups, seed=seed)
        return {name: sorted(groups[row] for row in rows.tolist()) for name, rows in parts.items()}

    assert sorted_parts(groups, 0) == sorted_parts(groups[::-1], 7) == {"x": ["w", "x", "x"], "y": ["y", "y", "z"]}


@settings(deadline=None, max_examples=50)
@given(GROUPS, st.integers(1, 6))
def test_meta_gives_the_clients_asked_for_and_divides_no_value(groups: list[str], clients: int) -> None:
    values = set(groups)
    split = Split("meta", by="x", clients=clients)
    if clients > len(values):
        with pytest.raises(ConfigError, match=rf"data\.split\.clients: expected at most {len(values)}, the values"):
            partition(split, rows=len(groups), groups=groups, seed=0)
        return
    parts = partition(split, rows=len(groups), groups=groups, seed=0)
    assert len(parts) == clients
    assert list(parts) == sorted(parts)
    assert np.sort(np.concatenate(list(parts.values()))).tolist() == list(range(len(groups)))
    own_values = [{groups[row] for row in rows.tolist()} for rows in parts.values()]
    assert sum(map(len, own_values)) == len(values)
    largest = max(groups.count(value) for value in values)
    sizes = sorted(map(len, parts.values()))
    assert sizes[-1] - sizes[0] <= largest  # a value larger than the rest cannot be divided


def test_alpha_of_a_million_is_near_iid_and_of_a_hundredth_gives_clients_of_one_label() -> None:
    groups = [str(row % 4) for row in range(2000)]

    def shares(alpha: float) -> list[list[float]]:
        parts = partition(Split("dirichlet", by="x", clients=4, alpha=alpha), rows=2000, groups=groups, seed=2)
        rows = [[groups[row] for row in part.tolist()] for part in parts.values()]
        return [[own.count(str(label)) / len(own) for label in range(4)] for own in rows]

    assert all(abs(share - 0.25) < 0.01 for own in shares(1e6) for share in own)
    assert max(max(own) for own in shares(0.01)) == 1.0


def test_a_drawn_split_is_the_same_on_every_machine() -> None:
    parts = partition(Split("dirichlet", by="x", clients=3, alpha=0.5), rows=12, groups=list("aabbccaabbcc"), seed=5)
    expected = {"client-0": [4, 5], "client-1": [1, 7, 9, 11], "client-2": [0, 2, 3, 6, 8, 10]}
    assert {name: rows.tolist() for name, rows in parts.items()} == expected


@settings(deadline=None, max_examples=50)
@given(GROUPS, GROUPS, st.integers(0, 2**32), st.integers(1, 4))
def test_matched_test_rows_go_to_one_client_each_in_the_shares_of_training(
    groups: list[str], tests: list[str], seed: int, clients: int
) -> None:
    parts = partition(Split("iid", clients=min(clients, len(groups))), rows=len(groups), groups=None, seed=seed)
    matched = match_rows(groups, parts, tests, seed=seed)
    given_rows = np.concatenate(list(matched.values())).tolist()
    assert sorted(given_rows) == [row for row, value in enumerate(tests) if value in groups]
    for value in set(groups):
        trained = {name: sum(groups[row] == value for row in part.tolist()) for name, part in parts.items()}
        for name, rows in matched.items():
            own = sum(tests[row] == value for row in rows.tolist())
            exact = tests.count(value) * trained[name] / sum(trained.values())
            assert abs(own - exact) <= 1  # the two ends of its piece are each rounded


def test_matched_rows_by_hand() -> None:
    parts = {"x": np.array([0, 1, 2]), "y": np.array([3, 4])}
    matched = match_rows(["a", "a", "a", "a", "b"], parts, ["a", "b", "a", "c", "a", "a"], seed=0)
    values = {name: sorted("abacaa"[row] for row in rows.tolist()) for name, rows in matched.items()}
    assert values == {"x": ["a", "a", "a"], "y": ["a", "b"]}  # c is no training row's value
