from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedtune
from fedtune.config import bind
from fedtune.deployment import patch as patch_module
from fedtune.deployment.patch import suits_objective
from fedtune.errors import ConfigError
from fedtune.lora.adapter import Adapter
from fedtune.store import peft
from tests.cli.test_flower_server import toml
from tests.client.test_hf_trainer import make
from tests.link.federation import ROOT, Federation, federation

SCRIPT = Path(__file__).with_name("patched_site.py")
NAMES = ("theirs", "ours")


def recipe(stories: Path, shared: Path, **method: Any) -> dict[str, Any]:
    return {
        "name": "patched",
        "model": {"base": str(stories), "threads": 1},
        "adapter": {"rank": 4, "alpha": "2r", "targets": ["q_proj", "up_proj"]},
        "method": {"name": "flora", **method},
        "client": {"steps": 2, "batch": 2, "learning_rate": 5e-3},
        "rounds": {"count": 2, "min_clients": 2},
        "data": {"source": str(shared / "data" / "dolly" / "small_train.jsonl"), "template": "plain", "max_tokens": 48},
        "evaluate": {"every": 0, "clients": False},
    }


def sites(tables: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the files of a site that fedtune trains and of one with a Trainer, which names no model and no data."""
    adapter = {"targets": ["q_proj", "up_proj"]}
    ours = {"model": tables["model"], "adapter": adapter, "data": {**tables["data"], "limit": 40}}
    return {"ours": toml(ours), "theirs": toml({"adapter": adapter})}


def start(fed: Federation, base: Path, *launcher: str) -> None:
    """Start the user's script."""
    command = [*launcher, str(SCRIPT), str(base), str(fed.folder / "theirs" / "site.toml"), str(fed.folder / "out")]
    fed.start("theirs", *command)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stock_script_takes_part_beside_a_site_of_fedtunes_own(
    processes: int, shared: Path, stories: Path, tmp_path: Path
) -> None:
    tables = recipe(stories, shared)
    text = toml(tables) + '\n[[override]]\nclients = ["theirs"]\nrank = 2\n'
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes > 1 else []
    with federation(tmp_path, text, NAMES, site=sites(tables)) as fed:
        fed.serve()
        fed.join("ours")
        start(fed, stories, *launcher)
        assert fed.exit_statuses("server", "ours", "theirs") == [0, 0, 0], fed.log("theirs") + fed.log("server")
        rounds = [json.loads(line) for line in (fed.run / "rounds.jsonl").read_text().splitlines()]
        assert [sorted(line["clients"]) for line in rounds if line["round"]] == [["ours", "theirs"]] * 2
        theirs = [line["clients"]["theirs"] for line in rounds if line["round"]]
        assert all(one["num_examples"] == 12 for one in theirs), theirs
        # What the script saves is the model of all clients.
        final = fed.folder / "out" / "final"
        assert (final / "adapter_config.json").is_file()
        assert same_change(peft.read(fed.run / "adapter")[0], loaded(final))


def loaded(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return dict(load_file(folder / "adapter_model.safetensors"))


def same_change(adapter: Adapter, tensors: Mapping[str, Any]) -> bool:
    """Return whether PEFT's file has an adapter's factors, which have scale 1."""
    prefix = "base_model.model."
    return all(
        np.array_equal(tensors[f"{prefix}{name}.lora_A.weight"], factors.a)
        and np.array_equal(tensors[f"{prefix}{name}.lora_B.weight"], factors.b)
        for name, factors in adapter.items()
    )
