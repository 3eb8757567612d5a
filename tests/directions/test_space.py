from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.directions.bank import DirectionBank, check_accumulators, displacement, headroom, perturb, value_bound
from fedtune.directions.blocks import Groups, all_blocks
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.kron import Kron
from fedtune.directions.space import (
    MAX_ACCUMULATORS,
    Grouped,
    check_moved,
    directions,
    group_of,
    plain_banks,
    stacked_factors,
    summands,
)
from fedtune.errors import ConfigError, RoundError
from fedtune.tensors import Array
from tests.directions.vectors import KEYS, SEED, SHAPES, SPACE_NAMES, SPACES, TENSORS, accumulators


def naive(bank: Grouped, sums: Array, *, ordinal: int, shape: tuple[int, ...]) -> Array:
    """The formula of the module, number by number, from the directions of the plain banks."""
    y = np.zeros(int(np.prod(shape)), np.int64)
    groups = len(bank.tensors) if bank.groups == "tensor" else bank.groups
    cube = sums.reshape(len(bank.banks), groups, bank.seeds).astype(np.int64)
    block = np.arange(len(y)) // 4096
    group = np.full(len(y), bank.tensors.index(ordinal)) if bank.groups == "tensor" else block % groups
    for (n, plain), k in product(enumerate(bank.banks), range(bank.seeds)):
        if cube[n, :, k].any():
            y += cube[n, group, k] * plain.direction(k, ordinal=ordinal, shape=shape, blocks=all_blocks(shape))
    return y


