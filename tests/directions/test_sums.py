from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.directions.sampling import sample_uniform
from fedtune.directions.sums import count_scalars, increments, weighted_sum
from fedtune.tensors import Array

SIZE = 8
SCALARS = st.lists(st.integers(-127, 127), min_size=1, max_size=12)
COHORT = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 127), SCALARS), min_size=1, max_size=6)
SHIFT = st.integers(0, 24)

Member = tuple[int, int, Sequence[int]]
"""(sample key, weight, scalars)"""


def part(member: Member) -> tuple[Array, int]:
    key, weight, scalars = member
    return count_scalars(sample_uniform(key, len(scalars), SIZE), np.array(scalars, np.int8), SIZE), weight


def rounded(sums: Array, total: int, shift: int) -> list[int]:
    """Return what `increments` must be: Python rounds fractions to nearest even."""
    return [round(Fraction(int(each) << shift, total)) for each in sums]


def test_the_expected_cohort_adds_the_expected_increments() -> None:
    cohort = [(1, 3, [10, -5, 127, 1]), (2, 1, [-127, 2, 0, 3])]
    assert [sample_uniform(key, 4, SIZE).tolist() for key, _, _ in cohort] == [[6, 3, 6, 6], [7, 3, 7, 6]]
    assert [part(one)[0].tolist() for one in cohort] == [[0, 0, 0, -5, 0, 0, 138, 0], [0, 0, 0, 2, 0, 0, 3, -127]]
    sums, total = weighted_sum([part(one) for one in cohort], SIZE)
    assert (sums.tolist(), total) == ([0, 0, 0, -13, 0, 0, 417, -127], 4)
    assert increments(sums, total, 4).tolist() == [0, 0, 0, -52, 0, 0, 1668, -508]


@pytest.mark.parametrize(
    ("sums", "total", "shift", "expected"),
    [
        ([3, 5, -3, -5, 1, -1], 2, 0, [2, 2, -2, -2, 0, 0]),
        ([100, -100], 7, 4, [229, -229]),
        ([1, 3, -1, -3], 32, 4, [0, 2, 0, -2]),
        ([4, -4, 5, -5], 3, 0, [1, -1, 2, -2]),
        ([127 * 127 * 65_535], 1, 24, [127 * 127 * 65_535 << 24]),
    ],
)
def test_ties_go_to_the_even_number_whatever_the_sign(
    sums: list[int], total: int, shift: int, expected: list[int]
) -> None:
    found = increments(np.array(sums, np.int64), total, shift)
    assert found.tolist() == expected
    assert found.dtype == np.int64


@given(sums=st.lists(st.integers(-(2**36), 2**36), min_size=1, max_size=20), total=st.integers(1, 2**20), shift=SHIFT)
def test_increments_are_exact_fractions_rounded_to_nearest_even(sums: list[int], total: int, shift: int) -> None:
    given_sums = np.array(sums, np.int64)
    assert increments(given_sums, total, shift).tolist() == rounded(given_sums, total, shift)


@given(half=st.integers(-(2**30), 2**30), total=st.integers(1, 1000))
def test_exact_halves_always_give_an_even_number(half: int, total: int) -> None:
    sums = np.array([(2 * half + 1) * total], np.int64)
    (found,) = increments(sums, 2 * total, 0).tolist()
    assert found % 2 == 0
    assert abs(2 * found - (2 * half + 1)) == 1


@settings(deadline=None)
@given(cohort=COHORT, shift=SHIFT, data=st.data())
def test_the_order_of_clients_changes_no_bit(cohort: list[Member], shift: int, data: st.DataObject) -> None:
    other = data.draw(st.permutations(cohort))
    (sums, total), (again, same) = (weighted_sum([part(one) for one in each], SIZE) for each in (cohort, other))
    assert total == same == sum(weight for _, weight, _ in cohort)
    assert sums.tolist() == again.tolist()
    assert increments(sums, total, shift).tolist() == increments(again, total, shift).tolist()


@settings(deadline=None)
@given(cohort=COHORT, shift=SHIFT)
def test_a_cohort_adds_the_weighted_mean_of_its_clients(cohort: list[Member], shift: int) -> None:
    sums, total = weighted_sum([part(one) for one in cohort], SIZE)
    plain = [Fraction(0)] * SIZE
    for key, weight, scalars in cohort:
        for k, q in zip(sample_uniform(key, len(scalars), SIZE).tolist(), scalars, strict=True):
            plain[k] += Fraction(weight * q * 2**shift, sum(w for _, w, _ in cohort))
    assert increments(sums, total, shift).tolist() == [round(each) for each in plain]


@given(key=st.integers(0, 2**64 - 1), weight=st.integers(1, 127), scalars=SCALARS, shift=SHIFT)
def test_one_client_alone_adds_its_own_steps_whatever_its_weight(
    key: int, weight: int, scalars: list[int], shift: int
) -> None:
    own = [0] * SIZE
    for k, q in zip(sample_uniform(key, len(scalars), SIZE).tolist(), scalars, strict=True):
        own[k] += q << shift
    assert increments(*weighted_sum([part((key, weight, scalars))], SIZE), shift).tolist() == own


@given(
    first=st.lists(st.tuples(st.integers(0, 7), st.integers(-127, 127)), max_size=20),
    second=st.lists(st.tuples(st.integers(0, 7), st.integers(-127, 127)), max_size=20),
)
def test_the_sums_of_two_halves_are_those_of_the_whole(
    first: list[tuple[int, int]], second: list[tuple[int, int]]
) -> None:
    def of(draws: list[tuple[int, int]]) -> Array:
        ids, scalars = np.array(draws, np.int32).reshape(-1, 2).T
        return count_scalars(ids, scalars.astype(np.int8), SIZE)

    assert (of(first) + of(second)).tolist() == of(first + second).tolist()


def test_a_seed_drawn_often_leaves_the_eight_bits_of_a_scalar() -> None:
    found = count_scalars(np.zeros(1000, np.int32), np.full(1000, -127, np.int8), 2)
    assert found.tolist() == [-127_000, 0]
    assert found.dtype == np.int64


def test_nobody_adds_nothing() -> None:
    sums, total = weighted_sum([], SIZE)
    assert (sums.tolist(), total) == ([0] * SIZE, 0)
    assert increments(sums, total, 4).tolist() == [0] * SIZE


def test_what_is_summed_stays_as_it_was() -> None:
    one = np.arange(SIZE, dtype=np.int64)
    weighted_sum([(one, 5), (one, 7)], SIZE)
    increments(one, 3, 4)
    assert one.tolist() == list(range(SIZE))
