"""Whole runs over the gRPC link, with the real processes: the bits of the simulated run, also after kills."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune import api
from fedtune.config import bind
from fedtune.link.client import outbox
from fedtune.link.provenance import load_roster, verify_folder
from fedtune.rounds.loop import RoundResult
from fedtune.rounds.scores import pooled_scores
from fedtune.store.history import replay_journal
from fedtune.store.round_records import read_rounds
from fedtune.store.training_record import check_journal
from tests.cli.test_flower_server import toml
from tests.link.federation import Federation, federation
from tests.link.scripted import EXAMPLES, MODEL, scripted_update

CLIENTS = ("0", "1", "2", "3")
METHODS: Mapping[str, Mapping[str, Any]] = {
    "flora": {
        "adapter": {"rank": 4, "alpha": "2r", "targets": ["q_proj", "up_proj"]},
        "method": {"name": "flora"},
        "client": {"steps": 2, "batch": 2, "learning_rate": 5e-3},
    },
    "fedspine": {
        "adapter": {"rank": 4, "alpha": "2r", "targets": ["q_proj", "up_proj"]},
        "method": {"name": "fedspine"},
        "pruning": {"target": 0.5, "batches": 2},
        # The choices of `deadline` follow from times that were measured, and differ from run to run.
        "planner": {"name": "random", "ratios": [0.0, 0.25, 0.5], "ranks": [2, 4]},
        "client": {"steps": 2, "batch": 2, "learning_rate": 5e-3},
    },
    "fedkseed": {
        "method": {"name": "fedkseed", "seeds": 64},
        "client": {"steps": 4, "batch": 2, "learning_rate": 2e-4},
    },
    # Virtual tokens in place of factors; their encoder is drawn alike at every site.
    "p-tuning": {
        "adapter": {"kind": "p-tuning", "tokens": 6, "send": "encoder", "hidden": 16},
        "method": {"name": "fedit"},
        "client": {"steps": 2, "batch": 2, "learning_rate": 5e-3},
    },
    # A second model stays at every site.
    "ditto": {
        "adapter": {"rank": 4, "alpha": "2r", "targets": ["q_proj", "up_proj"]},
        "method": {"name": "fedit"},
        "personal": {"kind": "ditto", "strength": 0.5, "steps": 3},
        "client": {"steps": 2, "batch": 2, "learning_rate": 5e-3},
    },
    # B stays at every site, and comes in no message.
    "share-a": {
        "adapter": {"rank": 4, "alpha": "2r", "targets": ["q_proj", "up_proj"]},
        "method": {"name": "fedit"},
        "personal": {"kind": "share-a"},
        "client": {"steps": 2, "batch": 2, "learning_rate": 5e-3},
    },
    # Some clients descend and one probes; the first round measures.
    "fedkseed both": {
        "method": {"name": "fedkseed", "seeds": 64, "verb": "auto", "groups": 2},
        "client": {"steps": 4, "batch": 2, "learning_rate": 2e-4},
        "descend": {"steps": 2},
    },
}


def dolly(shared: Path, stories: Path, method: str) -> dict[str, Any]:
    """Return the recipe of four clients of different ranks on rows of Dolly."""
    return {
        "name": "dolly",
        "model": {"base": str(stories), "threads": 1},
        **METHODS[method],
        "rounds": {"count": 3, "min_clients": 4},
        "data": {
            "source": str(shared / "data" / "dolly" / "small_train.jsonl"),
            "split": {"kind": "key", "by": "flora_client", "clients": 4},
            "template": "plain",
            "max_tokens": 96,
            "limit": 200,
        },
        "evaluate": {"examples": 2, "client_examples": 1},
    }


def at_a_site(tables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the table `adapter` of a site's file for a recipe."""
    adapter = tables.get("adapter", {})
    return adapter if "kind" in adapter else {"targets": ["q_proj", "up_proj"]}


def ranks(method: str, names: Sequence[str] = CLIENTS) -> str:
    """Return overrides that give every client a rank of its own, and to every other one the upper blocks alone.

    Where some descend along seeds, one of them probes.
    """
    if method == "fedkseed both":
        return f'\n[[override]]\nclients = ["{names[1]}"]\nverb = "probe"\n'
    if method != "flora":
        return ""
    upper = "top = 0.4\ndown_rank = 2\n"
    return "".join(
        f'\n[[override]]\nclients = ["{name}"]\nrank = {2**place}\n{upper * (place % 2)}'
        for place, name in enumerate(names)
    )


def own_states(run: Path) -> list[Any]:
    """Return the digests of personal states by round and client, of those that have any."""
    return [
        (line.round, name, client.personal)
        for line in read_rounds(run)
        for name, client in sorted(line.clients.items())
        if client.personal
    ]


