"""A run whose first round makes the head: the same bits on every engine and after a kill, and no veto of its orders."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from transformers import AutoTokenizer

from fedtune import api
from fedtune.client import perform as performing
from fedtune.client import site
from fedtune.config import bind, render
from fedtune.config.consent import order_differences, permission_texts
from fedtune.errors import ConfigError, RoundError, StoreError
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Client,
    ClientUpdate,
    Failure,
    ProbeSeeds,
    SumClasses,
    TrainLora,
)
from fedtune.methods.method import GlobalModel
from fedtune.rounds.loop import RoundResult
from fedtune.rounds.transport import Answer, Rule
from fedtune.runs import export as exporting
from fedtune.runs import local
from fedtune.runs.local import Experiment, prepare, run_context
from fedtune.runs.runner import run_rounds_of
from fedtune.simulation.inprocess import InProcess
from fedtune.store import seeds as stored_seeds
from fedtune.wire.codec import EncodedAssignment, decode_assignment, decode_outline, encode_assignment
from tests.cli.test_flower_server import toml
from tests.config.test_consent import profiles
from tests.link.federation import federation
from tests.model.families import CLASSIFIERS, build
from tests.runs.conftest import read_lines, same_ends
from tests.test_engines import Engine, chosen, in_memory_grid

Tables = dict[str, Any]

WORDS = {"bad": ["awful", "poor", "sad"], "good": ["great", "fine", "lovely"]}


@pytest.fixture(scope="module")
def base(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    return build("bert", CLASSIFIERS["bert"], tmp_path_factory.mktemp("bert"), tokenizer)


@pytest.fixture
def tables(base: Path, tmp_path: Path) -> Tables:
    rng = random.Random(1)
    rows = [
        {"text": " ".join(rng.choice(WORDS[label]) for _ in range(4)), "label": label} for label in ("bad", "good") * 24
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "head",
        "model": {"base": str(base), "task": "classification", "pooling": "mean", "device": "cpu"},
        "adapter": {"rank": 2, "targets": ["query"], "head": "lda"},
        "method": {"name": "fedit"},
        "client": {"steps": 2, "batch": 4, "learning_rate": 1e-3},
        "rounds": {"count": 3, "cohort": 2},
        "data": {"source": str(tmp_path / "rows.jsonl"), "split": {"kind": "iid", "clients": 3}, "held_out": 0.2},
        "evaluate": {"examples": 8, "clients": False},
    }


METHODS: Mapping[str, Tables] = {
    "fedit": {"name": "fedit"},
    "hadamard": {"name": "fedkseed", "bank": "hadamard", "seeds": 64},
    "kron": {"name": "fedkseed", "bank": "kron", "seeds": 64, "embeddings": True, "vectors": True},
}


def with_method(tables: Tables, method: str) -> Tables:
    """The recipe with another method; seeds measure in their second round how large their step is."""
    own = METHODS[method]
    adapter = tables["adapter"] if own["name"] == "fedit" else {"head": "lda"}
    rounds = {**tables["rounds"], "count": 3 if own["name"] == "fedit" else 4}
    return {**tables, "adapter": adapter, "method": own, "rounds": rounds}


def rounds(prepared: Experiment, engine: Engine) -> list[RoundResult]:
    with engine(prepared) as started:
        return list(run_rounds_of(run_context(prepared), started))


def lying(prepared: Experiment, lie: Callable[[ClientUpdate], ClientUpdate]) -> list[RoundResult]:
    """Run with a first client whose answers in round 1 are others."""
    honest, name = local.in_process(prepared), min(prepared.fleet)

    def work(assignment: Assignment) -> ClientUpdate:
        update = honest.work[name](assignment)
        return lie(update) if assignment.round == 1 else update

    clients = [Client(name, count) for name, count in prepared.fleet.items()]
    return list(run_rounds_of(run_context(prepared), InProcess(clients, {**honest.work, name: work})))


def test_the_first_round_asks_every_client_and_the_next_ones_train_from_the_head(tables: Tables) -> None:
    prepared = prepare(bind(tables))
    first, second, _ = rounds(prepared, chosen("inprocess", 1))
    assert len(first.outcomes) == 3  # though a cohort has two
    assert len(second.outcomes) == 2
    assert {type(order.task) for order in first.assignments.values()} == {SumClasses}
    assert {type(order.task) for order in second.assignments.values()} == {TrainLora}
    weight = first.state.saved["classifier.weight"]
    assert not np.array_equal(weight, prepared.blueprint.saved["classifier.weight"])
    np.testing.assert_allclose(weight[0], -weight[1], rtol=0.3)  # classes of about one size
    assert not first.norms["client-0"]  # it has moved nothing


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(in_memory_grid, id="grid"),
        pytest.param(chosen("processes", 2), id="processes", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("method", ["fedit", "hadamard", pytest.param("kron", marks=pytest.mark.slow)])
def test_every_engine_comes_to_the_same_bits(method: str, engine: Engine, tables: Tables) -> None:
    prepared = prepare(bind(with_method(tables, method)))
    digests = [[result.digest for result in rounds(prepared, one)] for one in (chosen("inprocess", 1), engine)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("method", ["hadamard", pytest.param("kron", marks=pytest.mark.slow)])
def test_seeds_move_the_base_with_its_new_head(method: str, tables: Tables, tmp_path: Path) -> None:
    tables = with_method(tables, method)
    run = api.simulate(tables, out=tmp_path / "run")
    lines = read_lines(run.path)
    assert lines[1]["test"]["loss"] < lines[0]["test"]["loss"]
    assert lines[2]["test"] == lines[1]["test"]  # that round measures, and moves nothing
    assert lines[3]["test"] != lines[2]["test"]
    seeds, _ = stored_seeds.read(run.path / "seeds")
    prepared = prepare(bind(tables))
    assert seeds.ledger.manifest == seeds.manifest.digest != prepared.base.manifest.digest
    assert sorted(seeds.head) == ["classifier.bias", "classifier.weight"]
    # What is exported and what another machine rebuilds are the same weights, and score the same.
    merged = exporting.export(run.path, form="merged")
    weights = safetensors.numpy.load_file(merged / "model.safetensors")
    assert not np.array_equal(weights["classifier.weight"], prepared.blueprint.saved["classifier.weight"])
    again = exporting.replay(tables["model"]["base"], run.path / "seeds", out=tmp_path / "again")
    rebuilt = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    assert all(np.array_equal(weights[name], rebuilt[name]) for name in weights)
    assert again.base == seeds.manifest.digest.hex()
    scored = prepare(bind({**tables, "model": {**tables["model"], "base": str(merged), "pooling": "auto"}}))
    loss = local.score(scored, GlobalModel(), test=True, clients=False).test
    assert loss is not None
    assert loss["loss"] == pytest.approx(lines[-1]["test"]["loss"], rel=1e-5)
    (run.path / "seeds" / "head.safetensors").write_bytes(b"torn")
    with pytest.raises(StoreError):
        stored_seeds.read(run.path / "seeds")


def test_a_client_that_has_not_seen_the_head_gets_it_with_the_whole_state(tables: Tables) -> None:
    prepared = prepare(bind(with_method({**tables, "rounds": {"count": 3}}, "hadamard")))
    seen = dict[tuple[int, str], list[str]]()

    class Watched(InProcess):
        def exchange(self, assignments: Mapping[str, EncodedAssignment], rule: Rule) -> Iterator[Answer]:
            for name, sent in assignments.items():
                order = decode_assignment(sent.header, sent.blobs)
                if isinstance(order.task, ProbeSeeds):
                    kind = f"{order.task.state.form} {'with' if order.task.head else 'without'}"
                    seen.setdefault((order.round, name), []).append(kind)
            return super().exchange(assignments, rule)

    def forget(name: str, order: Assignment) -> ClientUpdate:
        """Answer as a client whose process has been started anew."""
        shard = prepared.federation.clients[name]
        return performing.perform(prepared.base, shard.train, order, threads=1, held_out=shard.held_out)

    whole, honest = rounds(prepared, chosen("inprocess", 1)), local.in_process(prepared)
    forgetful = {name: partial(forget, name) if name == "client-0" else work for name, work in honest.work.items()}
    results = list(run_rounds_of(run_context(prepared), Watched(honest.fleet, forgetful)))
    assert [result.digest for result in results] == [result.digest for result in whole]
    assert all(kinds[0].endswith("with") for (number, _), kinds in seen.items() if number == 2)
    later = {name: kinds for (number, name), kinds in seen.items() if number == 4}
    assert later["client-1"] == ["changed without"]
    assert later["client-0"] == ["changed without", later["client-0"][1]]
    assert later["client-0"][1].endswith(" with")
    assert performing_base_is_whole(prepared)


def performing_base_is_whole(prepared: Experiment) -> bool:
    """Whether the base still has its own head, which other runs on it start from."""
    own = prepared.blueprint.saved["classifier.weight"]
    return bool(np.array_equal(prepared.base.saved_tensors()["classifier.weight"], own))


@pytest.mark.guarantee("G12")
def test_a_run_that_is_killed_in_the_heads_round_goes_on_to_the_same_bits(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = api.simulate(tables, out=tmp_path / "whole")
    asked, killed = list[str](), tmp_path / "killed"

    def perform(base: Any, examples: Any, order: Assignment, **options: Any) -> ClientUpdate:
        asked.append(f"{order.round} {order.plan.client}")
        if len(asked) == 2:
            raise KeyboardInterrupt
        return performing.perform(base, examples, order, **options)

    with monkeypatch.context() as patch:
        patch.setattr(local, "perform", perform)
        with suppress(KeyboardInterrupt):
            api.simulate(tables, out=killed)
        api.simulate(resume=killed)
    assert asked[:4] == ["1 client-0", "1 client-1", "1 client-1", "1 client-2"]
    assert same_ends(whole.path, killed)
    assert read_lines(killed)[1]["test"]["loss"] < read_lines(killed)[0]["test"]["loss"]


def test_the_head_of_an_order_is_held_against_the_recipe(tables: Tables) -> None:
    prepared = prepare(bind(with_method(tables, "hadamard")))
    recipe, profile = prepared.recipe, profiles(prepared)["client-0"]
    second = next(
        order
        for result in rounds(prepared, chosen("inprocess", 1))[1:]
        for name, order in result.assignments.items()
        if name == "client-0"
    )
    probe = second.probe
    good = {name: np.zeros_like(array) for name, array in prepared.blueprint.saved.items()}

    def vetoes(head: Mapping[str, Any]) -> str:
        order = replace(second, task=replace(probe, head=head))
        return "; ".join(map(str, order_differences(recipe, profile, decode_outline(encode_assignment(order).header))))

    assert not vetoes(good)
    assert "head" in vetoes({"classifier.weight": np.zeros((3, 3), np.float32)})
    assert "head" in vetoes({"bert.embeddings.word_embeddings.weight": np.zeros((3, 3), np.float32)})
    drawn = replace(recipe, adapter=replace(recipe.adapter, head="drawn"))
    order = replace(second, task=replace(probe, head=good))
    differing = order_differences(drawn, profile, decode_outline(encode_assignment(order).header))
    assert "none, by adapter.head" in " ".join(map(str, differing))


def test_no_order_of_the_run_is_vetoed_and_sums_in_another_round_are(tables: Tables) -> None:
    prepared = prepare(bind(tables))
    site_of, recipe = profiles(prepared), prepared.recipe
    seen = [
        (order, order_differences(recipe, site_of[name], decode_outline(encode_assignment(order).header)))
        for result in rounds(prepared, chosen("inprocess", 1))
        for name, order in with_blobs(prepared, result).items()
    ]
    assert len(seen) == 7
    assert [differing for _, differing in seen] == [[]] * 7
    [first] = [order for order, _ in seen if order.round == 1 and order.plan.client == "client-0"]
    later = decode_outline(encode_assignment(replace(first, round=2)).header)
    assert "TrainLora; got SumClasses" in " ".join(map(str, order_differences(recipe, site_of["client-0"], later)))
    finer = replace(first, task=SumClasses(first.sums.fraction_bits + 1))
    assert "fraction_bits" in str(order_differences(recipe, site_of["client-0"], finer)[0])
    drawn = replace(recipe, adapter=replace(recipe.adapter, head="drawn"))
    assert "TrainLora; got SumClasses" in " ".join(map(str, order_differences(drawn, site_of["client-0"], first)))
    assert "sums of their features" in permission_texts(recipe, "client-0")["head"]
    assert "head" not in permission_texts(drawn, "client-0")


def with_blobs(prepared: Experiment, result: RoundResult) -> Mapping[str, Assignment]:
    """The orders of a round as they were sent: those of a result have no tensors."""
    saved = prepared.blueprint.saved
    return {
        name: replace(order, task=replace(order.task, blobs={"saved": saved}))
        if isinstance(order.task, TrainLora)
        else order
        for name, order in result.assignments.items()
    }


@pytest.mark.guarantee("G3")
def test_a_liar_is_refused_alone_and_the_head_is_that_of_the_others(tables: Tables) -> None:
    prepared = prepare(bind(tables))

    def smaller(update: ClientUpdate) -> ClientUpdate:
        sums = update.class_sums
        return replace(update, result=replace(sums, squares=sums.squares // 4))

    def louder(update: ClientUpdate) -> ClientUpdate:
        sums = update.class_sums
        return replace(update, result=replace(sums, sums=10 * sums.sums, squares=100 * sums.squares))

    for lie, code in ((smaller, "SCALAR_RANGE"), (louder, "NORM_OVER_CAP")):
        first = lying(prepared, lie)[0]
        refused = first.outcomes["client-0"]
        assert isinstance(refused, Failure)
        assert refused.code == code
        others = [name for name, outcome in first.outcomes.items() if isinstance(outcome, AdmittedUpdate)]
        assert others == ["client-1", "client-2"]
        weight = first.state.saved["classifier.weight"]
        assert np.abs(weight).max() < 100


def test_a_class_without_an_example_ends_the_run_before_training(tables: Tables) -> None:
    prepared = prepare(bind({**tables, "data": {**tables["data"], "labels": ["bad", "good", "fair"]}}))
    with pytest.raises(RoundError, match="none of class 'fair' at any client") as caught:
        rounds(prepared, chosen("inprocess", 1))
    assert caught.value.final


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": {"base": "embedded"}}, "adapter.head: expected drawn without classes; got 'lda'"),
        ({"rounds": {"count": 1}}, "rounds.count: expected at least 2 with adapter.head = 'lda'"),
        ({"adapter": {"head": "lda", "start": "here"}}, "adapter.head: expected drawn with adapter.start"),
    ],
)
def test_a_head_that_cannot_be_made_is_refused_by_name(changes: Tables, what: str, tables: Tables) -> None:
    with pytest.raises(ConfigError, match=what):
        bind({**tables, **changes})


def test_a_recipe_without_a_head_keeps_its_text(tables: Tables) -> None:
    adapter = {key: value for key, value in tables["adapter"].items() if key != "head"}
    assert "head" not in render(bind({**tables, "adapter": adapter})).partition("[adapter]")[2].partition("[")[0]
    assert 'head = "lda"' in render(bind(tables))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedit", "hadamard"])
def test_sites_over_grpc_come_to_the_state_of_the_simulated_run(method: str, tables: Tables, tmp_path: Path) -> None:
    tables, names = with_method(tables, method), ("0", "1")
    source = Path(tables["data"]["source"])
    lines = source.read_text().splitlines()
    # By pairs, so that each site has both classes.
    rows = [json.loads(line) | {"site": str(number // 2 % 2)} for number, line in enumerate(lines)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {**tables["data"], "split": {"kind": "key", "by": "site", "clients": 2}, "labels": ["bad", "good"]}
    rounds = {"count": tables["rounds"]["count"], "min_clients": 2}
    tables = {**tables, "data": data, "rounds": rounds, "evaluate": {"examples": 2}}
    text = toml(tables)
    own = toml({"model": tables["model"], "adapter": {"targets": ["query"]}, "data": data})
    with federation(tmp_path, text, names, site=dict.fromkeys(names, own)) as fed:
        fed.serve()
        for name in names:
            fed.join(name)
        simulated = api.simulate(bind(text), out=tmp_path / "simulated")
        assert fed.exit_statuses("server", *names) == [0] * 3, fed.log("server")
        summary = json.loads((fed.run / "summary.json").read_text())
        assert summary["state_digest"] == simulated.summary["state_digest"]
        assert summary["after"]["held_out"] == simulated.summary["after"]["held_out"]


def test_a_site_hears_of_the_sums_by_its_own_policy(tables: Tables) -> None:
    prepared = prepare(bind(tables))
    [order] = [
        order for name, order in rounds(prepared, chosen("inprocess", 1))[0].assignments.items() if name == "client-0"
    ]
    shard = prepared.federation.clients["client-0"]
    own = partial(site.Site, "client-0", prepared.base, shard.train, (), 1)
    assert own().perform(order).class_sums.examples == len(shard.train)
    few = replace(site.OPEN, min_examples=len(shard.train) + 1)
    with pytest.raises(Exception, match=r"policy.min_examples"):
        own(policy=few).perform(order)
    # No step is taken, so no number of steps is too small.
    assert own(policy=replace(site.OPEN, min_steps=50)).perform(order).class_sums.examples == len(shard.train)
