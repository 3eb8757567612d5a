"""The built file of a device, without any Python: a federation with torch clients, and fifty losses of power."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.config import bind
from fedtune.runs.edge_bundle import export_bundle
from fedtune.seeds import derive, generator
from tests.cli.test_flower_server import toml
from tests.edge_binary import bare_environment, built_file, join_binary, kill_group, processes_of, states_by_round
from tests.link.federation import END_S, Federation, federation

pytestmark = pytest.mark.slow
EDGE, TORCH = ("0", "1"), ("2", "3")
"""Names that the data's own split gives."""
KILLS = 50


@pytest.fixture(scope="module")
def binary() -> Path:
    return built_file()


def recipe(shared: Path, stories: Path, names: Sequence[str], *, rounds: int, steps: int) -> dict[str, Any]:
    return {
        "name": "devices",
        "model": {"base": str(stories), "threads": 1},
        "method": {"name": "fedkseed", "bank": "kron", "seeds": 256, "perturbation": 1e-3},
        "client": {"steps": steps, "batch": 4, "learning_rate": 2e-4},
        "rounds": {"count": rounds, "min_clients": len(names)},
        "data": {
            "source": str(shared / "data" / "dolly" / "small_train.jsonl"),
            "split": {"kind": "key", "by": "flora_client", "clients": len(names)},
            "template": "plain",
            "max_tokens": 96,
            "limit": 400,
        },
        "evaluate": {"every": 0, "examples": 2, "client_examples": 24},
    }


def sites(tables: Mapping[str, Any], bundle: Path, names: Sequence[str]) -> Mapping[str, str]:
    """Return the sites' own files: a device names the bundle where the others name the model."""
    own = {"model": tables["model"], "data": tables["data"]}
    torch = toml({**own, "adapter": {"targets": ["all-linear"]}})
    device = toml({**own, "model": {"base": str(bundle), "threads": 1}})
    return {name: device if name in EDGE else torch for name in names}


@pytest.fixture
def devices(shared: Path, stories: Path, tmp_path: Path) -> Callable[..., Any]:
    """Open a federation whose devices hold a bundle that its coordinator has signed."""

    def opened(folder: Path, names: Sequence[str], **settings: int) -> Any:
        tables = recipe(shared, stories, names, **settings)
        fed = federation(folder, toml(tables), names, site=sites(tables, folder / "bundle", names))
        return fed

    return opened


def start(fed: Federation, stories: Path) -> None:
    """Sign the devices' bundle, and start the server."""
    export_bundle(stories, fed.folder / "bundle", identity=fed.places["server"])
    fed.serve()


def rounds_of(fed: Federation) -> Sequence[Mapping[str, Any]]:
    return [json.loads(line) for line in (fed.run / "rounds.jsonl").read_text().splitlines()]