@pytest.mark.parametrize(
    ("method", "sites"),
    [("flora", 2), *(pytest.param(method, 4, marks=pytest.mark.slow) for method in sorted(METHODS))],
)
def test_sites_over_grpc_come_to_the_state_of_the_simulated_run(
    shared: Path, stories: Path, tmp_path: Path, method: str, sites: int
) -> None:
    tables, names = dolly(shared, stories, method), CLIENTS[:sites]
    tables["rounds"]["min_clients"] = tables["data"]["split"]["clients"] = sites
    text = toml(tables) + ranks(method, names)
    own = toml({"model": tables["model"], "adapter": at_a_site(tables), "data": tables["data"]})
    with federation(tmp_path, text, names, site=dict.fromkeys(names, own)) as fed:
        fed.serve()
        for name in names:
            fed.join(name)
        simulated = fedtune.simulate(bind(text), out=tmp_path / "simulated")
        assert fed.exit_statuses("server", *names) == [0] * (sites + 1), fed.log("server")
        summary = json.loads((fed.run / "summary.json").read_text())
        assert summary["state"] == "finished"
        assert summary["state_digest"] == simulated.summary["state_digest"]
        for when in ("before", "after"):  # each site's scores of base and global model, to the last bit
            scores = summary[when]["held_out"]
            assert sorted(scores) == sorted(names)
            assert scores == simulated.summary[when]["held_out"]
            assert summary[when]["test"] == pooled_scores(scores)
        # Of what stays at the sites the scores, and the digests of what was stored, are those of the simulation.
        assert summary.get("personal") == simulated.summary.get("personal")
        assert own_states(fed.run) == own_states(tmp_path / "simulated")
        assert bool(own_states(fed.run)) == ("personal" in summary) == ("personal" in tables)
        assert [one["updates"] for one in fed.events("server", "committed")] == [sites] * 3
        for name in names:
            events = fed.events(name, "receipt")
            assert {one["verdict"] for one in events} == {"ACCEPTED", "NOTED"}
            assert not fed.events(name, "refused")
            (given,) = fed.events(name, "result")
            for file in (fed.run / "adapter").glob("adapter_*") if not method.startswith("fedkseed") else ():
                assert (Path(given["path"]) / file.name).read_bytes() == file.read_bytes()
            assert "unverified" not in given
            verified = verify_folder(Path(given["path"]), load_roster(fed.places[name] / "roster", None)[0])
            check_journal(fed.run, verified.predicate["training"])
            assert "clients" not in verified.predicate
        folder = "seeds" if method.startswith("fedkseed") else "adapter"
        roster = load_roster(fed.places["server"] / "roster", None)[0]
        assert verify_folder(fed.run / folder, roster).predicate["training"]["run"] == api.status(fed.run).run
        checked = api.verify(fed.run)
        assert (checked.committed, checked.folders) == (3, 1)
        assert checked.entries > 0


@pytest.mark.guarantee("G12")
@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_kills_of_server_and_site_change_no_bit_of_a_real_run(
    shared: Path, stories: Path, tmp_path: Path, method: str
) -> None:
    tables = dolly(shared, stories, method)
    text = toml(tables) + ranks(method)
    own = toml({"model": tables["model"], "adapter": at_a_site(tables), "data": tables["data"]})
    with federation(tmp_path, text, CLIENTS, site=dict.fromkeys(CLIENTS, own)) as fed:
        fed.serve()
        for name in CLIENTS:
            fed.join(name)
        fed.until(lambda: fed.events("server", "committed"))
        fed.kill("server")
        fed.kill("1")  # forgets the state that short messages of fedkseed refer to
        fed.serve(resume=True)
        fed.join("1")
        simulated = fedtune.simulate(bind(text), out=tmp_path / "simulated")
        assert fed.exit_statuses("server", *CLIENTS) == [0] * 5, fed.log("server")
        assert last_state(fed) == simulated.summary["state_digest"]
        assert own_states(fed.run) == own_states(tmp_path / "simulated")


SITE = '[model]\nbase = "none"\n[adapter]\ntargets = ["q"]\n[data]\nsource = "none"\n'
FLORA = """
name = "scripted"
[model]
base = "none"
[adapter]
rank = 8
alpha = 16
targets = ["q"]
[method]
name = "flora"
[client]
steps = 1
batch = 1
learning_rate = 1e-3
[rounds]
count = 4
min_clients = 3
norm_cap = 1e30  # updates are drawn, not trained: no number of steps bounds them
[[override]]
clients = ["site-b"]
rank = 4
[[override]]
clients = ["site-c"]
rank = 16
"""
SITES = ("site-a", "site-b", "site-c")


def scripted(fed: Federation, *names: str, seconds: float = 0.3) -> None:
    """Start sites whose trainer needs no torch."""
    for name in names:
        fed.start(name, "-m", "tests.link.scripted", str(fed.folder / name / "site.toml"), str(seconds))


def reference(tmp_path: Path, recipe: str = FLORA) -> str:
    """Return the digest of the final state of the recipe in one process."""
    *_, last = reference_rounds(recipe)
    return last.digest


