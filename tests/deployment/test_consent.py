"""A site's orders under the recipe that it has accepted, by what it has said of itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.deployment.consent import order_check
from fedtune.link.client.session import Greeting
from fedtune.link.envelopes import EVALUATE, RESULT, TRAIN
from fedtune.link.rejections import veto_name
from fedtune.link.settings import Policy
from fedtune.messages import ScoreRequest
from fedtune.wire.codec import encode_assignment
from fedtune.wire.profile import encode_profile
from fedtune.wire.scores import encode_score_request
from fedtune.wire.v1 import link_pb2 as pb
from tests.config.test_consent import ADAPTERS, PROFILE, SAVED, SEEDS, made

BASE = bytes.fromhex(PROFILE.foundation.base)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "front").write_bytes(encode_profile(PROFILE).header)
    return tmp_path


def greeting(recipe: str) -> Greeting:
    return Greeting(1, pb.Limits(), "run", pb.Envelope(), recipe.encode())


def faults(state: Path, recipe: str, front: bytes, *, task: str = TRAIN, base: bytes = BASE, **more: object) -> str:
    said = greeting(recipe)
    header = pb.Header(task=task, recipe=said.recipe_digest, base=base, **more)  # type: ignore[arg-type]
    return "; ".join(one.note for one in order_check(state, Policy(min_examples=24))(said, header, front))


def test_what_the_recipe_permits_passes(state: Path) -> None:
    assert faults(state, ADAPTERS, encode_assignment(made(ADAPTERS)).header) == ""
    assert faults(state, SEEDS, encode_assignment(made(SEEDS)).header) == ""
    request = ScoreRequest("site-a", "flora", 2, PROFILE.foundation.base, 8, 16, {"saved": SAVED})
    assert faults(state, ADAPTERS, encode_score_request(request).header, task=EVALUATE) == ""
    assert faults(state, ADAPTERS, b"", task=RESULT, round=5, parts=[pb.Part(key="adapter/a.json")]) == ""


def test_what_it_does_not_permit_is_named(state: Path) -> None:
    order = made(ADAPTERS)
    training = replace(order.plan.training, learning_rate=1e30, steps=10**9)
    asked = encode_assignment(replace(order, plan=replace(order.plan, training=training))).header
    assert faults(state, ADAPTERS, asked) == (
        "plan.training.learning_rate: expected 0.01; got 1e+30; plan.training.steps: expected 10; got 1000000000"
    )
    assert faults(state, ADAPTERS, b"", task=RESULT, round=5, parts=[pb.Part(key="seeds/x")]).startswith("result: ")


@pytest.mark.guarantee("G17")
def test_a_base_that_is_not_this_sites_own_is_named(state: Path) -> None:
    front = encode_assignment(made(SEEDS)).header  # of seeds only the signed header names the base
    assert faults(state, SEEDS, front, base=b"") == "base: expected this site's own, 9f3c9f3c9f3c; got none"
    assert faults(state, SEEDS, front, base=b"\1" * 32).startswith("base: expected this site's own")


def test_a_recipe_that_cannot_be_bound_here_permits_nothing(state: Path) -> None:
    front = encode_assignment(made(ADAPTERS)).header
    missing = ADAPTERS.replace('"flora"', '"of-a-plugin"')
    assert "install the package that brings it" in faults(state, missing, front)
    assert faults(state, "name = 'x'", front).startswith("expected an order that can be held against the recipe; ")
    (other,) = order_check(state, Policy())(greeting(ADAPTERS), pb.Header(task=TRAIN, recipe=b"x", base=BASE), front)
    assert other.note == "expected an order under the recipe that this site has accepted; got one under another"


def test_the_head_of_a_classifier_has_the_classes_of_the_federation(state: Path) -> None:
    text = ADAPTERS.replace('base = "none"', 'base = "none", task = "classification"')
    order = replace(made(text), labels=("a", "b"))
    labelled = replace(PROFILE, foundation=replace(PROFILE.foundation, labels=("a",), saved={}))
    (state / "profile" / "front").write_bytes(encode_profile(labelled).header)
    assert faults(state, text, encode_assignment(order).header).startswith("task.blobs: ")
    (state / "profile-labels").mkdir()
    agreed = replace(PROFILE, foundation=replace(PROFILE.foundation, labels=("a", "b")))
    (state / "profile-labels" / "front").write_bytes(encode_profile(agreed).header)
    assert faults(state, text, encode_assignment(order).header) == ""


def test_an_update_of_few_examples_or_steps_never_leaves(state: Path) -> None:
    front = encode_assignment(made(SEEDS)).header  # six steps of four examples
    said = greeting(SEEDS)
    header = pb.Header(task=TRAIN, recipe=said.recipe_digest, base=BASE)

    def vetoes(rules: Policy) -> list[str]:
        return [f"{veto_name(one.veto)} {one.note}" for one in order_check(state, rules)(said, header, front)]

    assert vetoes(Policy(min_examples=24)) == []
    assert vetoes(Policy()) == ["TOO_FEW_EXAMPLES policy.min_examples: an update of at least 32 examples; got 24"]
    few = Policy(min_examples=24, min_steps=7)
    assert vetoes(few) == ["TOO_FEW_STEPS policy.min_steps: at least 7; got 6"]
