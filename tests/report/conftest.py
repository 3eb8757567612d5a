"""Synthetic run directories, written as the schema of rounds.jsonl and summary.json says."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WriteRun = Callable[..., Path]

KINDS = ("q_proj", "v_proj")


def metrics(loss: float) -> dict[str, Any]:
    return {"loss": loss, "perplexity": math.exp(loss), "accuracy": 0.5, "examples": 40, "tokens": 900}


def loss_of(client: int, round: int, seed: int = 0) -> float:
    """Falls from 3 + client / 10 towards 1 less."""
    return 3.0 + client / 10 - (1 - 0.8**round) + seed / 100


def round_line(round: int, *, clients: int, seed: int, layers: int) -> dict[str, Any]:
    names = [f"client-{index}" for index in range(clients)]
    losses = [loss_of(index, round, seed) for index in range(clients)]
    line: dict[str, Any] = {
        "version": 1,
        "round": round,
        "seconds": 2.0 if round else 0.5,
        "cohort": names if round else [],
        "loss_before": 2.6 if round else None,
        "loss_after": 2.4 - round / 100 if round else None,
        "test": metrics(sum(losses) / clients),
        "held_out": {name: metrics(loss) for name, loss in zip(names, losses, strict=True)},
        "clients": {},
        "bytes_down": 2000 * clients if round else 0,
        "bytes_up": 1000 * clients if round else 0,
        "modules": {},
        "clock_s": 6.0 * round,
    }
    if round == 0:
        return line
    for index, name in enumerate(names):
        chosen = (index * 7 + round * 3) % 11
        if chosen == 5:
            continue  # absent
        status, reason = {3: ("failed", "out of memory"), 2: ("refused", "norm 41.2 > 10.0")}.get(chosen, ("ok", ""))
        line["clients"][name] = {
            "status": status,
            "reason": reason,
            "rank": 4 * (1 + index % 4),
            "steps": 10,
            "examples": 30 + index,
            "loss_before": loss_of(index, round - 1) if status == "ok" else None,
            "loss_after": loss_of(index, round) if status == "ok" else None,
            "seconds": 1.5,
            "peak_bytes": 2_000_000_000,
            "tokens": 5000,
            "bytes_down": 2000,
            "bytes_up": 1000,
            "norm": 0.3,
            "ratio": 0.25 * (index % 3),
            "why": "fits the deadline of 12 s",
            "compute_s": 3.0 + index % 2,
            "transfer_s": 2.0,
        }
    for layer in range(layers):
        for kind in KINDS:
            values = [0.5 * 0.7**index / (1 + layer) for index in range(8)]
            name = f"model.layers.{layer}.self_attn.{kind}"
            line["modules"][name] = {
                "rank": 4 + round % 5 + layer,
                "norm": 0.3,
                "energy_kept": 0.99,
                "singular_values": values,
            }
    return line


def summary_of(lines: list[dict[str, Any]], *, name: str, method: str, seed: int) -> dict[str, Any]:
    def standing(line: dict[str, Any]) -> dict[str, Any]:
        losses = {client: scores["loss"] for client, scores in line["held_out"].items()}
        worst = max(losses, key=lambda client: losses[client])
        mean = sum(losses.values()) / len(losses)
        return {
            "test": line["test"],
            "held_out": line["held_out"],
            "mean": metrics(mean),
            "worst": {"client": worst, **metrics(losses[worst])},
        }

    failures = [
        {"round": line["round"], "client": client, "kind": each["status"], "reason": each["reason"]}
        for line in lines
        for client, each in line["clients"].items()
        if each["status"] != "ok"
    ]
    return {
        "version": 1,
        "name": name,
        "method": method,
        "seed": seed,
        "rounds": lines[-1]["round"],
        "state": "finished",
        "base": {"name": "tiny-llama", "digest": "9f3c2b7d" * 8, "parameters": 1_100_000_000},
        "trainable": 4_505_600,
        "before": standing(lines[0]),
        "after": standing(lines[-1]),
        "clients": {
            client: {
                "examples": 30 + index,
                "rank": 4 * (1 + index % 4),
                "bytes_down": 2000 * lines[-1]["round"],
                "bytes_up": 1000 * lines[-1]["round"],
                "seconds": 1.5 * lines[-1]["round"],
                "failures": sum(failure["client"] == client for failure in failures),
            }
            for index, client in enumerate(lines[0]["held_out"])
        },
        "bytes_down": sum(line["bytes_down"] for line in lines),
        "bytes_up": sum(line["bytes_up"] for line in lines),
        "seconds": sum(line["seconds"] for line in lines),
        "sample": {"prompt": "Which organ makes insulin?", "before": "The organ the organ", "after": "The pancreas."},
        "failures": failures,
        "adapter_digest": "41aa0c55" * 8,
        "clock_s": lines[-1]["clock_s"],
        "devices": {
            "clients": {client: ("tx2", "agx")[index % 2] for index, client in enumerate(lines[0]["held_out"])},
            "profiles": {
                "tx2": {"memory_gb": {"value": "5.2", "provenance": "assumed"}},
                "agx": {"memory_gb": {"value": "27.2", "provenance": "datasheet"}},
            },
            "clock": "Time is simulated.",
        },
        "versions": {"fedtune": "0.1.0", "torch": "2.13.0"},
        "machine": {"device": "cpu", "threads": 2},
    }


def write_directory(
    path: Path,
    *,
    name: str = "dolly-4",
    method: str = "flora",
    seed: int = 0,
    clients: int = 4,
    rounds: int = 3,
    layers: int = 2,
    edit: Callable[[list[dict[str, Any]], dict[str, Any]], None] | None = None,
) -> Path:
    """Write a run directory; `edit(lines, summary)` may change both before they are written."""
    lines = [round_line(round, clients=clients, seed=seed, layers=layers) for round in range(rounds + 1)]
    summary = summary_of(lines, name=name, method=method, seed=seed)
    if edit:
        edit(lines, summary)
    path.mkdir(parents=True)
    recipe = f'name = "{name}"\nseed = {seed}\n\n[method]\nname = "{method}"\n'
    (path / "recipe.toml").write_text(recipe, encoding="utf-8")
    (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    os.utime(path / "summary.json", (1_800_000_000, 1_800_000_000))
    return path


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Return `write_directory` for folders of this test alone."""

    def write(folder: str = "run", **options: Any) -> Path:
        return write_directory(tmp_path / folder, **options)

    return write
