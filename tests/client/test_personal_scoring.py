"""The score of a client's own model is that of its tensors in the places of the global model's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.client import perform as perform_module
from fedtune.client.personal_scoring import combine, finetune, score_own
from fedtune.client.personal_state import PersonalState, StateFolder
from fedtune.client.scoring import score
from fedtune.data.encode import Example
from fedtune.errors import ClientError
from fedtune.lora.adapter import Adapter, Factors, pack, unpack
from fedtune.messages import Personal, PersonalRequest, Plan, ScoreRequest, Training, TrainLora
from fedtune.model.base import Base, digest
from fedtune.model.evaluate import evaluate
from tests.client.test_personal_training import order

TRAINING = Training(batch=2, learning_rate=0.05, steps=6)


@pytest.fixture
def base(loaded: Any) -> Base:
    base: Base = loaded()
    return base


def factors(base: Base, rank: int, seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    return {
        name: Factors(
            a=rng.standard_normal((rank, n)).astype(np.float32),
            b=0.1 * rng.standard_normal((m, rank)).astype(np.float32),
        )
        for name, (m, n) in base.modules.items()
    }


def test_by_hand_own_tensors_take_the_places_of_the_global_model_s(base: Base) -> None:
    server, own = factors(base, 4, 1), factors(base, 2, 2)
    name = next(iter(server))
    state = PersonalState("ann", 1, "share-a", 2.0, {f"{name}.b": own[name].b}, {"norm": np.ones(3, np.float32)})
    adapter, saved = combine(server, {"norm": np.zeros(3, np.float32), "head": np.zeros(2, np.float32)}, state)
    np.testing.assert_array_equal(adapter[name].b, 2.0 * own[name].b)  # the scale is folded in, as in what is sent
    np.testing.assert_array_equal(adapter[name].a, server[name].a[:2])  # of the ranks that the client has
    assert all(adapter[other] is server[other] for other in server if other != name)
    assert (saved["norm"].sum(), saved["head"].sum()) == (3.0, 0.0)


def test_a_second_model_is_scored_alone(base: Base, examples: Any, tmp_path: Path) -> None:
    rows: list[Example] = examples(6)
    folder, server, own = StateFolder(tmp_path), factors(base, 4, 1), factors(base, 4, 2)
    request = PersonalRequest(Personal("ditto").in_full())
    measure = partial(
        score_own, base, rows[:3], rows[3:], request, client="ann", adapter=server, saved={}, folder=folder, batch=2
    )
    expected = [evaluate(base, each, {}, {"ann": rows[3:]}, batch=2)["ann"] for each in (server, own)]
    assert measure(round=1) == expected[0]  # before it has stored any, its own model is the global one
    flat = pack({name: Factors(a=part.a, b=part.b / 2) for name, part in own.items()})
    folder.store(PersonalState("ann", 1, "ditto", 2.0, flat))
    assert measure(round=1) == expected[1]
    assert expected[0]["loss"] != expected[1]["loss"]
    assert measure(round=0) == expected[0]  # of the round that is scored, or an earlier one


@pytest.mark.parametrize("train", ["ab", "b"])
def test_a_fine_tuned_model_is_that_of_the_same_training(train: Any, base: Base, examples: Any) -> None:
    rows: list[Example] = examples(6)
    server = factors(base, 4, 1)
    request = PersonalRequest(Personal("finetune"), TRAINING, scale=2.0, train=train, seed=17)
    adapter, saved = finetune(base, rows, request, client="ann", adapter=server, saved={})
    assert digest(base.model) == base.digest
    assert saved == {}
    asked = order(base, None)
    task = TrainLora(a_key=0, train=train, upload="factors", wire_dtype="fp32", blobs={"local": pack(server)})
    asked = type(asked)("fedit", 1, 17, Plan("ann", 4, 2.0, TRAINING), task, base.digest)
    sent = perform_module.perform(base, rows, asked, threads=1).lora.tensors
    for name, tensor in sent.items():
        np.testing.assert_allclose(pack(adapter)[name], tensor, atol=1e-6)
    if train == "b":
        assert all(np.array_equal(adapter[name].a, server[name].a) for name in server)


def test_a_client_scores_both_models_when_it_is_asked(base: Base, examples: Any) -> None:
    rows: list[Example] = examples(6)
    server = factors(base, 4, 1)
    request = ScoreRequest("ann", "fedit", 1, base.digest, batch=2, blobs={"global": pack(server)})
    own = PersonalRequest(Personal("finetune"), TRAINING, scale=2.0, seed=17)
    plain = score(base, rows[3:], request, threads=1)
    both = score(base, rows[3:], type(request)(**{**vars(request), "personal": own}), threads=1, examples=rows[:3])
    assert plain.personal == {}
    assert both.metrics == plain.metrics
    assert both.personal["examples"] == 3
    assert both.personal["loss"] != both.metrics["loss"]


def test_without_rows_that_are_held_out_there_is_no_score(base: Base, examples: Any) -> None:
    request = PersonalRequest(Personal("ditto"))
    with pytest.raises(ClientError, match="expected rows that are held out"):
        score_own(base, [], [], request, client="ann", round=1, adapter=unpack({}), saved={}, folder=None, batch=2)
