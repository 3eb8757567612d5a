from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data.encode import Example
from fedtune.data.loss_rows import MOST, SHARE, STEP, at_most, loss_rows, num_loss_rows


def rows(count: int, first: int = 0) -> Sequence[Example]:
    ids = [np.array([first + row], np.int64) for row in range(count)]
    return [Example(input_ids=i, labels=i, characters=1, prompt="", reference="", prompt_tokens=0) for i in ids]


def ids(examples: Sequence[Example]) -> list[int]:
    return [int(example.input_ids[0]) for example in examples]


@given(st.integers(1, 10**6))
def test_both_measurements_take_their_share_of_the_training_and_an_eighth_of_the_shortest(seen: int) -> None:
    passes = 2 * num_loss_rows(seen)
    assert 1 <= num_loss_rows(seen) <= MOST
    if seen >= 200:
        assert passes <= SHARE * STEP * seen
    if seen >= 6:
        assert passes <= 2 / 6 * seen  # of STEP * seen passes of the training


def test_held_out_rows_come_before_training_rows() -> None:
    assert set(ids(loss_rows(rows(9), rows(5, 100), "ann", count=3))) <= {*range(100, 105)}
    assert set(ids(loss_rows(rows(9), (), "ann", count=3))) <= {*range(9)}
    assert ids(loss_rows(rows(2), (), "ann", count=3)) == [0, 1]
    assert loss_rows((), (), "ann", count=3) == ()


def test_rows_are_the_same_in_every_round_and_fewer_are_a_part_of_more() -> None:
    few, many = (ids(loss_rows(rows(40), (), "ann", count=count)) for count in (4, 20))
    assert few == many[:4] == ids(loss_rows(rows(40), (), "ann", count=4))
    assert sorted(many) != many  # drawn: the order of a file may be that of its classes
    assert ids(loss_rows(rows(40), (), "bob", count=4)) != few


def test_a_process_that_was_sent_only_what_may_be_measured_measures_on_the_same_rows() -> None:
    everything = rows(3 * MOST)
    sent = at_most(everything, MOST, "ann")
    assert len(sent) == MOST
    assert ids(loss_rows((), sent, "ann", count=7)) == ids(loss_rows((), everything, "ann", count=7))
