from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import flower_client
from fedtune.cli.flower_client import site_of
from fedtune.config import bind, render
from fedtune.errors import ConfigError
from fedtune.flower.grid_transport import HELLO
from fedtune.flower.records import ERROR
from tests.cli.test_flower_server import site_files
from tests.flower.conftest import flower_task, running

__all__ = ["flower_task"]  # a fixture

ROOT = Path(__file__).parents[2]


def test_a_deployed_client_is_what_its_file_says(tmp_path: Path, tables: dict[str, Any]) -> None:
    (path,) = site_files(tmp_path, tables, ("client-1",))
    site = site_of({"fedtune-site": str(path), "partition-id": 0}, {"recipe": render(bind(tables))})
    assert site.profile().client == "client-1"


def test_a_deployed_client_takes_no_recipe_from_the_network(tables: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="fedtune-site: expected the path of this client's own file"):
        site_of({"partition-id": 0}, {"recipe": render(bind(tables))})


def test_a_simulated_client_is_the_recipes_at_its_place(
    tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.cli.flower_client.in_simulation", lambda: True)
    run_config = {"recipe": render(bind(tables))}
    assert [site_of({"partition-id": i}, run_config).profile().client for i in range(3)] == [
        "client-0",
        "client-1",
        "client-2",
    ]
    with pytest.raises(ConfigError, match="num-supernodes: expected 3, the clients of the recipe; got at least 4"):
        site_of({"partition-id": 3}, run_config)


def test_a_client_without_a_file_says_so_to_the_server() -> None:
    from flwr.app import Error, Message, RecordDict

    reply = running(flower_client.app, node_config={})(Message(RecordDict(), 7, HELLO))
    assert isinstance(reply, Error)
    assert reply.code == ERROR
    assert "--node-config" in str(reply.reason)


def test_a_node_without_a_file_is_refused_before_torch_is_loaded() -> None:
    code = (
        "import sys\nfrom fedtune.cli.flower_client import site_of\nfrom fedtune.errors import ConfigError\n"
        "try:\n    site_of({'partition-id': 0}, {})\n"
        "except ConfigError:\n    print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "fedtune" in loaded
    assert not {"torch", "transformers", "peft"} & loaded
