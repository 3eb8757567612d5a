from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from fedtune.messages import (
    AdmittedUpdate,
    ClientUpdate,
    Failure,
    LoraResult,
    cohort_weights,
)


def update(client: str, examples: int) -> AdmittedUpdate:
    return AdmittedUpdate(ClientUpdate(client, 1, examples, LoraResult({})))


def test_weights_are_shares_of_the_examples_of_those_that_answered_sorted_by_name() -> None:
    cohort = cohort_weights([update("b", 3), update("a", 1)], "examples")
    assert [(answer.client, share) for answer, share in cohort] == [("a", 0.25), ("b", 0.75)]


def test_uniform_weights_are_equal() -> None:
    assert [share for _, share in cohort_weights([update("b", 3), update("a", 1)], "uniform")] == [0.5, 0.5]


def test_the_order_of_answers_does_not_matter() -> None:
    updates = [update(name, size) for size, name in enumerate("dcab", start=1)]
    assert cohort_weights(updates, "examples") == cohort_weights(updates[::-1], "examples")


def test_messages_cannot_be_edited() -> None:
    with pytest.raises(FrozenInstanceError):
        update("a", 1).update.num_examples = 5  # type: ignore[misc]


def test_a_client_that_fails_is_not_refused() -> None:
    assert Failure.from_text("a", "out of memory").kind == "failed"
