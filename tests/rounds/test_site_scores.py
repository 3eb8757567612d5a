from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import pytest

from fedtune.messages import ClientScores, Failure, Personal, PersonalRequest, ScoreRequest
from fedtune.rounds.record import Metrics
from fedtune.rounds.site_scores import admit_scores, ask_scores
from fedtune.rounds.transport import Answer, Reply, Rule, UnsolicitedReply
from fedtune.wire.codec import EncodedAssignment
from fedtune.wire.scores import encode_scores

GOOD = ClientScores("ann", 2, "ab", {"loss": 2.5, "perplexity": math.exp(2.5), "tokens": 40.0, "examples": 4.0})


def request(name: str) -> ScoreRequest:
    return ScoreRequest(name, "flora", 2, "ab", batch=1, examples=5)


@dataclass
class Scripted:
    """A transport whose answers are given."""

    answers: list[Answer]
    asked: list[str] = field(default_factory=list)

    def evaluate(self, orders: Mapping[str, EncodedAssignment], rule: Rule) -> Iterable[Answer]:
        self.asked += orders
        return self.answers


def outcome(**changes: float) -> Metrics | Failure:
    metrics = {**GOOD.metrics, **changes}
    return admit_scores(Reply("ann", encode_scores(replace(GOOD, metrics=metrics))), request("ann"), held_out=8)


def test_counts_are_whole_numbers_again() -> None:
    assert outcome() == {"loss": 2.5, "perplexity": math.exp(2.5), "tokens": 40, "examples": 4}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss": math.nan}, "loss: a finite number from 0 to 1e+12"),
        ({"loss": -0.1}, "loss: a finite number"),
        ({"loss": math.inf}, "loss: a finite number"),
        ({"perplexity": 0.5}, "perplexity: a finite number of at least 1"),
        ({"accuracy": 1.1}, "accuracy: a share from 0 to 1"),
        ({"examples": 6.0}, "scores of 1 to 5 rows; got 6.0"),
        ({"examples": 0.0}, "scores of 1 to 5 rows"),
        ({"examples": 2.5}, "examples: a count of at most 5"),
        ({"tokens": 1e9}, "tokens: a count of at most"),
        ({"tokens": math.nan}, "tokens: a count"),
        ({"profit": 1.0}, "not 'profit'"),
    ],
)
def test_scores_that_cannot_be_true_are_refused(changes: dict[str, float], reason: str) -> None:
    refused = outcome(**changes)
    assert isinstance(refused, Failure)
    assert (refused.kind, refused.code) == ("refused", "SCORES")
    assert reason in refused.reason


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (replace(GOOD, round=1), "after round 2; got 1"),
        (replace(GOOD, base="cd"), "the base ab"),
        (replace(GOOD, metrics={"accuracy": 1.0, "examples": 1.0}), "a loss; got none"),
        (replace(GOOD, client="bob"), "scores of 'ann'"),
    ],
)
def test_scores_of_something_else_are_refused(scores: ClientScores, reason: str) -> None:
    refused = admit_scores(Reply("ann", encode_scores(scores)), request("ann"), held_out=8)
    assert isinstance(refused, Failure)
    assert reason in refused.reason


def test_a_client_cannot_score_more_rows_than_it_holds_out() -> None:
    assert isinstance(admit_scores(Reply("ann", encode_scores(GOOD)), request("ann"), held_out=3), Failure)


def test_what_clients_say_is_sorted_by_name_and_who_says_nothing_is_named() -> None:
    notes = list[str]()
    answers: list[Answer] = [
        UnsolicitedReply("zoe", "late"),
        Reply("bob", encode_scores(replace(GOOD, client="bob"))),
        Reply("bob", encode_scores(replace(GOOD, client="bob", metrics={"loss": 9.0, "examples": 1.0}))),
        Failure.from_text("cyd", "declined, SCORES_NOT_ALLOWED: policy.scores: this site keeps its scores"),
        Reply("ann", encode_scores(GOOD)),
    ]
    transport = Scripted(answers)
    said = ask_scores(
        transport,
        {name: request(name) for name in ("dan", "cyd", "bob", "ann")},
        held_out=dict.fromkeys(("ann", "bob", "cyd", "dan"), 8),
        rule=Rule(quorum=1),
        note=notes.append,
    )
    assert transport.asked == ["ann", "bob", "cyd", "dan"]
    assert list(said.scores) == ["ann", "bob"]
    assert said.scores["bob"]["loss"] == 2.5  # the first answer counts
    assert [note.partition(":")[0] for note in notes] == ["cyd has no scores", "dan has no scores"]
    assert said.missing["dan"] == "no answer"
    assert said.unsolicited == answers[:1]
    assert said.traffic["ann"].up == len(encode_scores(GOOD))
    assert said.traffic["dan"].up == 0 < said.traffic["dan"].down


def own_request(name: str) -> ScoreRequest:
    return replace(request(name), personal=PersonalRequest(Personal("ditto")))


def test_scores_of_a_client_s_own_model_stand_beside_the_global_one_s() -> None:
    scores = replace(GOOD, personal={**GOOD.metrics, "loss": 2.0})
    transport = Scripted([Reply("ann", encode_scores(scores))])
    said = ask_scores(transport, {"ann": own_request("ann")}, held_out={"ann": 8}, rule=Rule(1))
    assert (said.scores["ann"]["loss"], said.personal["ann"]["loss"]) == (2.5, 2.0)
    assert said.personal["ann"]["examples"] == 4


@pytest.mark.parametrize(
    ("own", "asked", "reason"),
    [
        ({}, True, "the scores of its own model on the same 4 rows"),
        ({**GOOD.metrics, "examples": 3.0}, True, "the scores of its own model on the same 4 rows"),
        ({**GOOD.metrics, "loss": math.nan}, True, "of its own model loss: a finite number"),
        ({**GOOD.metrics, "profit": 1.0}, True, "not 'profit'"),
        (GOOD.metrics, False, "no scores of a model of its own"),
    ],
)
def test_scores_of_an_own_model_that_cannot_be_true_cost_the_client_both(
    own: dict[str, float], asked: bool, reason: str
) -> None:
    transport = Scripted([Reply("ann", encode_scores(replace(GOOD, personal=own)))])
    requests = {"ann": own_request("ann") if asked else request("ann")}
    said = ask_scores(transport, requests, held_out={"ann": 8}, rule=Rule(1))
    assert (said.scores, said.personal) == ({}, {})
    assert reason in said.missing["ann"]
