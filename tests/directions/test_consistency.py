from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtune.directions.bank import DirectionBank, displacement
from fedtune.directions.consistency import (
    BLOCKS,
    LENGTH,
    STATE,
    block_check,
    block_checks,
    fastest_displacement,
    first_difference,
    first_wrong,
    sample_blocks,
    sample_places,
)
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.kron import Kron
from fedtune.directions.seed_ledger import SeedLedger, describe_base
from fedtune.directions.space import directions
from fedtune.tensors import Array
from tests.directions.vectors import SEED, accumulators

MANIFEST = describe_base(
    {
        "a.bias": np.zeros(5, np.float32),
        "b.weight": np.zeros((3, 4096), np.float32),
        "c.weight": np.zeros((70, 100), np.float32),
        "d.frozen": np.zeros((100, 4096), np.float32),
    }
)
TRAINABLE = (0, 1, 2)
SIZES = {0: 1, 1: 3, 2: 2}
BANK = Hadamard(16, SEED)
LEDGER = SeedLedger(BANK, 20, 7, MANIFEST.digest, accumulators(BANK, most=99))


class Wrong:
    """A way to displacements that is off by one at the last position of a block."""

    def __init__(self, ordinal: int, block: int) -> None:
        self.place = ordinal, block

    def __call__(self, bank: DirectionBank, sums: Array, *, ordinal: int, shape: Any, blocks: range) -> Array:
        y = displacement(bank, sums, ordinal=ordinal, shape=shape, blocks=blocks)
        if (ordinal, blocks.start) == self.place:
            y[-1] += 1
        return y


def checks(ledger: SeedLedger = LEDGER, way: Any = displacement) -> bytes:
    return block_checks(ledger, MANIFEST, TRAINABLE, way)


def wrong(theirs: bytes, ledger: SeedLedger = LEDGER) -> tuple[str, int] | None:
    return first_wrong(checks(ledger), theirs, ledger.digest, MANIFEST, TRAINABLE)


def test_a_check_is_the_start_of_the_hash_of_the_real_positions() -> None:
    expected = b""
    for ordinal, block in sample_places(LEDGER.digest, MANIFEST, TRAINABLE):
        y = displacement(BANK, LEDGER.accumulators, ordinal=ordinal, shape=MANIFEST.entries[ordinal].shape)
        expected += hashlib.sha256(y[block * 4096 : (block + 1) * 4096].astype("<i4").tobytes()).digest()[:4]
    assert checks() == expected
    assert len(checks()) == BLOCKS * LENGTH == 16
    assert STATE == 8


@pytest.mark.parametrize(
    "bank",
    [
        directions("hadamard", 16, [SEED, 3], 4),
        directions("hadamard", 16, [SEED, 3], "tensor", TRAINABLE),
        directions("gaussian", 4, [SEED, 3], 2),
    ],
    ids=lambda bank: f"{bank.name}-{bank.groups}",
)
def test_a_wrong_block_of_several_banks_and_groups_is_named(bank: DirectionBank) -> None:
    ledger = SeedLedger(bank, 20, 7, MANIFEST.digest, accumulators(bank, most=99))
    assert wrong(checks(ledger), ledger) is None
    ordinal, block = sample_places(ledger.digest, MANIFEST, TRAINABLE)[2]
    name = MANIFEST.entries[ordinal].name
    assert wrong(block_checks(ledger, MANIFEST, TRAINABLE, Wrong(ordinal, block)), ledger) == (name, block)
    # A client that has the rows of the groups one place further, or has not seen what the newest bank added.
    turned, stale = np.roll(ledger.accumulators, bank.seeds), ledger.accumulators.copy()
    stale[bank.newest] = 0
    for sums in (turned, stale):
        theirs = b"".join(
            block_check(bank, sums, displacement, MANIFEST, *place)
            for place in sample_places(ledger.digest, MANIFEST, TRAINABLE)
        )
        assert wrong(theirs, ledger) is not None


def test_places_are_drawn_from_the_digest_among_the_blocks_that_are_moved() -> None:
    drawn = sample_places(LEDGER.digest, MANIFEST, TRAINABLE)
    assert list(drawn) == list(sample_blocks(int.from_bytes(LEDGER.digest[:8], "little"), SIZES, 4))
    seen = {
        place
        for round in range(60)
        for place in sample_places(replace(LEDGER, round=round).digest, MANIFEST, TRAINABLE)
    }
    assert seen == {(ordinal, block) for ordinal, count in SIZES.items() for block in range(count)}


