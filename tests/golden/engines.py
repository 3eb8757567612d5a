"""The digests that each engine comes to: worker processes, Flower's apps over a grid, the link over mutual TLS."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fedtune
from fedtune.runs.local import prepare
from tests.golden import recipes
from tests.golden.commands import toml
from tests.golden.recipes import CLIENTS, Tables
from tests.link.federation import federation
from tests.test_engines import in_memory_grid, played

EVERYWHERE = ("flora", "hetlora", "fedkseed-kron", "flora-vote")
"""Recipes that every engine runs; each must come to what it comes to in process."""
OVER_LINK = ("flora", "fedkseed-kron")
"""Recipes that run over the link: a process for the server, and two for each of three sites."""

EVENTS = ("serving", "listening", "hello", "round", "asked", "answered", "used", "receipt", "committed")
"""Kinds of the server's events, whose keys are noted."""


def digests(folder: Path, *, ray: bool) -> Mapping[str, Any]:
    """Return the digests of each engine, by recipe.

    Args:
        folder: the working folder, which holds the data.
        ray: whether the engine ray is run too.
    """
    known = recipes.recipes()
    values: dict[str, Any] = {"processes": {}, "grid": {}, "link": {}}
    for engine in ("processes", *(["ray"] if ray else [])):
        for name in EVERYWHERE:
            settings = [f"engine.name={engine}", "engine.workers=2"]
            run = fedtune.simulate(known[name], overrides=settings, out=folder / f"{engine}-{name}")
            # Ray comes to the same as worker processes, or the comparison with their recording fails.
            values["processes"][name] = noted(run.path)
    for name in EVERYWHERE:
        (rounds,) = played([prepare(fedtune.bind(known[name]))], in_memory_grid)
        values["grid"][name] = {
            "states": [digest for digest, *_ in rounds],
            "cohorts": [sorted(who) for _, *who in rounds],
        }
    for name in OVER_LINK:
        values["link"][name] = linked(folder / f"link-{name}", known[name], folder / "data.jsonl")
    return values


def noted(run: Path) -> Mapping[str, Any]:
    """Return the states of a run's rounds, and the digests of the assignments."""
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    rounds = recipes.journal(run / "journal")["rounds"]
    return {
        "states": [line["state_digest"] for line in lines[1:]],
        "cohorts": [sorted(line["cohort"]) for line in lines[1:]],
        "assignments": {number: one["open.orders"] for number, one in rounds.items()},
    }


def linked(folder: Path, tables: Tables, data: Path) -> Mapping[str, Any]:
    """Return what a served run comes to: server and sites as processes of their own on loopback."""
    folder.mkdir()
    adapter = {"targets": tables.get("adapter", {}).get("targets", ["all-linear"])}
    own = {
        "seed": tables["seed"],
        "model": tables["model"],
        "adapter": adapter,
        "data": {**tables["data"], "source": str(data)},
    }
    # A day of its own: every assignment names it, and it would be that of the recording.
    data_tables = {**tables["data"], "date": "2024-07-26"}
    served = tables | {"rounds": {**tables["rounds"], "min_clients": len(CLIENTS)}, "data": data_tables}
    with federation(folder, toml(served), CLIENTS, site=dict.fromkeys(CLIENTS, toml(own))) as parties:
        parties.serve()
        for name in CLIENTS:
            parties.join(name)
        exits = parties.exit_statuses("server", *CLIENTS)
        assert exits == [0] * (1 + len(CLIENTS)), parties.log("server")
        lines = [json.loads(line) for line in parties.lines["server"] if line.startswith("{")]
        return {
            **noted(parties.run),
            "files": recipes.files(parties.run),
            "events": {
                kind: sorted({key for line in lines if line["event"] == kind for key in line}) for kind in EVENTS
            },
            "site files": sorted({name.split("/")[0] for name in recipes.files(folder / CLIENTS[0] / "state")}),
        }