@pytest.mark.parametrize("bank", SPACES, ids=SPACE_NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_displacement_is_the_sum_over_banks_and_the_positions_own_group(
    bank: Grouped, shape: tuple[int, ...]
) -> None:
    sums = accumulators(bank, most=30_000, used=40)
    y = naive(bank, sums, ordinal=5, shape=shape)
    np.testing.assert_array_equal(displacement(bank, sums, ordinal=5, shape=shape), y)
    last = range(all_blocks(shape).stop - 1, all_blocks(shape).stop)
    np.testing.assert_array_equal(displacement(bank, sums, ordinal=5, shape=shape, blocks=last), y[last.start * 4096 :])


@pytest.mark.parametrize("bank", SPACES, ids=SPACE_NAMES)
def test_every_accumulator_has_a_direction_which_ends_where_its_group_ends(bank: Grouped) -> None:
    shape = (2, 6000)
    sums = accumulators(bank, most=99, used=6)
    y = sum(
        int(sums[i]) * bank.direction(i, ordinal=9, shape=shape, blocks=range(1, 3)).astype(np.int64)
        for i in np.flatnonzero(sums).tolist()
    )
    np.testing.assert_array_equal(displacement(bank, sums, ordinal=9, shape=shape, blocks=range(1, 3)), y)


@pytest.mark.parametrize("bank", SPACES, ids=SPACE_NAMES)
def test_a_step_along_a_seed_moves_every_weight_by_the_newest_banks_direction(bank: Grouped) -> None:
    sums = accumulators(bank, most=50)
    for seed, ordinal in product({0, bank.seeds - 1}, (2, 9)):
        moved = displacement(bank, perturb(bank, sums, seed, -700), ordinal=ordinal, shape=(3, 4099))
        z = bank.banks[-1].direction(seed, ordinal=ordinal, shape=(3, 4099), blocks=range(4)).astype(np.int32)
        np.testing.assert_array_equal(moved, displacement(bank, sums, ordinal=ordinal, shape=(3, 4099)) - 700 * z)


@pytest.mark.parametrize("bank", [Hadamard(8, SEED), *SPACES], ids=lambda bank: f"{bank.name}-{bank.size}")
def test_there_is_no_other_seed_than_the_k_that_there_are(bank: DirectionBank) -> None:
    for seed in (-1, bank.seeds):
        with pytest.raises(IndexError, match=f"expected a seed from 0 to {bank.seeds - 1}; got {seed}"):
            perturb(bank, np.zeros(bank.size, np.int32), seed, 1)


@pytest.mark.parametrize("bank", SPACES, ids=SPACE_NAMES)
def test_the_newest_accumulators_are_those_that_seeds_move(bank: Grouped) -> None:
    places = [place for seed in range(bank.seeds) for place in bank.places(seed)]
    assert sorted(places) == list(range(bank.size))[bank.newest]


def test_of_one_key_and_one_group_it_is_the_plain_bank() -> None:
    assert directions("hadamard", 8, [SEED]) == Hadamard(8, SEED)
    assert directions("gaussian", 8, [SEED]) == Gaussian(8, SEED)
    assert directions("kron", 16, [SEED], tensors=[1, 2]) == Kron(16, SEED)
    plain = Hadamard(8, SEED)
    assert (plain.seeds, plain.newest, list(plain.places(3))) == (8, slice(0, 8), [3])
    assert plain_banks(plain) == (plain,)
    sums = np.arange(8, dtype=np.int32)
    assert summands(plain, sums, 4) == [(plain, sums)]


def test_the_span_is_the_largest_sum_that_meets_at_one_position() -> None:
    bank = directions("hadamard", 2, KEYS[:2], 2)
    # Bank 1: group 0 has 1 and -2, group 1 has 3 and 0; bank 2: group 0 has -4 and 0, group 1 has 0 and 5.
    sums = np.array([1, -2, 3, 0, -4, 0, 0, 5], np.int32)
    assert (bank.span(sums), value_bound(bank, sums)) == (8, 8)
    assert bank.span(sums[::-1].copy()) == 8
    assert headroom(bank, sums, amount=3) == 2**31 - 1 - 3 - 8
    assert value_bound(directions("gaussian", 2, KEYS[:2], 2), sums) == 64
    assert bank.span(np.full(8, -(2**31), np.int64).astype(np.int32)) == 4 * 2**31


@settings(max_examples=30, deadline=None)
@given(place=st.integers(0, len(SPACES) - 1), key=st.integers(0, 2**31), amount=st.integers(-1000, 1000))
def test_no_displacement_exceeds_its_bound_and_a_step_adds_no_more_than_its_amount(
    place: int, key: int, amount: int
) -> None:
    bank = SPACES[place]
    sums = accumulators(bank, most=1000, key=key, used=30)
    moved = perturb(bank, sums, key % bank.seeds, amount)
    assert bank.span(moved) <= bank.span(sums) + abs(amount)
    for ordinal in TENSORS:
        y = displacement(bank, moved, ordinal=ordinal, shape=(2, 4100))
        assert np.abs(y).max() <= value_bound(bank, moved)


def test_sums_that_meet_beyond_32_bits_are_refused_and_those_of_two_groups_never_meet() -> None:
    half = 2**30
    apart = directions("hadamard", 1, KEYS[:1], 2)
    check_accumulators(apart, np.array([2**31 - 1, 2**31 - 1], np.int64))
    with pytest.raises(RoundError, match=r"sum \|A\| of at most 2147483647 .* got 2147483648"):
        check_accumulators(directions("hadamard", 1, KEYS[:2]), np.array([half, -half], np.int64))


def test_a_tensor_that_has_no_numbers_is_named() -> None:
    bank = directions("hadamard", 8, KEYS[:1], "tensor", TENSORS)
    assert isinstance(bank, Grouped)
    assert group_of(bank, 5) == 1
    with pytest.raises(ConfigError, match=r"groups: expected one of the tensors \[2, 5, 9\] .* got 3"):
        displacement(bank, np.zeros(24, np.int32), ordinal=3, shape=(4,))


@pytest.mark.parametrize(
    ("bank", "seeds", "keys", "groups", "tensors", "reason"),
    [
        ("hadamard", 8, KEYS, 3, (), "a power of 2 from 1 to 64.* got 3; the nearest is 2"),
        ("hadamard", 8, KEYS, 0, (), "the nearest is 1"),
        ("hadamard", 8, KEYS, -4, (), "the nearest is 1"),
        ("hadamard", 8, KEYS, 128, (), "the nearest is 64"),
        ("hadamard", 8, KEYS, "tensor", (), "ordinals in rising order"),
        ("hadamard", 8, KEYS, "tensor", (2, 2), "ordinals in rising order"),
        ("hadamard", 8, KEYS, "tensor", (-1, 2), "ordinals in rising order"),
        ("kron", 16, KEYS, 2, (), "1 or \"tensor\" with the bank 'kron'"),
        ("hadamard", 8, (), 1, (), "of 1 to 256 banks; got 0"),
        ("hadamard", 8, range(257), 1, (), "of 1 to 256 banks; got 257"),
        ("hadamard", 8, (5, 6, 5), 1, (), "another one for every bank"),
        ("hadamard", 7, KEYS, 1, (), "a power of 2"),
        ("hadamard", 4096, range(32), 64, (), f"at most {MAX_ACCUMULATORS} numbers.* got 32 x 64 x 4096"),
    ],
)
def test_directions_that_no_run_has_are_refused(
    bank: str, seeds: int, keys: Sequence[int], groups: Groups, tensors: Sequence[int], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        directions(bank, seeds, keys, groups, tensors)


def test_banks_of_two_kinds_or_sizes_and_one_alone_do_not_make_directions() -> None:
    one, other = Hadamard(4, 1), Hadamard(4, 2)
    for banks in ((Hadamard(8, 1), other), (Gaussian(4, 1), other), (Grouped((one, other)), Grouped((other, one)))):
        with pytest.raises(ConfigError, match=r"banks of one kind|another one"):
            Grouped(banks)
    with pytest.raises(ConfigError, match="expected several banks or groups"):
        Grouped((one,))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bank", [Kron(16, SEED), *(bank for bank in SPACES if bank.name == "kron")], ids=str)
def test_a_matrix_moved_by_banks_of_kron_has_the_form_of_an_adapter_exactly(
    bank: DirectionBank, transposed: bool
) -> None:
    sums, shape = accumulators(bank, most=2**18), (33, 20)
    y = displacement(bank, sums, ordinal=5, shape=shape).reshape(shape).astype(np.float64)
    a, b = stacked_factors(bank, sums, ordinal=5, shape=shape, exponent=12, transposed=transposed)
    assert a.dtype == b.dtype == np.float32
    assert len(a) == 4 * len(plain_banks(bank))
    product = b.astype(np.float64) @ a.astype(np.float64)
    np.testing.assert_array_equal(product, -(2.0**-12) * (y.T if transposed else y))


def test_other_tensors_than_the_ledger_has_numbers_for_are_refused() -> None:
    bank = directions("kron", 16, KEYS[:1], "tensor", TENSORS)
    check_moved(bank, [*TENSORS])
    check_moved(Kron(16, SEED), [1, 2])
    for wrong in ((), TENSORS[:2], (2, 5, 8), (*TENSORS, 11)):
        with pytest.raises(ConfigError, match="trainable: expected those that the ledger has numbers for: 3 tensors"):
            check_moved(bank, wrong)


def philox(c0: int, c1: int, c2: int, c3: int, key: int) -> list[int]:
    """Philox4x32-10 in plain integers, from its publication (Salmon et al., SC'11)."""
    k0, k1, low = key % 2**32, key >> 32, 2**32 - 1
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


def sign(key: int, k: int, position: int, *, ordinal: int, seeds: int) -> int:
    """One sign of the hadamard bank by the formula of the format, one bit at a time."""
    block, j = divmod(position, 4096)
    d1, d2 = (
        philox(bit // 128, block, 1, ordinal, key)[bit // 32 % 4] >> (bit % 32) & 1
        for bit in (j // seeds * seeds + k, 4096 + j)
    )
    return 1 - 2 * (d1 ^ d2 ^ (bin(k & j).count("1") & 1))


def test_frozen_numbers_of_groups_and_banks_which_a_program_of_its_own_gives_too() -> None:
    """K = 2, G = 2, two banks: positions 0 to 3 of block 0, and 4096 to 4099 of block 1, of the tensor 1."""
    rows = [[[3, -1], [10, 20]], [[100, 0], [-400, 200]]]  # bank, group, k
    bank = directions("hadamard", 2, KEYS[:2], 2)
    y = displacement(bank, np.array(rows, np.int32).reshape(-1), ordinal=1, shape=(4100,))
    places = [0, 1, 2, 3, 4096, 4097, 4098, 4099]
    by_hand = [
        sum(
            rows[n][place // 4096][k] * sign(key, k, place, ordinal=1, seeds=2)
            for n, key in enumerate(KEYS[:2])
            for k in range(2)
        )
        for place in places
    ]
    assert y[places].tolist() == by_hand == FROZEN
    assert hashlib.sha256(struct.pack("<4100i", *y.tolist())).hexdigest()[:16] == FROZEN_DIGEST


FROZEN = [102, 96, -98, -104, 210, -570, -630, -190]
FROZEN_DIGEST = "d40a0ffa6fa2751f"
