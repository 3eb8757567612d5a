from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedtune.directions import sampling
from fedtune.directions.downlink import (
    LoggedRound,
    LoggedUpdate,
    count_scalars,
    decode_changed,
    decode_log,
    decode_whole,
    encode_changed,
    encode_log,
    encode_whole,
    increments,
    pad_zeros,
    replay_log,
    shortest_form,
    weighted_sum,
)
from fedtune.directions.sampling import sample_uniform
from fedtune.errors import WireError
from fedtune.tensors import Array

SIZES = st.sampled_from([1, 2, 4, 8, 64, 256])
NUMBERS = st.one_of(st.integers(-(2**15), 2**15 - 1), st.integers(-(2**31), 2**31 - 1))
DRAW = partial(sampling.sample_ids, size=16, sampling="uniform")


def of(size: int, numbers: st.SearchStrategy[int] = NUMBERS) -> st.SearchStrategy[Array]:
    return hnp.arrays(np.int32, size, elements=numbers)


LOGGED = st.builds(
    LoggedUpdate,
    key=st.integers(0, 2**64 - 1),
    weight=st.integers(1, 127),
    scalars=st.lists(st.integers(-127, 127), max_size=9).map(lambda q: np.array(q, np.int8)),
)
ROUNDS = st.lists(
    st.builds(LoggedRound, shift=st.integers(0, 24), clients=st.lists(LOGGED, max_size=4)), min_size=1, max_size=5
)
LOG = [
    LoggedRound(
        4, [LoggedUpdate(1, 3, np.array([10, -5, 127, 1], np.int8)), LoggedUpdate(2, 1, np.array([-127, 2], np.int8))]
    ),
    LoggedRound(5, []),
    LoggedRound(5, [LoggedUpdate(2**64 - 1, 127, np.array([7], np.int8))]),
]


def plain(rounds: Sequence[LoggedRound]) -> object:
    """Return rounds with scalars as lists, so that they can be compared."""
    return [(each.shift, [(one.key, one.weight, one.scalars.tolist()) for one in each.clients]) for each in rounds]


@settings(deadline=None)
@given(sums=SIZES.flatmap(of))
def test_whole_accumulators_come_back(sums: Array) -> None:
    found = decode_whole(encode_whole(sums), len(sums))
    assert found.dtype == np.int32
    assert found.tolist() == sums.tolist()


@settings(deadline=None)
@given(data=st.data())
def test_changed_accumulators_come_back(data: st.DataObject) -> None:
    size = data.draw(SIZES)
    known = data.draw(of(size))
    moved = data.draw(hnp.arrays(np.bool_, size))
    sums = np.where(moved, data.draw(of(size)), known)
    found = decode_changed(encode_changed(sums, known), known)
    assert found.dtype == np.int32
    assert found.tolist() == sums.tolist()


@settings(deadline=None)
@given(rounds=ROUNDS)
def test_a_log_comes_back(rounds: list[LoggedRound]) -> None:
    assert plain(decode_log(encode_log(rounds))) == plain(rounds)


@settings(deadline=None)
@given(rounds=ROUNDS, more=ROUNDS)
def test_logs_of_rounds_put_end_to_end_are_the_log_of_all(rounds: list[LoggedRound], more: list[LoggedRound]) -> None:
    assert encode_log(rounds) + encode_log(more) == encode_log([*rounds, *more])


@pytest.mark.parametrize(
    ("largest", "width"), [(2**15 - 1, 2), (-(2**15), 2), (2**15, 4), (-(2**15) - 1, 4), (2**31 - 1, 4), (0, 2)]
)
def test_sixteen_bits_are_taken_where_all_numbers_fit(largest: int, width: int) -> None:
    sums = np.array([1, largest, -1, 0], np.int32)
    known = np.array([1, 5, -1, 2], np.int32)
    assert len(encode_whole(sums)) == 4 * width
    # Only what differs has to fit: here the second and the last.
    assert len(encode_changed(sums, known)) == 1 + 2 * width


def test_a_large_number_that_did_not_change_costs_nothing() -> None:
    sums = np.array([2**30, 3, 4, 5], np.int32)
    known = np.array([2**30, 3, 0, 5], np.int32)
    assert encode_changed(sums, known) == bytes([0b0100, 4, 0])
    assert encode_changed(sums, sums) == b"\0"
    assert decode_changed(b"\0", sums).tolist() == sums.tolist()


