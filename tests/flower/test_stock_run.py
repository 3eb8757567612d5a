"""The app of docs/how-to/flower-strategies.md under Flower's simulation engine and on a SuperLink, by `flwr run`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from fedtune.store.peft import read
from tests.flower.stock_app import write_app
from tests.flower.test_flwr_run import Loopback, free_port

CLIENT = 'Message:\n    model = get_model(context.run_config["model"], rank=8)'


def run(loopback: Loopback, app: Path, checkpoint: Path, saved: Path, *more: str) -> str:
    """Run an app, and return all that was printed."""
    config = loopback.folder / "run.toml"
    values = {"model": str(checkpoint), "save-path": str(saved)}
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    done = subprocess.run(
        ["flwr", "run", str(app), "test", "--stream", "--run-config", str(config), *more],
        env=loopback.environment,
        cwd=loopback.folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.stdout + done.stderr + "".join(path.read_text() for path in sorted(loopback.folder.glob("*.log")))


@pytest.mark.slow
def test_the_page_runs_in_flowers_simulation_engine(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    loopback = Loopback(tmp_path, simulation=True)
    with loopback.started():
        app, saved = write_app(tmp_path / "app"), tmp_path / "adapter"
        said = run(loopback, app, checkpoints["llama"], saved, "--federation-config", "num-supernodes=3")
    assert (saved / "adapter_config.json").exists(), said
    assert "'clients-used': 3, 'clients-left-out': 0" in said
    assert read(saved)[2]["rounds"] == 2


@pytest.mark.slow
def test_clients_of_their_own_ranks_train_on_a_superlink_under_their_names(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    loopback = Loopback(tmp_path, simulation=False)
    changes = [
        (CLIENT, CLIENT.replace("rank=8", 'rank=[2, 8][context.node_config["partition-id"]]')),
        ("FLoRA(alpha=16, ", 'FLoRA(alpha=16, ranks="own", '),
    ]
    app, saved = write_app(tmp_path / "app", changes), tmp_path / "adapter"
    with loopback.started():
        nodes = []
        for place in range(2):
            node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{loopback.port}"]
            node += ["--host", "127.0.0.1", "--port", str(free_port()), "--node-config", f"partition-id={place}"]
            nodes.append(loopback.process(f"node-{place}", node))
        with nodes[0], nodes[1]:
            said = run(loopback, app, checkpoints["llama"], saved)
    assert (saved / "adapter_config.json").exists(), said
    assert "'clients-used': 2, 'clients-left-out': 0" in said
    # Sums of ranks 2 and 8, over what the largest rank holds of the round before.
    assert max(factors.rank for factors in read(saved)[0].values()) > 8
