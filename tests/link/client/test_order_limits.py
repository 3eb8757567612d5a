from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.link.client.order_limits import distinct_examples, limit_violations
from fedtune.link.rejections import veto_name
from fedtune.link.settings import Policy
from fedtune.messages import Assignment, DescendSeeds, Plan, ProbeSeeds, Proximal, SeedState, Task, Training, TrainLora
from fedtune.probing.order import batches

SEEDS = ProbeSeeds("kron", 64, key=0, exponent=20, shift=4, perturbation=16, state=SeedState("whole", 0, b"", 0, b""))


def order(task: Task, **training: int) -> Assignment:
    plan = Plan("a", 2, 2.0, Training(learning_rate=0.1, **training))  # type: ignore[arg-type]
    return Assignment("m", 1, 0, plan, task)


def vetoes(policy: Policy, asked: Assignment, examples: int = 100) -> list[str]:
    return [f"{veto_name(veto)} {note}" for veto, note in limit_violations(policy, asked, examples)]


@given(num=st.integers(1, 40), steps=st.integers(1, 8), batch=st.integers(1, 5), accumulation=st.integers(1, 3))
def test_the_examples_of_an_order_are_those_that_its_batches_draw(
    num: int, steps: int, batch: int, accumulation: int
) -> None:
    drawn = set[int]()
    left = min(num, steps * batch * accumulation)
    for places in batches(num, size=batch, key=3):
        if left <= 0:
            break
        drawn |= {*places[:left]}
        left -= len(places)
    asked = order(TrainLora(a_key=0), steps=steps, batch=batch, accumulation=accumulation)
    assert distinct_examples(asked, num) == len(drawn)


def test_one_step_on_one_example_is_vetoed() -> None:
    one = order(TrainLora(a_key=0), steps=1, batch=1)
    assert vetoes(Policy(), one) == ["TOO_FEW_EXAMPLES policy.min_examples: an update of at least 32 examples; got 1"]
    assert vetoes(Policy(min_examples=1), one) == []
    # A site with less data than that sets it lower by its own word.
    assert len(vetoes(Policy(), order(TrainLora(a_key=0), steps=100, batch=4), examples=31)) == 1
    assert vetoes(Policy(), order(TrainLora(a_key=0), steps=8, batch=4), examples=32) == []
    assert vetoes(Policy(min_examples=1, min_steps=2), one) == ["TOO_FEW_STEPS policy.min_steps: at least 2; got 1"]


@pytest.mark.parametrize(
    ("keys", "task"),
    [
        ({"weight_decay": 10.0}, TrainLora(a_key=0)),
        ({"weight_decay": 10.0, "optimizer": "sgd", "clip_norm": None}, TrainLora(a_key=0)),
        ({"optimizer": "sgd", "clip_norm": None}, TrainLora(a_key=0, terms=(Proximal(10.0),))),
    ],
)
def test_a_decay_that_wipes_out_all_steps_but_the_last_leaves_an_update_of_one_batch(
    keys: dict[str, Any], task: TrainLora
) -> None:
    asked = order(task, steps=64, batch=1)
    asked = replace(asked, plan=replace(asked.plan, training=replace(asked.plan.training, **keys)))
    assert [note.split()[0] for note in vetoes(Policy(), asked)] == ["TOO_FEW_EXAMPLES"]
    assert distinct_examples(asked, 100) == 1
    usual = replace(asked, plan=replace(asked.plan, training=replace(asked.plan.training, learning_rate=2e-4)))
    assert vetoes(Policy(), usual) == []


def test_queries_of_a_step_share_its_examples() -> None:
    assert distinct_examples(order(replace(SEEDS, queries=8, estimator="one-sided"), steps=16, batch=4), 100) == 8
    assert distinct_examples(order(SEEDS, steps=16, batch=4), 100) == 64


@pytest.mark.guarantee("G4")
def test_what_a_learning_rate_is_chosen_from_is_of_sixteen_batches_whatever_the_steps() -> None:
    measuring = order(replace(SEEDS, seeds=64, calibrate=True, curvatures=True), steps=200, batch=1)
    assert distinct_examples(measuring, 100) == 16
    assert [text[:17] for text in vetoes(Policy(min_examples=17), measuring)] == ["TOO_FEW_EXAMPLES "]


@pytest.mark.parametrize("allowed", [False, True])
def test_seeds_move_embeddings_only_where_the_site_says_so(allowed: bool) -> None:
    asked = order(replace(SEEDS, embeddings=True), steps=16, batch=4)
    found = vetoes(Policy(allow_embeddings=allowed), asked)
    assert [text.split()[0] for text in found] == [] if allowed else ["EMBEDDINGS_NOT_ALLOWED"]


def descend(fallback: int | None = None, **changes: Any) -> DescendSeeds:
    measured = Training(learning_rate=1e-4, batch=1, steps=fallback) if fallback else None
    return DescendSeeds(replace(SEEDS, **changes), count=64, largest_shift=9, fallback=measured)


def test_a_client_that_may_descend_or_probe_counts_the_fewer_steps_and_examples_of_both() -> None:
    alone = order(descend(), steps=3, batch=4, accumulation=2)
    assert distinct_examples(alone, 100) == 24
    assert distinct_examples(order(descend(50), steps=3, batch=4, accumulation=2), 100) == 24
    assert distinct_examples(order(descend(7), steps=3, batch=4, accumulation=2), 100) == 7
    assert vetoes(Policy(min_examples=8), order(descend(7), steps=3, batch=4)) == [
        "TOO_FEW_EXAMPLES policy.min_examples: an update of at least 8 examples; got 7"
    ]
    assert vetoes(Policy(min_examples=1, min_steps=4), order(descend(7), steps=3, batch=4)) == [
        "TOO_FEW_STEPS policy.min_steps: at least 4; got 3"
    ]
    assert vetoes(Policy(min_examples=1, min_steps=4), order(descend(3), steps=9, batch=4)) == [
        "TOO_FEW_STEPS policy.min_steps: at least 4; got 3"
    ]


@pytest.mark.guarantee("G2")
def test_embeddings_with_numbers_of_their_own_need_the_sites_word() -> None:
    """One row of 48 tokens of a small model: which tokens it has shows by an AUC of .90; among all weights of .54."""
    alone: list[dict[str, Any]] = [{"bank": bank, "groups": "tensor"} for bank in ("hadamard", "gaussian")]
    among: list[dict[str, Any]] = [{"bank": "hadamard", "groups": 16}, {"bank": "hadamard"}, {"groups": "tensor"}]
    for changes in (*alone, {"embeddings": True}):
        asked = order(descend(**changes), steps=9, batch=9)
        assert [line.split()[0] for line in vetoes(Policy(), asked)] == ["EMBEDDINGS_NOT_ALLOWED"]
        assert vetoes(Policy(allow_embeddings=True), asked) == []
    for changes in among:
        assert vetoes(Policy(), order(descend(**changes), steps=9, batch=9)) == []
    # A client that probes sends scalars along drawn directions, whatever the groups.
    assert vetoes(Policy(), order(replace(SEEDS, bank="hadamard", groups="tensor"), steps=99, batch=9)) == []
