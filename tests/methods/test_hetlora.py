from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtune.lora.adapter import delta
from fedtune.messages import (
    AdmittedUpdate,
    TailRank,
)
from fedtune.methods.hetlora import METHOD, size_weights
from fedtune.methods.method import LinearMethod, resize
from fedtune.tensors import Tensors


def with_tensors(update: AdmittedUpdate, tensors: Tensors) -> AdmittedUpdate:
    return replace(update, update=replace(update.update, result=replace(update.lora, tensors=tensors)))


def test_weights_by_hand_are_shares_of_the_norms(two_ranks: Any) -> None:
    # |2 B_1 A_1| = 6.324555 and |B_2 A_2 / 2| = 2
    assert size_weights([update.lora.tensors for update in two_ranks]) == pytest.approx([0.759747, 0.240253], abs=1e-6)


def test_factors_are_padded_and_averaged_with_those_weights(federate: Any, two_ranks: Any) -> None:
    state = METHOD.aggregate(federate({"m": (2, 3)}, max_rank=2).state(METHOD), two_ranks)
    first, second = 0.759747, 0.240253
    a = first * np.array([[1, 0, -1], [0, 0, 0]]) + second * np.array([[0, 2, 0], [1, 1, 1]])
    b = first * np.array([[2, 0], [4, 0]]) + second * np.array([[0.5, 0], [0, 1]])
    np.testing.assert_allclose(delta(METHOD.adapter(state)["m"]), b @ a, rtol=1e-5)


def test_a_client_without_a_change_has_no_weight_and_all_without_are_equal(two_ranks: Any) -> None:
    moved = two_ranks[1].lora.tensors
    still = {name: 0 * tensor for name, tensor in moved.items()}
    assert size_weights([still, moved]) == [0, 1]
    assert size_weights([still, still]) == [0.5, 0.5]


def test_a_pruned_client_gets_its_stated_rank_at_its_planned_scale(federate: Any) -> None:
    federation, member = federate({"m": (6, 5)}, max_rank=8), ("c", 8, 2.0, 1)
    state = federation.state(METHOD, rank_decay=0.5)
    assignment = federation.assign(METHOD, state, member)
    assert assignment.lora.terms == (TailRank(0.01, 0.5),)
    update = federation.answer(assignment)
    state = METHOD.aggregate(state, [with_tensors(update, resize(update.lora.tensors, 4))])
    again = federation.assign(METHOD, state, member)
    assert (again.plan.rank, again.plan.scale) == (4, 2.0)
    assert again.lora.blobs["local"]["m.a"].shape == (4, 5)
    assert federation.assign(METHOD, state, ("other", 8, 2.0, 1)).plan.rank == 8


def test_modules_to_save_are_weighted_by_examples(federate: Any) -> None:
    federation = federate({"m": (3, 3)}, max_rank=2, saved={"head": np.zeros(1, np.float32)})
    state = federation.round(METHOD, federation.state(METHOD), [("a", 2, 1.0, 1), ("b", 1, 1.0, 3)])
    assert state.saved["head"] == 0.25 * 1 + 0.75 * 3  # each test client returns its number of examples


def test_it_is_not_linear() -> None:
    assert not isinstance(METHOD, LinearMethod)
