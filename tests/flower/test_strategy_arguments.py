from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedtune.errors import ConfigError
from fedtune.flower.strategy_arguments import alpha_at, alpha_faults, bound_faults, rank_faults

WHOLE = "ranks: expected whole numbers of at least 1, one for all or by node name, or 'own'; got "


def test_alpha_is_a_number_or_a_function_of_the_rank() -> None:
    assert alpha_at(16, 4) == 16.0
    assert alpha_at(lambda rank: 2 * rank, 4) == 8.0
    assert alpha_at(lambda rank: float(np.sqrt(rank)) / 4, 4) == 0.5


@pytest.mark.parametrize(
    ("alpha", "sentence"),
    [
        ("16", "alpha: expected a number above 0, the clients' lora_alpha; got '16'"),
        (math.inf, "the clients' lora_alpha; got inf"),
        (lambda rank: 0, "the clients' lora_alpha of rank 4; got 0"),
        (lambda rank: None, "the clients' lora_alpha of rank 4; got None"),
        (lambda rank: {8: 16}[rank], "the clients' lora_alpha of rank 4; got KeyError: 4"),
    ],
)
def test_an_alpha_of_no_use_is_one_sentence(alpha: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        alpha_at(alpha, 4)
    assert str(refused.value).endswith(sentence)
    assert [str(fault) for fault in alpha_faults(alpha, {"a": 8}, 4)] == [str(refused.value)]


def test_alpha_is_asked_for_the_ranks_that_are_known() -> None:
    few = {4: 8.0, 8: 16.0}
    assert not list(alpha_faults(few.__getitem__, {"a": 8}, 4))
    assert not list(alpha_faults(few.__getitem__, 8, 4))
    assert not list(alpha_faults(few.__getitem__, "own", 4))
    (fault,) = alpha_faults(few.__getitem__, {"a": 2, "b": 3}, 4)
    assert "of rank 2" in str(fault)


@pytest.mark.parametrize("ranks", ["Own", 0, True, 8.0, [4], {"a": "8"}, {"a": 8.0}, {"a": True}])
def test_ranks_that_are_no_whole_numbers_are_refused(ranks: Any) -> None:
    (fault,) = rank_faults("FLoRA", "flora", ranks, 4, own=True)
    got = next(iter(ranks.values())) if isinstance(ranks, dict) else ranks
    assert str(fault) == WHOLE + repr(got)


@pytest.mark.parametrize("ranks", [None, 8, {}, {"a": 4}, {"a": 2, "b": 8}, "own"])
def test_ranks_of_use_are_taken(ranks: Any) -> None:
    assert not list(rank_faults("FLoRA", "flora", ranks, 4, own=True))


def test_a_method_of_one_rank_takes_no_others() -> None:
    assert not list(rank_faults("FedEx", "fedex", {"a": 4}, 4, own=False))
    assert not list(rank_faults("FedEx", "fedex", 8, 4, own=False))
    (fault,) = rank_faults("FedEx", "fedex", {"a": 8}, 4, own=False)
    assert str(fault).startswith("ranks: expected one rank for all clients of FedEx; got {'a': 8}; use ")


def test_numbers_that_bound_updates_are_above_zero() -> None:
    assert not list(bound_faults(1.0, norm_cap=None, max_norm=math.inf))
    faults = [str(fault) for fault in bound_faults(math.nan, norm_cap=-1.0, weight_cap=math.nan)]
    assert faults == [
        "server_learning_rate: expected a number above 0; got nan",
        "norm_cap: expected a number above 0, or None; got -1.0",
        "weight_cap: expected a number above 0, or None; got nan",
    ]
