from __future__ import annotations

import numpy as np
import pytest

from fedtune.messages import BaseDtype, Training
from fedtune.planning.allocation import OneRank, gain
from fedtune.planning.planner import Cost
from fedtune.planning.site_options import (
    MOST_BATCHES,
    Option,
    Sites,
    batch_sizes,
    best_end,
    fastest,
    fit,
    prefer,
    sites,
    split,
    table_of,
    take,
)
from tests.planning.test_allocation import TARGETS

OPTIONS = [Option("", 3), Option("", 1), Option("nf4", 3)]
TRAINING = Training(batch=4, steps=10)
ALLOCATION = OneRank(TARGETS, (1, 2))


def cost(depth: int, rank: int, training: Training, base_dtype: BaseDtype) -> Cost:
    """A GB for each example and block, and 4 or 1 of weights; a TFLOP for each block, and 1 MB; numbers cost too."""
    numbers = rank * TARGETS.numbers(depth)
    weights = 4.0 if not base_dtype else 1.0
    return Cost(depth + numbers / 68, 1 + numbers / 136, weights + training.batch * depth + numbers / 68)


def cohort(*gb: float, s_per_tflop: float = 1.0, rank: int = 2) -> Sites:
    table, ones = table_of(OPTIONS, TARGETS, TRAINING, cost), np.ones(len(gb))
    return sites(
        [table] * len(gb),
        memory_gb=np.array(gb),
        ranks=rank * ones,
        compute=s_per_tflop * ones,
        transfer=0 * ones,
        overhead=0.5 * ones,
        steps=10 * ones,
        weights=ones / len(gb),
    )


def test_batches_are_halved_and_steps_see_as_many_examples() -> None:
    assert batch_sizes(Training(batch=6)) == [6, 3]
    assert [split(Training(batch=6, accumulation=2), batch).accumulation for batch in (6, 3)] == [2, 4]


def test_a_table_is_linear_in_what_is_trained() -> None:
    table = table_of(OPTIONS, TARGETS, TRAINING, cost)
    assert table.batches == [4, 2, 1, 1, 1, 1, 1, 1]
    assert len(table.batches) == MOST_BATCHES
    assert table.least.tolist() == [68, 28, 68]
    assert table.memory_gb[0, :3] == pytest.approx([16, 10, 7])
    assert table.gb_per_number[0, 0] == pytest.approx(1 / 68)
    for option, (at_zero, slope) in enumerate(zip(table.tflop, table.tflop_per_number, strict=True)):
        for rank in (1, 5):
            wanted = cost(OPTIONS[option].depth, rank, TRAINING, "").tflop
            assert at_zero + slope * rank * table.least[option] == pytest.approx(wanted)


def test_the_largest_batch_with_which_the_budget_fits_is_taken_else_the_smallest() -> None:
    """In three blocks at rank 2: 18, 12 and 9 GB by batch; at rank 1 with a batch of one 8."""
    own = cohort(18, 12, 9, 8, 7.9)
    assert own.batch[:, 0].tolist() == [0, 1, 2, 2, 2] or own.batch[:4, 0].tolist() == [0, 1, 2, 7]
    assert own.feasible[:, 0].tolist() == [True, True, True, True, False]
    assert own.room[:, 0] == pytest.approx([136, 136, 136, 68, 61.2])
    # One block: 4 + 1 + 28/68. In nf4 three GB less.
    assert cohort(5.5, 5.3).feasible[:, 1].tolist() == [True, False]
    assert cohort(5.0, 4.9).feasible[:, 2].tolist() == [True, False]


def test_fewer_steps_come_before_rank_one_is_late() -> None:
    own = cohort(99)
    # Rank 1 in three blocks: 4 TFLOP and half a second beside. 4.5 s is enough for it, 5.5 s for rank 2.
    for end, share, numbers in ((5.5, 1.0, 136.0), (4.5, 1.0, 68.0), (3.5, 0.7, 68.0)):
        fitting = fit(own, ALLOCATION, end, least_share=0.5)
        assert fitting.share[0, 0] == pytest.approx(share)
        assert fitting.numbers[0, 0] == pytest.approx(numbers)
        assert fitting.seconds[0, 0] <= end + 1e-9
        assert fitting.value[0, 0] == pytest.approx(share * gain(np.array(numbers / 68)))
    assert fit(own, ALLOCATION, 2.0, least_share=0.5).value[0, 0] == -np.inf
    assert fit(own, ALLOCATION, 0.4, least_share=0.5).value.max() == -np.inf


def test_the_end_of_the_round_gives_the_largest_value_per_second() -> None:
    """One site: every end that is tried, by hand."""
    own = cohort(99)
    end = best_end(own, ALLOCATION, least_share=0.5, server_s=1.0)
    best = max(
        fit(own, ALLOCATION, other, least_share=0.5).value.max() / (other + 1.0) for other in np.arange(1.0, 7.0, 0.05)
    )
    fitting = fit(own, ALLOCATION, end, least_share=0.5)
    assert fitting.value.max() / (fitting.seconds[0, fitting.value.argmax()] + 1.0) >= 0.97 * best


def test_of_what_is_about_as_good_more_bits_are_preferred_and_then_larger_batches() -> None:
    own = cohort(99, 6.5)
    fitting = fit(own, ALLOCATION, np.inf, least_share=0.5)
    # nf4 loses 2 % of what is learned: alike, but for the bits.
    assert [OPTIONS[place].base_dtype for place in prefer(own, fitting)] == ["", "nf4"]


def test_the_fastest_option_is_one_that_fits() -> None:
    quickest, share = fastest(cohort(99, 5.2), least_share=0.25)
    assert [OPTIONS[place] for place in quickest] == [Option("", 1), Option("nf4", 3)]
    assert share.tolist() == [0.3, 0.3]


def test_some_of_the_sites_keep_their_proportions() -> None:
    own = take(cohort(99, 6, 5), np.array([0, 2]))
    assert own.weights.tolist() == [0.5, 0.5]
    assert own.feasible.shape == (2, 3)
