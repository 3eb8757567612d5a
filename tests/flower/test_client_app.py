from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from flwr.app import Context, Message, MessageType, RecordDict, UserConfig

from fedtune.client.site import simulated_site
from fedtune.config import bind, render
from fedtune.deployment.server_setup import score_at_sites
from fedtune.errors import ClientError
from fedtune.flower.client_app import Scalar, Site, client_app
from fedtune.flower.grid_transport import HELLO
from fedtune.flower.records import ERROR, HEADER, TENSORS
from fedtune.messages import Assignment, ClientScores, ClientUpdate, ScoreRequest
from fedtune.methods import METHODS
from fedtune.methods.method import GlobalModel
from fedtune.rounds.context import RoundContext
from fedtune.rounds.loop import run
from fedtune.rounds.scores import pooled_scores
from fedtune.rounds.transport import Transport
from fedtune.runs.context import ModelScores
from fedtune.runs.local import Experiment, prepare, score, transport
from fedtune.wire.profile import ClientProfile, decode_profile
from fedtune.wire.scores import encode_score_request
from tests.flower.conftest import NODE, Clock, MemoryGrid, orders, over, profile, running

METHODS_TESTED: Mapping[str, Mapping[str, Any]] = {
    "flora": {"name": "flora", "mode": "continue", "wire_dtype": "int8"},
    "flexlora": {"name": "flexlora"},
    "zeropad": {"name": "zeropad", "wire_dtype": "int4", "down_dtype": "int8"},
}


class Failing:
    def profile(self) -> ClientProfile:
        return profile("ann")

    def perform(self, assignment: Assignment) -> ClientUpdate:
        raise ClientError("ann: loss is nan")

    def with_labels(self, labels: Sequence[str]) -> Failing:
        return self

    def score(self, request: ScoreRequest) -> ClientScores:
        raise ClientError("ann: expected rows that are held out; got none")


def sent(message_type: str, content: RecordDict) -> Message:
    return Message(content, 7, message_type)


def context(**node_config: Any) -> Context:
    return Context(run_id=1, node_id=7, node_config=node_config, state=RecordDict(), run_config=UserConfig())


def test_a_hello_tells_the_profile() -> None:
    reply = client_app(lambda node_config, run_config: Failing())(sent(HELLO, RecordDict()), context())
    header = reply.content.config_records[HEADER]["proto"]
    assert isinstance(header, bytes)
    blobs = {key: array.data for key, array in reply.content.array_records[TENSORS].items()}
    assert decode_profile(header, blobs).client == "ann"


def test_a_clients_error_is_an_error_reply_with_its_text_alone() -> None:
    from fedtune.flower.records import pack

    (order,) = orders("ann").values()
    reply = client_app(lambda node_config, run_config: Failing())(
        sent(MessageType.TRAIN, pack(order.header, order.blobs)), context()
    )
    assert (reply.error.code, reply.error.reason) == (ERROR, "ann: loss is nan")


class Scorer(Failing):
    def score(self, request: ScoreRequest) -> ClientScores:
        raise ValueError("patient 4711")