def test_the_bytes_of_each_form_by_hand() -> None:
    assert encode_whole(np.array([1, -2], np.int32)) == b"\x01\x00\xfe\xff"
    assert encode_whole(np.array([1, 65_536], np.int32)) == b"\x01\x00\x00\x00\x00\x00\x01\x00"
    known = np.zeros(16, np.int32)
    sums = np.array(known)
    sums[[0, 9]] = 3, -1
    assert encode_changed(sums, known) == b"\x01\x02" + b"\x03\x00" + b"\xff\xff"
    entry = b"\x04\x01\x00" + b"\x08\x07\x06\x05\x04\x03\x02\x01" + b"\x7f" + b"\x02\x00" + b"\x01\xff"
    assert encode_log([LoggedRound(4, [LoggedUpdate(0x0102030405060708, 127, np.array([1, -1], np.int8))])]) == entry


def test_a_round_of_ten_clients_with_200_scalars_takes_2113_bytes() -> None:
    clients = [LoggedUpdate(key, 127, np.zeros(200, np.int8)) for key in range(10)]
    assert len(encode_log([LoggedRound(4, clients)])) == 3 + 10 * (11 + 200)


@pytest.mark.parametrize("wide", [False, True])
def test_whole_accumulators_cut_or_too_long_are_refused(wide: bool) -> None:
    sums = np.arange(8, dtype=np.int32) + (2**20 if wide else 0)
    data = encode_whole(sums)
    for wrong in [*(data[:length] for length in range(len(data))), data + b"\0", data + bytes(4)]:
        # Half of the wide form is as long as a narrow one: the digest of the state tells that it is another.
        if wide and len(wrong) == 16:
            assert decode_whole(wrong, 8).tolist() != sums.tolist()
            continue
        with pytest.raises(WireError, match="expected 16 or 32 bytes for 8 seeds; got"):
            decode_whole(wrong, 8)


@pytest.mark.parametrize("wide", [False, True])
def test_changed_accumulators_cut_or_too_long_are_refused(wide: bool) -> None:
    known = np.zeros(16, np.int32)
    sums = np.array(known)
    sums[[1, 3, 15]] = 7, -7, 2**20 if wide else 9
    data = encode_changed(sums, known)
    assert len(data) == 2 + 3 * (4 if wide else 2)
    for wrong in [*(data[:length] for length in range(len(data))), data + b"\0", data + bytes(12)]:
        if wide and len(wrong) == 2 + 6:
            assert decode_changed(wrong, known).tolist() != sums.tolist()
            continue
        with pytest.raises(WireError, match="bytes of bits"):
            decode_changed(wrong, known)


def test_a_bit_for_a_seed_that_does_not_exist_is_refused() -> None:
    known = np.zeros(4, np.int32)
    assert decode_changed(bytes([0b1000, 9, 0]), known).tolist() == [0, 0, 0, 9]
    with pytest.raises(WireError, match="bytes of bits"):
        decode_changed(bytes([0b1_0000, 9, 0]), known)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), banks=st.integers(2, 5), size=st.sampled_from([1, 8, 24]))
def test_changes_over_several_banks_come_back_whatever_the_client_knew(
    data: st.DataObject, banks: int, size: int
) -> None:
    sums, fewer = data.draw(of(banks * size)), data.draw(st.integers(0, banks))
    same = data.draw(st.integers(0, fewer))
    known = np.concatenate([sums[: same * size], data.draw(of((fewer - same) * size))])
    encoded = encode_changed(sums, known, banks=banks)
    again = decode_changed(encoded, pad_zeros(known, banks * size), banks=banks)
    assert again.dtype == np.int32
    assert again.tolist() == sums.tolist()


def test_banks_that_are_as_they_were_cost_two_bytes_together() -> None:
    sums = np.arange(1, 33, dtype=np.int32)
    known = sums.copy()
    known[29] += 1
    # Three banks of eight left out; of the last, the sixth number is 30.
    assert encode_changed(sums, known, banks=4) == b"\x03\x00" + b"\x20" + b"\x1e\x00"
    assert encode_changed(sums, sums, banks=4) == b"\x04\x00"
    # A client that knows three banks only: the fourth is sent as what changed from zero.
    assert encode_changed(sums, sums[:24], banks=4) == b"\x03\x00\xff" + sums[24:].astype("<i2").tobytes()
    assert pad_zeros(sums[:2], 4).tolist() == [1, 2, 0, 0]


@pytest.mark.parametrize(
    "wrong", [b"", b"\0", b"\5\0", b"\xff\xff", b"\4\0\0", b"\3\0", b"\3\0\1\0", b"\3\0\1\0\0\0", b"\0\0\1\0\0"]
)
def test_changes_over_several_banks_that_lie_are_refused(wrong: bytes) -> None:
    known = np.arange(32, dtype=np.int32)
    with pytest.raises(WireError, match="accumulators: expected"):
        decode_changed(wrong, known, banks=4)