def test_a_planted_wrong_block_is_named_by_tensor_and_block() -> None:
    named = set[tuple[str, int]]()
    for round in range(30):
        ledger = replace(LEDGER, round=round)
        drawn = sample_places(ledger.digest, MANIFEST, TRAINABLE)
        for place in set(drawn):
            found = wrong(checks(ledger, Wrong(*place)), ledger)
            assert found == (MANIFEST.entries[place[0]].name, place[1])
            named.add(found)
    assert len(named) == 6


def test_of_several_wrong_blocks_the_first_drawn_is_named() -> None:
    # A client whose accumulators are off has all blocks wrong.
    other = replace(LEDGER, accumulators=LEDGER.accumulators + 1)
    theirs = b"".join(
        hashlib.sha256(
            displacement(
                BANK,
                other.accumulators,
                ordinal=ordinal,
                shape=MANIFEST.entries[ordinal].shape,
                blocks=range(block, block + 1),
            ).tobytes()
        ).digest()[:4]
        for ordinal, block in sample_places(LEDGER.digest, MANIFEST, TRAINABLE)
    )
    ordinal, block = sample_places(LEDGER.digest, MANIFEST, TRAINABLE)[0]
    assert wrong(theirs) == (MANIFEST.entries[ordinal].name, block)


def test_a_wrong_block_that_is_not_drawn_is_not_seen() -> None:
    drawn = set(sample_places(LEDGER.digest, MANIFEST, TRAINABLE))
    spared = next(place for place in ((o, b) for o, n in SIZES.items() for b in range(n)) if place not in drawn)
    assert wrong(checks(way=Wrong(*spared))) is None


def test_equal_checks_name_nothing() -> None:
    assert wrong(checks()) is None


@pytest.mark.parametrize("length", range(16))
def test_checks_that_are_cut_name_the_first_block_that_is_missing(length: int) -> None:
    ordinal, block = sample_places(LEDGER.digest, MANIFEST, TRAINABLE)[length // 4]
    assert wrong(checks()[:length]) == (MANIFEST.entries[ordinal].name, block)


@pytest.mark.parametrize("more", [b"\0", bytes(4), bytes(400)])
def test_checks_that_are_too_long_are_wrong_too(more: bytes) -> None:
    assert wrong(checks() + more) is not None


@pytest.mark.parametrize("bank", [Gaussian(16, SEED), Kron(16, SEED)], ids=lambda bank: bank.name)
def test_every_bank_has_checks_of_its_own(bank: DirectionBank) -> None:
    other = replace(LEDGER, bank=bank)
    assert len(checks(other)) == 16
    assert checks(other) != block_checks(replace(other, bank=BANK), MANIFEST, TRAINABLE, displacement)


BANKS: list[DirectionBank] = [Hadamard(16, SEED), Gaussian(16, SEED), Kron(16, SEED)]


def test_the_first_check_that_differs_or_is_missing_is_named() -> None:
    assert first_difference([b"a", b"b", b"c"], [b"a", b"x", b"y"]) == 1
    assert first_difference([b"a", b"b"], [b"a"]) == 1
    assert first_difference([b"a"], [b"a", b"b"]) == 1
    assert first_difference([b"a", b"b"], [b"a", b"b"]) is None


def test_checked_blocks_are_drawn_from_the_trainable_tensors_alone() -> None:
    drawn = sample_blocks(7, {3: 2, 11: 5, 40: 1}, 400)
    assert set(drawn) == {(3, 0), (3, 1), *((11, block) for block in range(5)), (40, 0)}
    assert drawn[:5] == sample_blocks(7, {40: 1, 11: 5, 3: 2}, 5)
    assert drawn != sample_blocks(8, {3: 2, 11: 5, 40: 1}, 400)


@pytest.mark.parametrize("bank", BANKS, ids=lambda bank: bank.name)
def test_the_way_to_displacements_gives_the_bits_of_the_reference(bank: DirectionBank) -> None:
    sums = accumulators(bank, most=9000)
    for shape, blocks in (((5,), None), ((3, 4100), None), ((3, 4100), range(1, 2)), ((3, 4100), range(3, 4))):
        found = fastest_displacement(bank)(bank, sums, ordinal=3, shape=shape, blocks=blocks)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, displacement(bank, sums, ordinal=3, shape=shape, blocks=blocks))


def test_numba_is_compiled_only_for_the_bank_that_draws_for_each_direction() -> None:
    pytest.importorskip("numba")
    from fedtune.directions import rebuild_numba

    ways = {bank.name: fastest_displacement(bank) for bank in BANKS}
    assert ways == {"hadamard": displacement, "gaussian": rebuild_numba.displacement, "kron": displacement}


@pytest.mark.parametrize("bank", BANKS, ids=lambda bank: bank.name)
def test_without_numba_displacements_come_from_the_reference(
    bank: DirectionBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert fastest_displacement(bank) is displacement
