from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.rounds.record import Metrics
from fedtune.rounds.worst_tenth import WorstTenth, worst_tenth, worst_tenths

LOSSES = {f"client-{number}": {"loss": float(number), "accuracy": number / 20, "examples": 5} for number in range(20)}


def test_by_hand_a_tenth_is_rounded_up_and_worse_depends_on_the_metric() -> None:
    assert worst_tenth(LOSSES) == WorstTenth(18.5, clients=2, of=20, rows=10)
    assert worst_tenth(LOSSES, "accuracy") == WorstTenth(0.025, clients=2, of=20, rows=10)  # of clients 0 and 1
    few: dict[str, Metrics] = {
        "a": {"loss": 1.0},
        "b": {"loss": 3.0},
        "diverged": {"loss": math.nan},
        "silent": {"loss": None},
    }
    assert worst_tenth(few) == WorstTenth(3.0, clients=1, of=2, rows=0)
    assert worst_tenth({"a": {"loss": 1.0}}) is None
    assert worst_tenth(LOSSES, "rouge_l") is None


def test_a_tenth_of_seventy_is_seven() -> None:
    # 0.1 * 70 is a little more than 7 in floating point.
    many = {str(number): {"loss": float(number)} for number in range(70)}
    assert worst_tenth(many) == WorstTenth(66.0, clients=7, of=70, rows=0)


@given(losses=st.lists(st.integers(0, 1000), min_size=2, max_size=60))
def test_no_other_tenth_is_worse_and_order_does_not_matter(losses: list[int]) -> None:
    scores = {f"{place:03}": {"loss": float(loss), "examples": 1} for place, loss in enumerate(losses)}
    tenth = worst_tenth(scores)
    assert tenth is not None
    assert tenth == worst_tenth(dict(reversed(scores.items())))
    assert tenth.clients == tenth.rows == math.ceil(Fraction(len(losses), 10))
    assert tenth.mean == pytest.approx(sum(sorted(losses)[-tenth.clients :]) / tenth.clients)
    assert tenth.mean >= sum(losses) / len(losses)


def test_a_metric_that_a_client_lacks_has_no_tenth_beside_the_others() -> None:
    assert worst_tenths(LOSSES) == {"loss": 18.5, "accuracy": 0.025, "clients": 2, "examples": 10}
    assert "accuracy" not in worst_tenths(LOSSES | {"other": {"loss": 0.5, "examples": 1}})
    assert worst_tenths({}) == worst_tenths({"a": {"loss": 1.0}}) == {}