def reference_rounds(recipe: str) -> Iterator[RoundResult]:
    """Yield the rounds of the recipe in one process."""
    from functools import partial

    from fedtune.config import planned_training
    from fedtune.config.recipe import largest_rank
    from fedtune.deployment.server_setup import data_at_sites
    from fedtune.messages import Blueprint, Client
    from fedtune.planning.fixed import Fixed
    from fedtune.runs.context import RunContext
    from fedtune.runs.runner import run_rounds_of
    from fedtune.simulation.inprocess import InProcess
    from fedtune.store import peft

    bound = data_at_sites(recipe)
    blueprint = Blueprint(MODEL.modules, {}, max_rank=largest_rank(bound), seed=bound.seed)
    setting = RunContext(
        recipe=bound,
        blueprint=blueprint,
        planner=Fixed(partial(planned_training, bound), alpha=bound.adapter.alpha, rslora=bound.adapter.rslora),
        base={"name": "none", "digest": MODEL.base, "parameters": MODEL.parameters},
        target=peft.Target(base="none", revision=None, task="causal", fan_in_fan_out=False, saved_modules=()),
        fleet=dict.fromkeys(SITES, EXAMPLES),
        machine={},
    )
    engine = InProcess([Client(name, EXAMPLES) for name in SITES], dict.fromkeys(SITES, scripted_update))
    yield from run_rounds_of(setting, engine)


def last_state(fed: Federation) -> str:
    return replay_journal(fed.run)[0].digests[-1]


@pytest.mark.guarantee("G12")
def test_a_server_that_is_killed_goes_on_and_nothing_is_trained_twice(tmp_path: Path) -> None:
    with federation(tmp_path, FLORA, SITES, site=dict.fromkeys(SITES, SITE), server={"inline_kib": 1}) as fed:
        fed.serve()
        scripted(fed, *SITES)
        fed.until(lambda: fed.events("site-a", "receipt") and fed.events("server", "committed"))
        fed.kill("server")
        fed.serve(resume=True)
        assert fed.exit_statuses("server", *SITES) == [0] * 4, fed.log("server")
        assert last_state(fed) == reference(tmp_path)
        for name in SITES:  # one reply for each round, whatever was killed when
            run = next((fed.folder / name / "state" / "runs").iterdir()).name
            entries = outbox.load_entries(fed.folder / name / "state", run)
            assert sorted(one.header.round for one in entries) == [1, 2, 3, 4]


STAGES = ("asked", "fetched", "sending", "pushed", "receipt")
"""Of a site's round, in their order: what it has recorded when it is killed."""


@pytest.mark.guarantee("G13")
@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_site_that_is_killed_at_any_stage_of_each_round_sends_the_same_bytes_again(
    tmp_path: Path, stage: str, cases: Callable[[int], None]
) -> None:
    kills, log = 0, ""
    with federation(tmp_path, FLORA, SITES, site=dict.fromkeys(SITES, SITE), server={"inline_kib": 1}) as fed:
        fed.serve()
        scripted(fed, *SITES)
        for number in (1, 2, 3, 4):
            # Of this life alone: what was recorded before the kill before it is no sign of this one.
            fed.until(lambda number=number: reached(fed, "site-b", stage, number) or over(fed))  # type: ignore[misc]
            if over(fed):
                break
            fed.kill("site-b")
            kills += 1
            log += fed.log("site-b")
            fed.lines["site-b"] = []
            scripted(fed, "site-b")
        assert fed.exit_statuses("server", *SITES) == [0] * 4, fed.log("server")
        assert last_state(fed) == reference(tmp_path)
        lines = [json.loads(line) for line in (log + fed.log("site-b")).splitlines() if line.startswith("{")]
        answers = {(one["round"], one["bytes"], one["answer"]) for one in lines if one["event"] == "sending"}
        updates = [(number, answer) for number, size, answer in answers if size > 1000]
        assert sorted(number for number, _ in updates) == [1, 2, 3, 4], "two answers of one round"
        cases(kills)


def reached(fed: Federation, name: str, stage: str, number: int) -> bool:
    """Return whether a site has come to a stage of a round, or a later one."""
    return any(one["round"] >= number for one in fed.events(name, stage))


def over(fed: Federation) -> bool:
    return any(fed.events("server", "stopped"))


def test_a_stopped_server_says_how_to_resume_and_the_sites_wait(tmp_path: Path) -> None:
    with federation(tmp_path, FLORA, SITES, site=dict.fromkeys(SITES, SITE)) as fed:
        fed.serve()
        scripted(fed, *SITES, seconds=0.5)
        fed.until(lambda: fed.events("server", "committed"))
        assert fed.kill("server", signal.SIGTERM) == 0
        assert any("fedtune serve --resume" in one["text"] for one in fed.events("server", "note"))
        assert [fed.processes[name].poll() for name in SITES] == [None] * 3
        fed.serve(resume=True)
        assert fed.exit_statuses("server", *SITES) == [0] * 4, fed.log("server")
        assert last_state(fed) == reference(tmp_path)
