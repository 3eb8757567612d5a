"""A site's own scores, held against those of a simulation over the same rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedtune import Run
from fedtune.client.scoring import score
from fedtune.client.site import Site
from fedtune.config import bind
from fedtune.errors import ClientError
from fedtune.lora.adapter import pack
from fedtune.messages import Assignment, Plan, ScoreRequest, Training, TrainLora
from fedtune.methods.method import GlobalModel
from fedtune.runs.local import Experiment, prepare
from fedtune.runs.local import score as simulated_score
from fedtune.store import result
from fedtune.wire.scores import decode_score_request, encode_score_request


def experiment_of(run: Path) -> tuple[Experiment, GlobalModel]:
    return prepare(bind(run / "recipe.toml")), result.read(run)[0]


def request_for(experiment: Experiment, tuned: GlobalModel, name: str) -> ScoreRequest:
    seeds, settings = tuned.seeds, experiment.recipe.evaluate
    request = ScoreRequest(
        name,
        experiment.recipe.method.name,
        1,
        experiment.base.digest,
        batch=settings.batch,
        examples=settings.client_examples or 0,
        blobs={"global": pack(tuned.adapter)} if tuned.adapter else {},
        ledger=seeds.ledger.encode() if seeds else b"",
        trainable=tuple(seeds.trainable) if seeds else (),
    )
    encoded = encode_score_request(request)
    return decode_score_request(encoded.header, encoded.blobs)


def check_equal(run: Run) -> None:
    experiment, tuned = experiment_of(run.path)
    expected = simulated_score(experiment, tuned, test=False, clients=True).held_out
    before = simulated_score(experiment, GlobalModel(), test=False, clients=True).held_out
    assert expected != before
    for name, shard in experiment.federation.clients.items():
        request = request_for(experiment, tuned, name)
        assert score(experiment.base, shard.held_out, request, threads=1).metrics == expected[name]
        bare = replace(request, blobs={}, ledger=b"", trainable=())
        assert score(experiment.base, shard.held_out, bare, threads=1).metrics == before[name]


def test_a_site_scores_an_adapter_as_a_simulation_does_to_the_last_bit(ran: Run) -> None:
    check_equal(ran)


def test_a_site_scores_a_model_rebuilt_from_seeds_as_a_simulation_does(seeded: Run) -> None:
    check_equal(seeded)


def test_what_cannot_be_scored_is_refused_with_the_reason(ran: Run) -> None:
    experiment, tuned = experiment_of(ran.path)
    name, shard = next(iter(experiment.federation.clients.items()))
    request = request_for(experiment, tuned, name)
    with pytest.raises(ClientError, match=r"expected base 777.*load the same model"):
        score(experiment.base, shard.held_out, replace(request, base="77" * 32), threads=1)
    with pytest.raises(ClientError, match=r"set data\.held_out above 0"):
        score(experiment.base, (), request, threads=1)
    site = Site(name, experiment.base, shard.train, (), 1, held_out=shard.held_out)
    assert site.score(request).metrics["examples"] >= 1
    assert site.profile().held_out == len(shard.held_out)
    with pytest.raises(ClientError, match="a request of its own"):
        site.score(replace(request, client="other"))
    refusing = replace(site, scores="refuse")
    assert refusing.profile().held_out == 0
    with pytest.raises(ClientError, match=r"policy\.scores refuses"):
        refusing.score(request)
    plan = Plan(name, rank=2, scale=2.0, training=Training(batch=1, learning_rate=0.1, steps=1))
    assignment = Assignment("flora", round=1, seed=0, plan=plan, task=TrainLora(a_key=0))
    for asked, losses in ((site, 2), (replace(site, scores="keep"), 2), (refusing, 0)):
        measured = asked.perform(assignment).measured
        assert measured.seconds > 0
        assert sum(loss is not None for loss in (measured.loss_before, measured.loss_after)) == losses


def test_seeds_of_another_base_or_tensor_are_refused(seeded: Run) -> None:
    experiment, tuned = experiment_of(seeded.path)
    name, shard = next(iter(experiment.federation.clients.items()))
    request = request_for(experiment, tuned, name)
    with pytest.raises(ClientError, match="expected ordinals below"):
        score(experiment.base, shard.held_out, replace(request, trainable=(10**6,)), threads=1)
    assert tuned.seeds is not None
    foreign = replace(tuned.seeds.ledger, manifest=b"\0" * 32).encode()
    with pytest.raises(ClientError, match="manifest"):
        score(experiment.base, shard.held_out, replace(request, ledger=foreign), threads=1)