@settings(deadline=None)
@given(data=st.binary(max_size=60), banks=st.integers(1, 4))
def test_arbitrary_bytes_of_a_change_raise_nothing_but_a_wire_error(data: bytes, banks: int) -> None:
    known = np.arange(8 * banks, dtype=np.int32)
    with suppress(WireError):
        assert decode_changed(data, known, banks=banks).shape == known.shape
    assert known.tolist() == list(range(8 * banks))


def test_a_log_cut_within_a_round_is_refused_and_cut_between_two_is_a_shorter_log() -> None:
    data = encode_log(LOG)
    whole = {len(encode_log(LOG[:count])): count for count in range(len(LOG) + 1)}
    for length in range(len(data)):
        if length in whole:
            assert plain(decode_log(data[:length])) == plain(LOG[: whole[length]])
            continue
        with pytest.raises(WireError, match=f"expected whole entries; got {length} bytes that end within one"):
            decode_log(data[:length])


@pytest.mark.parametrize("more", [b"\0", b"\x04\x00", b"\x04\x01\x00", b"\xff" * 40])
def test_a_log_with_more_behind_it_is_refused(more: bytes) -> None:
    with pytest.raises(WireError, match="log of rounds: expected"):
        decode_log(encode_log(LOG) + more)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (0, 25, "shifts of at most 24"),
        (0, 255, "shifts of at most 24"),
        (11, 0, "weights from 1 to 127"),
        (11, 128, "weights from 1 to 127"),
        (1, 2, "end within one"),
        (2, 255, "end within one"),
        (12, 3, "end within one"),
        (13, 255, "end within one"),
    ],
    ids=["shift", "largest shift", "no weight", "weight", "clients", "many clients", "scalars", "many scalars"],
)
def test_a_log_that_lies_is_refused(place: int, value: int, reason: str) -> None:
    data = bytearray(encode_log([LoggedRound(24, [LoggedUpdate(7, 127, np.array([1, 2], np.int8))])]))
    data[place] = value
    with pytest.raises(WireError, match=reason):
        decode_log(bytes(data))


@settings(deadline=None)
@given(data=st.binary(max_size=80), known=of(16))
def test_arbitrary_bytes_raise_nothing_but_a_wire_error(data: bytes, known: Array) -> None:
    with suppress(WireError):
        assert decode_whole(data, 16).shape == (16,)
    with suppress(WireError):
        assert decode_changed(data, known).shape == (16,)
    with suppress(WireError):
        assert encode_log(decode_log(data)) == data


@settings(deadline=None)
@given(start=of(16, st.integers(-1000, 1000)), rounds=ROUNDS)
def test_what_is_replayed_is_what_the_server_sums_up(start: Array, rounds: list[LoggedRound]) -> None:
    sums = start.astype(np.int64)
    for each in rounds:
        parts = [
            (count_scalars(sampling.sample_uniform(c.key, len(c.scalars), 16), c.scalars, 16), c.weight)
            for c in each.clients
        ]
        sums = sums + increments(*weighted_sum(parts, 16), each.shift)
    found = replay_log(start, decode_log(encode_log(rounds)), DRAW)
    assert found.dtype == np.int64
    assert found.tolist() == sums.tolist()


def test_the_expected_round_is_replayed() -> None:
    clients = [
        LoggedUpdate(1, 3, np.array([10, -5, 127, 1], np.int8)),
        LoggedUpdate(2, 1, np.array([-127, 2, 0, 3], np.int8)),
    ]
    start = np.arange(8, dtype=np.int32)
    found = replay_log(start, [LoggedRound(4, clients)], partial(sampling.sample_ids, size=8, sampling="uniform"))
    assert (found - start).tolist() == [0, 0, 0, -52, 0, 0, 1668, -508]
    assert start.tolist() == list(range(8))


def test_every_round_is_rounded_by_itself_and_shifted_by_its_own() -> None:
    # A third of one, four times: each rounds to 0 with a shift of 0; with 4 it is 5.33 and rounds to 5.
    one = [LoggedUpdate(1, 1, np.array([1], np.int8)), LoggedUpdate(1, 2, np.array([0], np.int8))]
    start = np.zeros(1, np.int32)
    draw = partial(sampling.sample_ids, size=1, sampling="uniform")
    assert replay_log(start, [LoggedRound(0, one)] * 4, draw).tolist() == [0]
    assert replay_log(start, [LoggedRound(4, one), LoggedRound(0, one), LoggedRound(4, one)], draw).tolist() == [10]


def test_the_smallest_form_is_chosen_and_of_equals_the_first_by_name() -> None:
    assert shortest_form({"whole": b"1234", "changed": b"123", "log": b"12345"}) == ("changed", b"123")
    assert shortest_form({"whole": b"12", "log": b"ab", "changed": b"ab!"}) == ("log", b"ab")


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
