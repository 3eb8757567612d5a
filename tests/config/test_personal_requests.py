"""What clients are asked to score of their own models, and that a site consents to nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtune.config import bind
from fedtune.config.consent import order_differences, permission_texts, score_differences
from fedtune.config.personal_requests import personal_request
from fedtune.config.recipe import Recipe, method_of
from fedtune.messages import Assignment, Blueprint, Personal, Plan, PlannedClient, ScoreRequest, Training
from fedtune.wire.codec import decode_outline, encode_assignment
from fedtune.wire.profile import ClientProfile, ModelSpec
from fedtune.wire.scores import encode_score_request, score_request_outline

MODULES = {"q_proj": (8, 8)}
PROFILE = ClientProfile("ann", 12, ModelSpec("ab" * 32, MODULES))


def recipe(**personal: Any) -> Recipe:
    return bind(
        {
            "name": "own",
            "model": {"base": "embedded"},
            "adapter": {"rank": 4, "targets": ["q_proj"]},
            "method": "fedit",
            "client": {"epochs": 2, "batch": 4, "learning_rate": 0.1},
            "data": {"source": "no-data"},
            "personal": personal,
        }
    )


def order(own: Recipe) -> Assignment:
    """Return the first order of a server, as a site reads it before its bodies come."""
    method = method_of(own)
    state = method.init(Blueprint(MODULES, {}, max_rank=4, seed=own.seed), own.method)
    training = replace(own.client, steps=6, epochs=None)
    assignment = method.assign(state, own.seed, PlannedClient(Plan("ann", 4, 2.0, training)))
    return decode_outline(encode_assignment(replace(assignment, base="ab" * 32)).header)


def request(own: Recipe, round: int = 1) -> ScoreRequest:
    made_of = ScoreRequest("ann", "fedit", round, "ab" * 32, batch=own.evaluate.batch, examples=64)
    made_of = replace(made_of, personal=personal_request(own, "ann", 12, round))
    return score_request_outline(encode_score_request(made_of).header)


def test_a_request_says_how_a_client_fine_tunes() -> None:
    own = personal_request(recipe(kind="finetune", rate=0.01), "ann", 12, 1)
    assert own is not None
    training = own.training
    assert training is not None
    assert (training.steps, training.epochs, training.learning_rate) == (6, None, 0.01)  # two passes over 12, 4 a step
    assert (own.scale, own.train) == (2.0, "ab")
    other = personal_request(recipe(kind="finetune", rate=0.01), "bob", 12, 1)
    assert other is not None
    assert other.seed != own.seed


def test_before_round_1_and_without_the_table_nothing_is_asked_for() -> None:
    assert personal_request(recipe(kind="ditto"), "ann", 12, 0) is None
    assert personal_request(replace(recipe(kind="ditto"), personal=None), "ann", 12, 1) is None


@pytest.mark.parametrize("kind", ["ditto", "pfedme", "share-a"])
def test_a_site_consents_to_what_its_recipe_asks_and_to_no_other_personal_model(kind: str) -> None:
    strength = {"strength": 5.0} if kind == "pfedme" else {}
    own = recipe(kind=kind, **strength)
    asked = order(own)
    assert order_differences(own, PROFILE, asked) == []
    personal = asked.lora.personal
    assert personal is not None
    for wrong in (
        None,
        Personal("fedrep", keep=("*.a",)),
        replace(personal, steps=1000),
        replace(personal, rate=0.5),
        replace(personal, strength=99.0),
        replace(personal, keep=("*.x",)),
    ):
        changed = replace(asked, task=replace(asked.lora, personal=wrong))
        assert order_differences(own, PROFILE, changed), wrong
    assert order_differences(replace(own, personal=None), PROFILE, asked)


@pytest.mark.parametrize("kind", ["ditto", "finetune"])
def test_a_site_scores_its_own_model_as_its_recipe_says_and_not_otherwise(kind: str) -> None:
    own = recipe(kind=kind)
    asked = request(own)
    assert score_differences(own, PROFILE, asked) == []
    assert asked.personal is not None
    wrongs: list[Any] = [None, replace(asked.personal, personal=Personal("pfedme").in_full())]
    if kind == "finetune":
        wrongs += [
            replace(asked.personal, seed=1),
            replace(asked.personal, scale=9.0),
            replace(asked.personal, training=Training(steps=10_000)),
        ]
    for wrong in wrongs:
        assert score_differences(own, PROFILE, replace(asked, personal=wrong)), wrong
    assert score_differences(own, PROFILE, replace(request(own, 0), personal=asked.personal))


def test_norms_that_stay_come_to_a_site_in_no_order() -> None:
    own = recipe(kind="fedbn")
    norms = {"norm.weight": np.ones(3, np.float32)}
    profile = replace(PROFILE, foundation=ModelSpec("ab" * 32, MODULES, saved=norms))
    asked = order(own)
    assert order_differences(own, profile, asked) == []
    sent = replace(asked, task=replace(asked.lora, blobs={**asked.lora.blobs, "saved": norms}))
    assert "stays here" in str(order_differences(own, profile, sent)[0])


def test_a_site_is_shown_what_stays_and_what_leaves() -> None:
    text = permission_texts(recipe(kind="share-a"), "ann")["own model"]
    assert (
        text
        == "share-a: what *.b name stays in this site's folder of the run; its scores and 8 bytes of a digest leave"
    )
    assert "all of it stays" in permission_texts(recipe(kind="ditto"), "ann")["own model"]
    assert "only its scores leave" in permission_texts(recipe(kind="finetune"), "ann")["own model"]