def test_the_file_runs_with_an_empty_environment_and_says_what_it_is(binary: Path, tmp_path: Path) -> None:
    environment = bare_environment(tmp_path, tmp_path / "home")
    for _ in range(2):
        done = subprocess.run([binary, "version"], env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "runs bundles for onnx" in done.stdout
    lost = subprocess.run([binary, "join", "none.toml"], env=environment, capture_output=True, text=True, check=False)
    assert (lost.returncode, lost.stdout) == (2, "")
    assert "none.toml" in lost.stderr
    assert "Traceback" not in lost.stderr


def test_two_devices_and_two_torch_clients_train_one_model(
    binary: Path, shared: Path, stories: Path, tmp_path: Path, devices: Callable[..., Any]
) -> None:
    names = (*EDGE, *TORCH)
    with devices(tmp_path, names, rounds=6, steps=16) as fed:
        start(fed, stories)
        for name in EDGE:
            join_binary(fed, name, binary, tmp_path / "home")
        for name in TORCH:
            fed.join(name)
        assert fed.exit_statuses("server", *names) == [0] * 5, {name: fed.log(name) for name in fed.lines}
        assert [line["updates"] for line in fed.events("server", "committed")] == [4] * 6
        states = {name: states_by_round(fed, name) for name in names}
        assert states[EDGE[0]] == states[EDGE[1]] == states[TORCH[0]] == states[TORCH[1]]
        assert sorted(states[EDGE[0]]) == [1, 2, 3, 4, 5, 6]
        assert len(set(states[EDGE[0]].values())) >= 5  # the first round measures and moves nothing
        assert not processes_of(str(tmp_path))
        summary = json.loads((fed.run / "summary.json").read_text())
    # By how much other directions change the loss after the same rounds, in process.
    tables = recipe(shared, stories, names, rounds=6, steps=16)
    losses = [
        fedtune.simulate(bind({**tables, "seed": seed}), out=tmp_path / f"seed-{seed}").summary["after"]["test"]["loss"]
        for seed in (1, 2, 3)
    ]
    before, after = (summary[when]["test"]["loss"] for when in ("before", "after"))
    print(f"loss {before:.4f} -> {after:.4f}; other seeds in process {[f'{loss:.4f}' for loss in losses]}")
    assert before - after > max(losses) - min(losses)
    assert before - after > 0.01


@pytest.mark.guarantee("G12")
def test_fifty_losses_of_power_change_no_bit_and_leave_nothing(
    binary: Path, stories: Path, tmp_path: Path, devices: Callable[..., Any], cases: Callable[[int], None]
) -> None:
    usual: dict[str, Any] = {}
    (tmp_path / "whole").mkdir()
    with devices(tmp_path / "whole", EDGE, rounds=8, steps=48) as fed:
        start(fed, stories)
        for name in EDGE:
            join_binary(fed, name, binary, tmp_path / "home")
        assert fed.exit_statuses("server", *EDGE) == [0] * 3, fed.log("server")
        usual = {"states": states_by_round(fed, EDGE[0]), "last": rounds_of(fed)[-1]["state_digest"]}
    (tmp_path / "killed").mkdir()
    rng = generator(derive(19, "power"))
    with devices(tmp_path / "killed", EDGE, rounds=8, steps=48) as fed:
        start(fed, stories)
        homes = {name: tmp_path / "killed" / f"home-{name}" for name in EDGE}
        for name in EDGE:
            join_binary(fed, name, binary, homes[name])
        for kill in range(KILLS):
            victim = EDGE[int(rng.integers(2))]
            wait(fed, float(rng.uniform(0, 4.0)))
            if fed.processes["server"].poll() is not None:
                pytest.fail(f"expected {KILLS} kills; the run was complete after {kill}")
            kill_group(fed, victim)
            wait_for_end(str(tmp_path / "killed" / victim))
            join_binary(fed, victim, binary, homes[victim])
        assert fed.exit_statuses("server", *EDGE) == [0] * 3, fed.log("server")
        for name in EDGE:
            assert states_by_round(fed, name) == usual["states"]
            check_no_round_was_trained_twice(fed, name)
            (tree,) = (homes[name] / "bin").iterdir()  # nothing of an unpacking that was killed
            assert sorted(path.name for path in tree.glob("fedtune-edge")) == ["fedtune-edge"]
            left = [path for path in (fed.folder / name).rglob("*") if path.name.startswith((".new", "tmp", ".part"))]
            assert not left
        assert rounds_of(fed)[-1]["state_digest"] == usual["last"]
        assert not processes_of(str(tmp_path))
    cases(KILLS)


def wait(fed: Federation, seconds: float) -> None:
    """Let time pass: a moment at random is what is wanted."""
    with fed.news:
        fed.news.wait_for(lambda: False, seconds)


def wait_for_end(text: str) -> None:
    """Wait until no process has a text in its command line: one that trains ends when its parent has gone."""
    import time

    limit = time.monotonic() + END_S
    while left := processes_of(text):
        assert time.monotonic() < limit, f"orphans: {left}"


def check_no_round_was_trained_twice(fed: Federation, name: str) -> None:
    """An order whose reply was stored is never done again: by the site's own log, over all its lives."""
    sent = set()
    for event in lines(fed, name):
        if event.get("event") == "sending":
            sent.add(event["round"])
        if event.get("event") == "asked":
            assert event["round"] not in sent, event


def lines(fed: Federation, name: str) -> Iterator[Mapping[str, Any]]:
    for line in fed.lines[name]:
        if line.startswith("{"):
            yield json.loads(line)
