from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from fedtune.errors import WireError
from fedtune.messages import ClientScores, Personal, PersonalRequest, Preference, ScoreRequest, Training
from fedtune.wire.codec import parse
from fedtune.wire.scores import (
    MAX_LEDGER_BYTES,
    decode_score_request,
    decode_scores,
    encode_score_request,
    encode_scores,
)
from fedtune.wire.v1 import round_pb2 as pb

TENSORS = {"q.a": np.ones((2, 3), np.float32), "q.b": np.zeros((4, 2), np.float32)}
REQUEST = ScoreRequest("ann", "flora", 3, "ab" * 32, batch=4, examples=7, blobs={"global": TENSORS}, date="2026-11-29")
SCORES = ClientScores("ann", 3, "ab" * 32, {"accuracy": 0.5, "examples": 2.0, "loss": 2.5}, seconds=0.25)


def test_a_request_comes_back_with_its_tensors() -> None:
    encoded = encode_score_request(REQUEST)
    result = decode_score_request(encoded.header, encoded.blobs)
    assert replace(result, blobs={}) == replace(REQUEST, blobs={})
    assert {name: array.tolist() for name, array in result.blobs["global"].items()} == {
        name: array.tolist() for name, array in TENSORS.items()
    }
    assert encode_score_request(result) == encoded


def test_a_request_says_by_which_beta_pairs_of_answers_are_scored() -> None:
    request = replace(REQUEST, blobs={}, preference=Preference(0.25))
    assert decode_score_request(encode_score_request(request).header, {}) == request
    message = parse(pb.Assignment(), encode_score_request(replace(REQUEST, blobs={})).header)
    assert message.score.preference_beta == 0
    message.score.preference_beta = -1.0
    with pytest.raises(WireError, match="preference_beta >= 0"):
        decode_score_request(message.SerializeToString(), {})


def test_a_request_for_seeds_carries_the_ledger_and_what_it_moves() -> None:
    encoded = encode_score_request(replace(REQUEST, blobs={}, ledger=b"ledger", trainable=(0, 2, 300)))
    result = decode_score_request(encoded.header, {})
    assert (result.ledger, result.trainable, encoded.blobs) == (b"ledger", (0, 2, 300), {})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"verb": pb.ADAPT}, "the verb SCORE"),
        ({"score": pb.Score(batch=0)}, "a batch of at least 1"),
        ({"score": pb.Score(batch=1, ledger=bytes(MAX_LEDGER_BYTES + 1))}, "a ledger of at most"),
        ({"score": pb.Score(batch=1, ledger=b"x", trainable=[2, 1])}, "in rising order"),
        ({"score": pb.Score(batch=1, trainable=[1])}, "beside a ledger alone"),
        ({"down": [pb.Blob(role="local")]}, "roles of global, saved"),
        ({"settings": b"{}"}, "the fields of the verb SCORE; got settings"),
        ({"seed": 1}, "the fields of the verb SCORE; got seed"),
        ({"plan": pb.Plan(rank=4)}, "a plan that names a client, and nothing else"),
    ],
)
def test_a_request_that_no_server_makes_is_refused(change: dict[str, object], match: str) -> None:
    message = parse(pb.Assignment(), encode_score_request(replace(REQUEST, blobs={})).header)
    message.MergeFrom(pb.Assignment(**change))  # type: ignore[arg-type]
    if "score" in change:
        message.score.CopyFrom(change["score"])  # type: ignore[arg-type]
    with pytest.raises(WireError, match=match):
        decode_score_request(message.SerializeToString(), {})


def test_scores_come_back_to_the_last_bit_and_have_one_encoding() -> None:
    exact = replace(SCORES, metrics={"loss": math.pi, "examples": 3.0, "accuracy": 1 / 3})
    assert decode_scores(encode_scores(exact), client="ann") == exact
    turned = replace(exact, metrics=dict(sorted(exact.metrics.items(), reverse=True)))
    assert encode_scores(turned) == encode_scores(exact)


def test_scores_of_another_client_or_shape_are_refused() -> None:
    with pytest.raises(WireError, match="scores of 'bob'"):
        decode_scores(encode_scores(SCORES), client="bob")
    with pytest.raises(WireError, match="a time of at least 0 s"):
        decode_scores(encode_scores(replace(SCORES, seconds=math.nan)), client="ann")
    with pytest.raises(WireError, match="at most 32 metrics"):
        decode_scores(encode_scores(replace(SCORES, metrics={str(n): 0.0 for n in range(33)})), client="ann")
    with pytest.raises(WireError, match="scores of at most"):
        decode_scores(b"\0" * 20_000, client="ann")
    with pytest.raises(WireError, match="ScoreUpdate"):
        decode_scores(b"\xff", client="ann")


OWN = PersonalRequest(Personal("finetune", steps=3).in_full(), Training(steps=3, epochs=None), 2.0, "b", seed=5)


@pytest.mark.parametrize("own", [OWN, PersonalRequest(Personal("ditto").in_full())])
def test_a_request_says_which_model_of_its_own_a_client_scores(own: PersonalRequest) -> None:
    request = replace(REQUEST, blobs={}, personal=own)
    assert decode_score_request(encode_score_request(request).header, {}) == request


def test_a_training_before_a_score_is_of_finetune_alone() -> None:
    def decoded(request: ScoreRequest, **score: object) -> object:
        message = parse(pb.Assignment(), encode_score_request(replace(request, blobs={})).header)
        message.score.MergeFrom(pb.Score(**score))  # type: ignore[arg-type]
        return decode_score_request(message.SerializeToString(), {})

    with pytest.raises(WireError, match="no training without a personal model"):
        decoded(REQUEST, scale=1.0)
    with pytest.raises(WireError, match="finetune alone"):
        decoded(replace(REQUEST, personal=PersonalRequest(Personal("ditto"))), seed=1)
    with pytest.raises(WireError, match="finetune alone"):
        decoded(replace(REQUEST, personal=PersonalRequest(Personal("finetune"))))
    with pytest.raises(WireError, match="a scale above 0"):
        decoded(replace(REQUEST, personal=replace(OWN, scale=-1.0)))
    with pytest.raises(WireError, match="a learning rate and steps"):
        decoded(replace(REQUEST, personal=replace(OWN, training=Training(steps=None))))


def test_scores_of_both_models_come_back() -> None:
    scores = replace(SCORES, personal={"examples": 2.0, "loss": 2.25})
    assert decode_scores(encode_scores(scores), client="ann") == scores
