"""A tiny prepared experiment and its run directory, and how tests run, stop, read and damage it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedtune import api
from fedtune.client.perform import perform
from fedtune.config import bind
from fedtune.rounds.events import Watch
from fedtune.runs.local import Experiment, prepare, run_context, transport
from fedtune.runs.runner import run_recipe
from fedtune.store import peft
from fedtune.store.run_directory import write_recipe
from tests.conftest import Simulated

Tables = dict[str, Any]


def run_prepared(
    prepared: Experiment, run: Path, watch: Watch = lambda event: None, *, resume: bool = False
) -> Mapping[str, Any]:
    with transport(prepared) as engine:
        return run_recipe(run_context(prepared), run, engine, resume=resume, watch=watch)


@pytest.fixture
def prepared(tables: dict[str, Any]) -> Experiment:
    return prepare(bind(tables))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write_recipe(folder, "name = 'tiny'")
    return folder


def read_lines(run: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def read_summary(run: Path) -> Mapping[str, Any]:
    summary: Mapping[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def stopped_in(round: int, error: BaseException) -> Callable[..., Any]:
    def tired(base: Any, examples: Any, assignment: Any, **options: Any) -> Any:
        if assignment.round == round:
            raise error
        return perform(base, examples, assignment, **options)

    return tired


def same_ends(run: Path, other: Path) -> bool:
    """Tell whether two runs have the same states, the same adapter and the same scores."""
    ends = [
        [(line["state_digest"], line["test"], line["modules"]) for line in read_lines(folder)]
        for folder in (run, other)
    ]
    return ends[0] == ends[1] and peft.digest(run / "adapter") == peft.digest(other / "adapter")


def cut(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def spine(tables: Tables, **changes: Any) -> Tables:
    """The tiny recipe with pruning, a planner and simulated devices: five rounds; what is None is left out."""
    rest = {key: value for key, value in tables.items() if key != "override"}
    base: Tables = {
        **rest,
        "adapter": {"rank": 4, "targets": ["all-linear"]},
        "method": {"name": "fedspine"},
        "pruning": {"target": 0.5, "multiple": 8, "batches": 2, "refresh": 3},
        "planner": {"name": "deadline", "goal": "deployed", "ratios": [0.0, 0.25, 0.5], "ranks": [2, 4]},
        "fleet": {"name": "fedspine80"},
        "rounds": {"count": 5},
    }
    return {
        **base,
        **{
            key: {k: v for k, v in {**base.get(key, {}), **value}.items() if v is not None}
            if isinstance(value, dict)
            else value
            for key, value in changes.items()
        },
    }


@pytest.fixture
def shrunk(simulated: Simulated, tables: Tables, tmp_path: Path) -> api.Run:
    return simulated(spine(tables, pruning={"repair": "least-squares"}), tmp_path / "spine")
