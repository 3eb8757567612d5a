from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtune.errors import RoundError
from fedtune.messages import Plan, Training
from fedtune.methods.fedkseed_state import FedKSeedState
from fedtune.methods.seed_room import (
    check_headroom,
    fewest_rounds_left,
    growth_of_numbers,
    largest_shift,
    reached_shift,
)
from tests.methods.test_fedkseed_descent import DESCENT, PROBING, first


def with_sum(state: FedKSeedState, total: int) -> FedKSeedState:
    sums = np.zeros(state.bank.size, np.int64)
    sums[0] = total
    return replace(state, accumulators={"a": sums.astype(np.int32)})


def test_the_reach_of_steps_grows_with_their_number_and_size_and_with_fewer_bits() -> None:
    state = first(verbs=("descend",), seeds=4096)
    assert [reached_shift(state, replace(DESCENT, steps=steps)) for steps in (1, 8, 16, 64)] == [7, 10, 11, 13]
    assert reached_shift(state, Training(learning_rate=1e-9, steps=1)) == 0
    coarse = first(verbs=("descend",), seeds=4096, scalar_bits=4)
    assert reached_shift(coarse, DESCENT) == 14


def test_four_groups_have_the_room_of_one_because_they_never_meet() -> None:
    one, four = first(verbs=("descend",), seeds=4096), first(verbs=("descend",), seeds=4096, groups=4)
    assert growth_of_numbers(one, 5) == growth_of_numbers(four, 5) == 127 * 4096 * 32 + 2048
    assert largest_shift(one, DESCENT) == largest_shift(four, DESCENT)


def test_a_run_ends_where_numbers_such_as_before_have_no_room() -> None:
    state = with_sum(first(verbs=("descend",), seeds=4096), 2**31 - 1 - (127 * 4096 * 8 + 2048))
    assert largest_shift(state, DESCENT) == 3
    assert largest_shift(replace(state, widest=3), DESCENT) == 3
    with pytest.raises(RoundError, match="expected room for the numbers of a client that descends in sums") as error:
        largest_shift(replace(state, widest=4), DESCENT)
    assert error.value.final
    assert "with a smaller descend.learning_rate" in str(error.value)
    # Of steps that reach no further it is no loss.
    assert largest_shift(replace(state, widest=4), Training(learning_rate=1e-5, steps=1)) == 0
    with pytest.raises(RoundError, match="expected room"):
        largest_shift(with_sum(state, 2**31 - 1), DESCENT)


def test_the_perturbation_takes_room_only_where_some_client_probes() -> None:
    room = 127 * 4 * 4 * 16 + 2
    mixed = first()
    check_headroom(with_sum(mixed, 2**31 - 1 - mixed.perturbation - room * 16), Plan("a", 1, 1.0, PROBING))
    alone = with_sum(first(verbs=("descend",)), 2**31 - 1 - (127 * 4 + 2))
    assert largest_shift(alone, DESCENT) == 0


def test_rounds_are_counted_by_what_the_sums_have_grown() -> None:
    state = first(verbs=("descend",), seeds=4096)
    assert fewest_rounds_left(state) is None
    grown = replace(with_sum(state, 10_000_000), grown=10_000_000, widest=6)
    assert fewest_rounds_left(grown) == (2**31 - 1 - 10_000_000 - (127 * 4096 * 64 + 2048)) // 10_000_000 == 210
    assert fewest_rounds_left(replace(with_sum(state, 2**31 - 1), grown=5, widest=1)) == 0
    both = replace(first(), longest=200, grown=1)
    assert fewest_rounds_left(both) == (2**31 - 1 - both.perturbation) // (127 * 200 * 2**both.shift + 2)