@pytest.mark.parametrize("simulated", [False, True])
def test_an_error_of_scoring_is_the_clients_as_one_of_training_is(
    simulated: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedtune.flower.records import pack

    monkeypatch.setattr("fedtune.flower.shim.in_simulation", lambda: simulated)
    request = encode_score_request(ScoreRequest("ann", "flora", 0, "", batch=1))
    message = sent(MessageType.EVALUATE, pack(request.header, request.blobs))
    reply = client_app(lambda node_config, run_config: Scorer())(message, context())
    reason = str(reply.error.reason)
    assert reason.startswith("ann: expected an update; got ValueError")
    assert ("patient 4711" in reason) is simulated
    assert ("patient 4711" in capsys.readouterr().err) is not simulated


def test_what_an_unforeseen_error_says_stays_at_the_site(capsys: pytest.CaptureFixture[str]) -> None:
    def site_of(node_config: Mapping[str, Scalar], run_config: Mapping[str, Scalar]) -> Site:
        raise KeyError("patient 4711")

    reply = client_app(site_of)(sent(HELLO, RecordDict()), context())
    assert reply.error.reason == "expected an answer; got KeyError; this client's own log says where"
    assert "patient 4711" in capsys.readouterr().err


def test_an_unforeseen_error_of_a_simulated_client_reaches_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    def site_of(node_config: Mapping[str, Scalar], run_config: Mapping[str, Scalar]) -> Site:
        raise KeyError("which line")

    monkeypatch.setattr("fedtune.flower.shim.in_simulation", lambda: True)
    with pytest.raises(RuntimeError, match="KeyError: 'which line'"):
        client_app(site_of)(sent(HELLO, RecordDict()), context())


def test_an_order_that_cannot_be_read_is_an_error_reply() -> None:
    reply = client_app(lambda node_config, run_config: Failing())(sent(MessageType.TRAIN, RecordDict()), context())
    assert reply.error.code == ERROR
    assert "expected a ConfigRecord" in str(reply.error.reason)


def test_a_site_is_chosen_by_the_context() -> None:
    def site_of(node_config: Mapping[str, Scalar], run_config: Mapping[str, Scalar]) -> Site:
        raise ClientError(f"no site {node_config['place']}")

    reply = client_app(site_of)(sent(HELLO, RecordDict()), context(place=3))
    assert reply.error.reason == "no site 3"


def digests(experiment: Experiment, engine: Transport) -> list[str]:
    recipe = experiment.recipe
    results = run(
        RoundContext(
            method=METHODS[recipe.method.name],
            settings=recipe.method,
            planner=experiment.planner,
            transport=engine,
            schedule=recipe.rounds,
            blueprint=experiment.blueprint,
            base=experiment.base.digest,
        )
    )
    return [result.digest for result in results]


@pytest.mark.parametrize("method", METHODS_TESTED)
def test_rounds_over_a_grid_are_those_in_process_bit_for_bit(method: str, tables: dict[str, Any], clock: Clock) -> None:
    recipe = bind({**tables, "method": METHODS_TESTED[method], "rounds": {"count": 3}})
    experiment = prepare(recipe)
    with transport(experiment) as engine:
        expected = digests(experiment, engine)
    text = render(recipe)
    app = client_app(partial(simulated_site, text))
    # Nodes under descending ids, replies in reverse: names alone must decide.
    grid = MemoryGrid({NODE - i: running(app, node_config={"partition-id": i}) for i in range(3)})
    grid.order = lambda replies: replies[::-1]
    assert digests(experiment, over(grid, clock, expected=3)) == expected
    assert len(set(expected)) == 3


def test_scores_over_a_grid_are_those_in_process_bit_for_bit(tables: dict[str, Any], clock: Clock) -> None:
    experiment = prepare(bind(tables))
    expected = score(experiment, GlobalModel(), test=False, clients=True).held_out
    app = client_app(partial(simulated_site, render(experiment.recipe)))
    connected = over(
        MemoryGrid({NODE - i: running(app, node_config={"partition-id": i}) for i in range(3)}), clock, expected=3
    )
    connected.clients()
    said = score_at_sites(
        experiment.recipe,
        connected,
        GlobalModel(),
        base=experiment.base.digest,
        note=pytest.fail,
        round=0,
        test=True,
        clients=True,
    )
    assert said.held_out == expected
    assert said.test == pooled_scores(expected)
    assert said.traffic.up > 0
    silent = replace(experiment.recipe, evaluate=replace(experiment.recipe.evaluate, clients=False))
    options: Any = {"base": experiment.base.digest, "note": pytest.fail, "round": 1, "clients": True}
    assert score_at_sites(silent, connected, GlobalModel(), test=True, **options) == ModelScores()


def test_a_client_that_fails_over_a_grid_is_as_one_that_fails_in_process(tables: dict[str, Any], clock: Clock) -> None:
    recipe = bind({**tables, "rounds": {"count": 2}})
    experiment, text = prepare(recipe), render(recipe)

    def broken(received: Assignment) -> ClientUpdate:
        raise ClientError("client-1: loss is nan")

    with transport(experiment) as engine:
        expected = digests(experiment, type(engine)(engine.fleet, {**engine.work, "client-1": broken}))  # type: ignore[call-arg, attr-defined]

    def site_of(node_config: Mapping[str, Scalar], run_config: Mapping[str, Scalar]) -> Site:
        site = simulated_site(text, node_config, run_config)
        return Breaking(site) if site.client == "client-1" else site

    app = client_app(site_of)
    grid = MemoryGrid({NODE + i: running(app, node_config={"partition-id": i}) for i in range(3)})
    assert digests(experiment, over(grid, clock, expected=3)) == expected


class Breaking:
    def __init__(self, site: Site) -> None:
        self.profile = site.profile

    def perform(self, assignment: Assignment) -> ClientUpdate:
        raise ClientError("client-1: loss is nan")

    def with_labels(self, labels: Sequence[str]) -> Breaking:
        return self

    def score(self, request: ScoreRequest) -> ClientScores:
        raise ClientError("client-1: expected rows that are held out; got none")
