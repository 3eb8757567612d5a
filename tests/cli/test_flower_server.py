"""Whole runs of the two Flower apps over a grid in memory, the server without a model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, RecordDict, UserConfig

import fedtune
from fedtune.cli import flower_client, flower_server
from fedtune.cli.flower_server import bind_source, cost_text, directory, losses_text, print_event, run_name, say
from fedtune.config import bind, render
from fedtune.deployment.server_setup import expected_clients
from fedtune.errors import ConfigError, StoreError
from fedtune.messages import Failure, Traffic
from fedtune.rounds.events import ClientFinished, Note
from fedtune.rounds.record import RoundRecord
from fedtune.runs import demo_code
from tests.flower.conftest import NODE, MemoryGrid, flower_task, running

__all__ = ["flower_task"]  # a fixture

ROOT = Path(__file__).parents[2]


def toml(table: Mapping[str, Any]) -> str:
    """Return tables of plain values as TOML; JSON's values are TOML's here."""
    head = {key: value for key, value in table.items() if not isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in head.items()]
    for name, part in table.items():
        if isinstance(part, dict):
            inline = {
                key: "{ " + ", ".join(f"{k} = {json.dumps(v)}" for k, v in value.items()) + " }"
                if isinstance(value, dict)
                else json.dumps(value)
                for key, value in part.items()
            }
            lines += ["", f"[{name}]", *(f"{key} = {value}" for key, value in inline.items())]
    return "\n".join(lines) + "\n"


def site_files(folder: Path, tables: Mapping[str, Any], names: tuple[str, ...]) -> list[Path]:
    """Write the site file of each client of a recipe, which is its part of it."""
    paths = []
    for name in names:
        path = folder / f"{name}.toml"
        adapter = {key: value for key, value in tables["adapter"].items() if key != "rank"}
        parts = {"model": tables["model"], "adapter": adapter, "data": tables["data"], "policy": {"min_examples": 1}}
        path.write_text(toml({"name": name, **parts}))
        paths.append(path)
    return paths


def dated(tables: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a recipe over a base whose chat template writes the day, without one of its own."""
    base = folder / "base"
    shutil.copytree(tables["model"]["base"], base)
    template = "on {{ strftime_now('%d %B') }} {% for m in messages %}{{ m.content }}{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    rows = [{"instruction": f"the fox {i}", "output": "jumps over", "who": f"client-{i % 3}"} for i in range(12)]
    (folder / "dated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(folder / "dated.jsonl"), "max_tokens": 64, "split": {"kind": "key", "by": "who"}}
    return tables | {"data": data, "model": tables["model"] | {"base": str(base)}, "override": []}


def serve(grid: MemoryGrid, **run_config: Any) -> None:
    context = Context(run_id=1, node_id=1, node_config=UserConfig(), state=RecordDict(), run_config=run_config)
    flower_server.app(grid, context)


@pytest.fixture
def grid(tmp_path: Path, tables: dict[str, Any]) -> MemoryGrid:
    """Three clients with files of their own, over whose data and model the server knows nothing."""
    paths = site_files(tmp_path, tables, ("client-0", "client-1", "client-2"))
    return MemoryGrid(
        {NODE + i: running(flower_client.app, node_config={"fedtune-site": str(p)}) for i, p in enumerate(paths)}
    )


def test_a_deployed_run_ends_in_the_state_of_the_simulated_one(
    grid: MemoryGrid, tables: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = bind(tables | {"rounds": {"count": 2, "min_clients": 3}})
    simulated = fedtune.simulate(recipe, out=tmp_path / "simulated")
    serve(grid, recipe=render(recipe), resume="", store=str(tmp_path / "store"))
    run = tmp_path / "store" / recipe.name
    summary = json.loads((run / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert summary["state_digest"] == simulated.summary["state_digest"]
    assert summary["adapter_digest"] == simulated.summary["adapter_digest"]
    assert summary["base"]["digest"] == simulated.summary["base"]["digest"]
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        ours, theirs = run / "adapter" / file, simulated.adapter / file
        assert ours.read_bytes() == theirs.read_bytes(), file
    printed = capsys.readouterr().out
    assert "round 2: 3 of 3 updates" in printed
    assert "round 1 starts with client-0, client-1, client-2" in printed
    assert "round 0: the base, held-out loss " in printed
    assert summary["after"]["held_out"] == simulated.summary["after"]["held_out"]


def test_a_run_goes_on_where_it_stopped(
    grid: MemoryGrid, tables: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "store")
    whole = bind(tables | {"rounds": {"count": 3, "min_clients": 3}})
    serve(grid, recipe=render(whole), resume="", store=str(tmp_path / "whole"))
    serve(grid, recipe=render(bind(tables | {"rounds": {"count": 1, "min_clients": 3}})), resume="", store=store)
    fresh = MemoryGrid({NODE + 50 - i: node for i, node in enumerate(grid.nodes.values())})
    serve(fresh, recipe=render(whole), resume=whole.name, store=store)
    digests = [
        json.loads((folder / whole.name / "summary.json").read_text())["state_digest"]
        for folder in (tmp_path / "whole", tmp_path / "store")
    ]
    assert digests[0] == digests[1]


def test_all_sites_write_the_day_on_which_the_run_began(
    tables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dated(tables, tmp_path)
    paths = site_files(tmp_path, recipe, ("client-0", "client-1", "client-2"))
    sites = [running(flower_client.app, node_config={"fedtune-site": str(path)}) for path in paths]
    simulated = fedtune.simulate(
        bind(recipe | {"rounds": {"count": 2, "min_clients": 3}}, overrides=["data.date=2026-11-29"]),
        out=tmp_path / "simulated",
    )
    store = str(tmp_path / "store")
    for day, count, resume in (("2026-11-29", 1, ""), ("2026-12-24", 2, "tiny")):
        monkeypatch.setattr(
            "fedtune.deployment.server_setup.date", SimpleNamespace(today=partial(date.fromisoformat, day))
        )
        bound = bind(recipe | {"rounds": {"count": count, "min_clients": 3}})
        serve(
            MemoryGrid({NODE + i: each for i, each in enumerate(sites)}),
            recipe=render(bound),
            resume=resume,
            store=store,
        )
    summary = json.loads((tmp_path / "store" / "tiny" / "summary.json").read_text())
    assert summary["state_digest"] == simulated.summary["state_digest"]
    assert bind(tmp_path / "store" / "tiny" / "recipe.toml").data.date == "2026-11-29"


def test_a_taken_run_directory_is_refused_before_any_client_is_asked(
    grid: MemoryGrid, tables: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "store" / "tiny").mkdir(parents=True)
    (tmp_path / "store" / "tiny" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds a run or other files"):
        serve(grid, recipe=render(bind(tables)), resume="", store=str(tmp_path / "store"))
    assert not grid.pushed


def test_sites_with_data_of_their_own_do_not_train_by_the_demos_recipe(
    grid: MemoryGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    expected = r"recipe: expected the recipe.*got none for the client 'client-0'; pass --run-config 'recipe="
    with pytest.raises(ConfigError, match=expected):
        serve(grid, recipe="", resume="", store="")
    assert not any((tmp_path / "home" / "runs" / "demo").iterdir())


def test_a_simulation_without_a_recipe_runs_the_demo_and_a_second_one_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    monkeypatch.setattr("fedtune.cli.flower_client.in_simulation", lambda: True)
    one_step = demo_code.recipe_text().replace("steps = 6", "steps = 1").replace("count = 4", "count = 1")
    monkeypatch.setattr("fedtune.runs.demo_code.recipe_text", lambda: one_step)
    for run in ("demo", "demo-2"):
        # Of its eight clients as many as there are nodes, in the order of their names.
        nodes = {NODE + i: running(flower_client.app, node_config={"partition-id": 3 + 4 * i}) for i in range(2)}
        serve(MemoryGrid(nodes), recipe="", resume="", store="")
        summary = json.loads((tmp_path / "runs" / run / "summary.json").read_text())
        assert (summary["state"], summary["rounds"]) == ("finished", 1)
    printed = capsys.readouterr().out
    assert "fedtune: no recipe is named, so the demo runs in simulation: " in printed
    assert "fedtune: round 1 starts with json, xml" in printed
    line = next(line for line in printed.splitlines() if line.startswith("fedtune: round 1: "))
    assert re.fullmatch(r"fedtune: round 1: 2 of 2 updates, held-out loss .*, [\d.]+ kB up, .* down, [\d.]+ s", line)


def test_a_rounds_line_has_the_clients_losses_where_no_rows_are_held_out() -> None:
    record = RoundRecord(1, 2.0, loss_before=3.25, loss_after=3.0, bytes_up=1500, bytes_down=2_000_000)
    assert losses_text(record) == "the clients' loss 3.250 before their steps and 3.000 after"
    assert cost_text(record) == "1.5 kB up, 2 MB down, 2.0 s"
    assert losses_text(RoundRecord(1, 2.0)) == ""
    assert cost_text(RoundRecord(0, 2.0)) == ""


def test_a_server_needs_no_data_in_its_recipe(grid: MemoryGrid, tables: dict[str, Any], tmp_path: Path) -> None:
    recipe = bind(tables | {"rounds": {"count": 1, "min_clients": 3}})
    lines = render(recipe).splitlines()
    start = lines.index("[data]")
    end = next(i for i in range(start + 1, len(lines)) if lines[i].startswith("["))
    serve(grid, recipe="\n".join([*lines[:start], *lines[end:]]), resume="", store=str(tmp_path / "without"))
    serve(MemoryGrid(dict(grid.nodes)), recipe=render(recipe), resume="", store=str(tmp_path / "with"))
    without, whole = (
        json.loads((tmp_path / name / "tiny" / "summary.json").read_text()) for name in ("without", "with")
    )
    assert without["state_digest"] == whole["state_digest"]


def test_a_recipe_may_be_a_file(tables: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(render(bind(tables)))
    assert bind_source(str(path)).name == "tiny"


def test_a_store_is_absolute_or_in_fedtunes_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="store: expected an absolute path"):
        directory("runs", "tiny")
    assert directory(str(tmp_path), "tiny") == tmp_path / "tiny"
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    assert directory("", "tiny") == tmp_path / "home" / "runs" / "tiny"
    monkeypatch.delenv("FEDTUNE_HOME")
    assert directory("", "tiny") == Path.home() / ".fedtune" / "runs" / "tiny"


def test_the_first_round_waits_for_its_whole_cohort(tables: dict[str, Any]) -> None:
    rounds = {"count": 2, "min_clients": 2}
    assert expected_clients(bind(tables | {"rounds": rounds})) == 2
    assert expected_clients(bind(tables | {"rounds": rounds | {"cohort": 3}})) == 3
    assert expected_clients(bind(tables | {"rounds": rounds | {"cohort": 0.5}})) == 2


def test_the_server_loads_no_torch() -> None:
    code = "import sys, fedtune.cli.flower_server\nprint(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=True
    )
    heavy = {"torch", "ray", "transformers", "peft", "datasets", "pandas", "matplotlib"}
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize("source", ["recipe.toml", "recipes/notes.toml", "../notes.toml"])
def test_a_recipe_by_a_relative_path_is_refused(source: str) -> None:
    with pytest.raises(ConfigError, match=r"recipe: expected the recipe: TOML, or the absolute path.*write the path"):
        bind_source(source)


@pytest.mark.parametrize("resume", ["..", ".", "/srv/runs/tiny", "runs/tiny", "tiny/", "tiny\n"])
def test_a_run_to_go_on_with_is_a_bare_name(resume: str) -> None:
    with pytest.raises(ConfigError, match=r"resume: expected the name of a run.*as store"):
        run_name(resume)
    assert run_name("tiny-2") == "tiny-2"
    assert run_name("") == ""


def test_an_override_that_covers_nobody_is_told(
    grid: MemoryGrid, tables: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistyped = [*tables["override"], {"clients": ["klient-*"], "rank": 2}]
    recipe = bind(tables | {"override": mistyped, "rounds": {"count": 1, "min_clients": 3}})
    serve(grid, recipe=render(recipe), resume="", store=str(tmp_path))
    told = [line for line in capsys.readouterr().out.splitlines() if "override.clients" in line]
    assert told == [
        "fedtune: override.clients: ['klient-*'] match none of the clients that are here (client-0, client-1, client-2)"
    ]


def test_no_text_of_a_client_is_obeyed_by_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b[2J\r\u202e\x9b\nfedtune: finished"
    say(hostile)
    print_event(Note(hostile))
    print_event(ClientFinished(1, Failure.from_text("ann", hostile), Traffic()))
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)
