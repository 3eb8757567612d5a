"""Steps on the numbers of seeds where the slopes are scripted, and on a bowl whose bottom is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.directions.bank import BANKS
from fedtune.directions.numbers import LARGEST_NUMBER, is_shortest
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.space import directions
from fedtune.errors import ClientError, RoundError
from fedtune.messages import Training
from fedtune.probing.descent import Descent, Moments, adam, coordinate_rate, descend, small_numbers
from fedtune.probing.rows import PaddedRows, pad
from fedtune.seeds import derive, generator
from fedtune.tensors import Array


class Scripted:
    """A position whose losses and slopes are a script, and which keeps what it was asked."""

    rms = 0.5

    def __init__(self, *steps: tuple[float, Sequence[float]]) -> None:
        self.script = list(steps)
        self.at: list[list[int]] = []
        self.parts: list[int] = []

    def loss(self, accumulators: Array, batch: PaddedRows) -> float:
        self.at.append(accumulators.tolist())
        return float(len(self.at))

    def slopes(self, accumulators: Array, parts: Sequence[PaddedRows]) -> tuple[float, Array]:
        self.at.append(accumulators.tolist())
        self.parts.append(len(parts))
        loss, slopes = self.script.pop(0)
        return loss, np.array(slopes)


class Bowl:
    """A loss of sum (A - bottom)^2 / 2."""

    rms = 1.0

    def __init__(self, bottom: Array) -> None:
        self.bottom = bottom

    def loss(self, accumulators: Array, batch: PaddedRows) -> float:
        return float(np.square(accumulators - self.bottom).sum()) / 2

    def slopes(self, accumulators: Array, parts: Sequence[PaddedRows]) -> tuple[float, Array]:
        return self.loss(accumulators, parts[0]), (self.bottom - accumulators).astype(np.float64)


def ledger(*sums: int, exponent: int = 10) -> SeedLedger:
    return SeedLedger(BANKS["hadamard"](len(sums), 7), exponent, 0, bytes(32), np.array(sums, np.int32))


def run(position: Any, start: SeedLedger, examples: Any, steps: int, rate: float = 0.125, **options: Any) -> Descent:
    training = Training(batch=1, steps=steps, learning_rate=rate, accumulation=options.pop("accumulation", 1))
    defaults = {"bits": 8, "largest_shift": 20, "key": 77, "client": "ann", **options}
    return descend(position, partial(pad, pad_id=0), examples(3), training, start, **defaults)


def test_a_step_moves_every_number_by_the_rate_along_its_slope(examples: Any) -> None:
    # rate 1/8 of rms 1/2 is 1/16 = 64 units of 2^-10; over sqrt(4) numbers 32 each; Adam's first step is the sign
    position = Scripted((2.0, [3.0, -0.5, 1e-3, 0.0]))
    found = run(position, ledger(100, 0, -7, 5), examples, 1)
    assert (found.numbers.tolist(), found.shift, found.skipped) == ([32, -32, 32, 0], 0, 0)
    assert found.numbers.dtype.name == "int8"
    assert found.losses == [2.0]
    assert position.at == [[100, 0, -7, 5]]


def test_the_second_step_is_taken_where_the_first_has_led(examples: Any) -> None:
    position = Scripted((2.0, [1.0, -1.0]), (1.0, [1.0, 3.0]))
    found = run(position, ledger(10, 20), examples, 2)
    step = 64 / math.sqrt(2)  # not whole: the weights are those of the nearest whole numbers
    assert position.at == [[10, 20], [10 + 45, 20 - 45]]
    # by hand: mean = (.9 * .1 m1 + .1 m2) / (1 - .81), square = (.999 * .001 + .001 * 9) / (1 - .998001)
    second = (0.09 * -1 + 0.1 * 3) / 0.19 / math.sqrt((0.000999 + 0.009) / (1 - 0.999**2))
    assert found.shift == 0
    assert found.numbers.tolist() == [round(2 * step), round(step * (second - 1))]


def test_adam_by_hand_over_three_steps() -> None:
    moments, expected_mean, expected_square = Moments(np.zeros(1), np.zeros(1)), 0.0, 0.0
    for step, slope in enumerate([2.0, -4.0, 0.5], 1):
        moments, direction = adam(moments, np.array([slope]))
        expected_mean = 0.9 * expected_mean + 0.1 * slope
        expected_square = 0.999 * expected_square + 0.001 * slope**2
        size = math.sqrt(expected_square / (1 - 0.999**step))
        assert direction[0] == pytest.approx(expected_mean / (1 - 0.9**step) / size, rel=1e-6)


def test_the_rate_is_the_share_by_which_weights_move() -> None:
    """A step displaces weights by learning_rate times their own root mean square."""
    bank = BANKS["hadamard"](64, 3)
    start = SeedLedger(bank, 20, 0, bytes(32), np.zeros(64, np.int32))
    rate = coordinate_rate(start, 0.02, 0.18, "ann")
    signs = np.random.default_rng(0).choice([-1, 1], 64)
    sums = np.rint(rate * signs).astype(np.int32)
    [y] = bank.pieces(sums, ordinal=0, shape=(4096,), blocks=range(1))
    moved = np.sqrt(np.mean(np.square(y * 2.0**-20)))
    assert moved == pytest.approx(0.02 * 0.18, rel=1e-3)


@pytest.mark.parametrize(
    ("bank", "seeds", "groups", "shorter"),
    [("hadamard", 4096, 1, 1), ("hadamard", 4096, 4, 2), ("hadamard", 256, 16, 1), ("kron", 64, "tensor", 1)],
)
def test_steps_of_more_than_4096_numbers_are_shorter_by_the_square_root(
    bank: str, seeds: int, groups: Any, shorter: float
) -> None:
    """They lie nearer to the gradient: at one rate for all, 16 groups of 4096 diverge on 135 million weights.

    However many groups there are, fewer numbers in all lie no nearer.
    """
    chosen = directions(bank, seeds, [5, 6], groups, range(35))
    ledger = SeedLedger(chosen, 20, 0, bytes(32), np.zeros(chosen.size, np.int32))
    expected = 0.02 * 0.18 * 2**20 / math.sqrt(seeds) / shorter
    assert coordinate_rate(ledger, 0.02, 0.18, "ann") == pytest.approx(expected, rel=1e-12)


def test_weights_that_are_all_zero_have_no_share(examples: Any) -> None:
    position = Scripted((1.0, [1.0, 1.0]))
    position.rms = 0.0
    with pytest.raises(ClientError, match=r"ann: expected trained weights that are not all zero; .*method\.trainable"):
        run(position, ledger(0, 0), examples, 1)


def test_it_comes_down_to_the_bottom_and_says_so_by_what_it_sends(examples: Any) -> None:
    bottom = np.array([300.0, -200.0, 40.0, 0.0])
    found = run(Bowl(bottom), ledger(0, 0, 0, 0), examples, 60, rate=0.02, rows=examples(2))
    assert found.loss_before == pytest.approx(np.square(bottom).sum() / 2)
    assert found.loss_after is not None
    assert found.loss_after < np.square(bottom).sum() / 40
    moved = found.numbers.astype(np.int64) << found.shift
    # The loss after is that of the numbers as sent, not of the ones in the optimizer.
    assert found.loss_after == pytest.approx(np.square(moved - bottom).sum() / 2)


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (4, 7), (2, 1)])
def test_fewer_bits_send_the_same_in_coarser_steps(bits: int, most: int, examples: Any) -> None:
    found = run(Bowl(np.array([900.0, -900.0])), ledger(0, 0), examples, 5, bits=bits)
    assert np.abs(found.numbers).max() <= most
    assert is_shortest(found.numbers, found.shift, bits)
    assert np.sign(found.numbers).tolist() == [1, -1]


def test_what_the_server_has_no_room_for_is_not_moved(examples: Any) -> None:
    """The steps stay within what can be sent, so that the last are taken where the sums will be."""
    position = Bowl(np.array([1e6, -1e6]))
    found = run(position, ledger(5, 0), examples, 50, largest_shift=1)
    assert (found.numbers.tolist(), found.shift) == ([127, -127], 1)


def test_only_the_newest_bank_moves(examples: Any) -> None:
    bank = directions("hadamard", 2, [5, 6], 2)
    sums = np.array([9, -9, 8, -8, 1, 2, 3, 4], np.int32)
    start = SeedLedger(bank, 10, 4, bytes(32), sums)
    position = Scripted((2.0, [1.0, 1.0, -1.0, 0.0]), (2.0, [0.0, 0.0, 0.0, 0.0]))
    found = run(position, start, examples, 2)
    assert len(found.numbers) == 4
    assert [at[:4] for at in position.at] == [[9, -9, 8, -8]] * 2
    assert position.at[1][4:] == [1 + 45, 2 + 45, 3 - 45, 4]


def test_a_step_that_is_not_finite_is_left_out_and_counted(examples: Any) -> None:
    nan = math.nan
    position = Scripted((2.0, [1.0, 1.0]), (nan, [1.0, 1.0]), (2.0, [nan, 1.0]), (math.inf, [1.0, 0.0]))
    found = run(position, ledger(0, 0), examples, 4)
    assert (found.skipped, found.losses) == (3, [2.0])
    assert found.numbers.tolist() == [45, 45]
    assert position.at[1] == position.at[2] == position.at[3]


@pytest.mark.parametrize("steps", [1, 3, 9])
def test_a_round_without_enough_finite_steps_fails_and_says_which(steps: int, examples: Any) -> None:
    script = [(math.nan, [1.0, 1.0])] * min(steps, 4)
    with pytest.raises(ClientError, match=r"ann, step \d: expected a finite loss .*lower it") as error:
        run(Scripted(*script), ledger(0, 0), examples, steps)
    assert f"got {min(steps, 4)} without" in str(error.value)


def test_sums_that_could_leave_32_bits_end_the_work(examples: Any) -> None:
    with pytest.raises(RoundError, match="accumulators"):
        run(Bowl(np.array([2.0**40, 0.0])), ledger(2**31 - 2, 0), examples, 3)


def test_a_client_without_examples_is_refused() -> None:
    with pytest.raises(ClientError, match="ann: expected at least one training example"):
        run(Scripted(), ledger(0, 0), lambda count: [], 1)


def test_accumulation_reads_so_many_batches_a_step_and_counts_their_tokens(examples: Any) -> None:
    position = Scripted((2.0, [1.0, 0.0]), (2.0, [1.0, 0.0]))
    found = run(position, ledger(0, 0), examples, 2, accumulation=3)
    assert position.parts == [3, 3]
    assert found.tokens == 2 * sum(len(example.input_ids) for example in examples(3))


def test_every_step_is_heard_of(examples: Any) -> None:
    heard: list[tuple[int, int]] = []
    run(Scripted(*[(1.0, [1.0, 1.0])] * 2), ledger(0, 0), examples, 2, on_step=lambda *step: heard.append(step))
    assert heard == [(1, 2), (2, 2)]


@given(
    moved=st.lists(st.floats(-(2.0**40), 2.0**40), min_size=1, max_size=8),
    bits=st.sampled_from([8, 4, 2]),
    room=st.integers(0, 40),
)
def test_numbers_are_within_their_bits_and_no_further_off_than_with_all_of_the_largest(
    moved: list[float], bits: int, room: int
) -> None:
    numbers, shift = small_numbers(np.array(moved), bits=bits, largest_shift=room)
    most = LARGEST_NUMBER[bits]
    assert np.abs(numbers.astype(np.int64)).max() <= most
    assert 0 <= shift <= room
    assert is_shortest(numbers, shift, bits)
    wide = next((s for s in range(room) if max(map(abs, moved)) * 2.0**-s <= most), room)
    fitting = np.clip(np.rint(np.ldexp(moved, -wide)), -most, most) * 2.0**wide
    error = np.square(numbers.astype(np.float64) * 2.0**shift - moved).sum()
    assert error <= np.square(fitting - moved).sum() * (1 + 1e-9)


@pytest.mark.parametrize(("bits", "share"), [(8, 0.001), (4, 0.03), (2, 0.25)])
def test_few_bits_hold_most_of_what_thousands_of_numbers_moved(bits: int, share: float) -> None:
    """A shift that fits the largest of them would lose nine tenths of the squares at 2 bits."""
    moved = generator(derive(0, "moved")).standard_normal(4096) * 1000
    numbers, shift = small_numbers(moved, bits=bits, largest_shift=30)
    lost = np.square(moved - numbers.astype(np.float64) * 2.0**shift).sum() / np.square(moved).sum()
    assert lost < share
