"""The built file of a device, without any Python: a federation with torch clients, and fifty losses of power."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.config import bind
from fedtune.runs.edge_bundle import export_bundle
from fedtune.seeds import derive, generator
from tests.cli.test_flower_server import toml
from tests.edge_binary import (
    answers_of,
    bare_environment,
    built_file,
    join_binary,
    kill_group,
    processes_of,
    states_by_round,
)
from tests.link.federation import END_S, Federation, federation

pytestmark = pytest.mark.slow
EDGE, TORCH = ("0", "1"), ("2", "3")
"""Names that the data's own split gives."""
KILLS, ROUNDS = 50, 8


@pytest.fixture(scope="module")
def binary() -> Path:
    return built_file()


def recipe(shared: Path, stories: Path, names: Sequence[str], *, rounds: int, steps: int) -> dict[str, Any]:
    return {
        "name": "devices",
        "model": {"base": str(stories), "threads": 1},
        "method": {"name": "fedkseed", "bank": "kron", "seeds": 256, "perturbation": 1e-3},
        "client": {"steps": steps, "batch": 4, "learning_rate": 1e-4},
        "rounds": {"count": rounds, "min_clients": len(names)},
        "data": {
            "source": str(shared / "data" / "dolly" / "small_train.jsonl"),
            "split": {"kind": "key", "by": "flora_client", "clients": len(names)},
            "template": "plain",
            "max_tokens": 96,
            "limit": 400,
        },
        "evaluate": {"every": 0, "examples": 96, "client_examples": 24},
    }


def sites(tables: Mapping[str, Any], bundle: Path, names: Sequence[str]) -> Mapping[str, str]:
    """Return the sites' own files: a device names the bundle where the others name the model."""
    own = {"model": tables["model"], "data": tables["data"]}
    torch = toml({**own, "adapter": {"targets": ["all-linear"]}})
    device = toml({**own, "model": {"base": str(bundle), "threads": 1}})
    return {name: device if name in EDGE else torch for name in names}


@pytest.fixture
def devices(shared: Path, stories: Path) -> Callable[..., Any]:
    """Open a federation whose devices hold a bundle that its coordinator has signed."""

    def opened(folder: Path, names: Sequence[str], **settings: int) -> Any:
        folder.mkdir(exist_ok=True)
        tables = recipe(shared, stories, names, **settings)
        return federation(folder, toml(tables), names, site=sites(tables, folder / "bundle", names))

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
    with devices(tmp_path, names, rounds=8, steps=16) as fed:
        start(fed, stories)
        for name in EDGE:
            join_binary(fed, name, binary, tmp_path / "home")
        for name in TORCH:
            fed.join(name)
        assert fed.exit_statuses("server", *names) == [0] * 5, {name: fed.log(name) for name in fed.lines}
        assert [line["updates"] for line in fed.events("server", "committed")] == [4] * 8
        states = {name: states_by_round(fed, name) for name in names}
        assert states[EDGE[0]] == states[EDGE[1]] == states[TORCH[0]] == states[TORCH[1]]
        assert sorted(states[EDGE[0]]) == list(range(1, 9))
        assert len(set(states[EDGE[0]].values())) >= 7  # the first round measures and moves nothing
        assert not processes_of(str(tmp_path))
        summary = json.loads((fed.run / "summary.json").read_text())
    # Other seeds draw other directions and other rows, so that falls are compared; on as many rows as the sites score.
    tables = recipe(shared, stories, names, rounds=8, steps=16)
    falls = [
        fall_of(fedtune.simulate(bind({**tables, "seed": seed}), out=tmp_path / f"seed-{seed}").summary)
        for seed in (1, 2, 3)
    ]
    print(f"loss falls by {fall_of(summary):.4f}; with other seeds in process by {[f'{fall:.4f}' for fall in falls]}")
    assert fall_of(summary) > 2 * (max(falls) - min(falls))
    assert fall_of(summary) > 0.01


def fall_of(summary: Mapping[str, Any]) -> float:
    return float(summary["before"]["test"]["loss"] - summary["after"]["test"]["loss"])


@pytest.mark.guarantee("G12")
def test_fifty_losses_of_power_change_no_bit_and_leave_nothing(
    binary: Path, stories: Path, tmp_path: Path, devices: Callable[..., Any], cases: Callable[[int], None]
) -> None:
    with devices(tmp_path / "whole", EDGE, rounds=ROUNDS, steps=32) as fed:
        start(fed, stories)
        for name in EDGE:
            join_binary(fed, name, binary, tmp_path / "home")
        assert fed.exit_statuses("server", *EDGE) == [0] * 3, fed.log("server")
        usual = states_by_round(fed, EDGE[0]), rounds_of(fed)[-1]["state_digest"]
    rng, kills = generator(derive(19, "power")), 0
    for run in count():
        folder = tmp_path / f"killed-{run}"
        homes = {name: folder / "homes" / name for name in EDGE}
        lives: list[tuple[str, int, Mapping[str, str]]] = []
        with devices(folder, EDGE, rounds=ROUNDS, steps=32) as fed:
            start(fed, stories)
            for name in EDGE:
                join_binary(fed, name, binary, homes[name])
            while kills < KILLS and not is_over_within(fed, float(rng.uniform(0, 4.0))):
                victim = EDGE[int(rng.integers(2))]
                kill_group(fed, victim)
                wait_for_end(str(folder / victim / "site.toml"))
                kills += 1
                lives.append((victim, len(fed.lines.get(victim, [])), answers_of(fed, victim)))
                join_binary(fed, victim, binary, homes[victim])
            assert fed.exit_statuses("server", *EDGE) == [0] * 3, fed.log("server")
            for name in EDGE:
                assert (states_by_round(fed, name), rounds_of(fed)[-1]["state_digest"]) == usual
                (tree,) = (homes[name] / "bin").iterdir()  # nothing of an unpacking that was killed
                assert (tree / "fedtune-edge").exists()
                state = fed.folder / name / "state"
                assert not [path for path in state.rglob("*") if path.name.startswith(".") or path.suffix == ".part"]
            check_nothing_was_computed_again(fed, lives)
        if kills == KILLS:
            break
    assert not processes_of(str(tmp_path))
    cases(KILLS)


def is_over_within(fed: Federation, seconds: float) -> bool:
    """Let time pass, since a moment at random is what is wanted; return whether the server has ended."""
    try:
        fed.processes["server"].wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def wait_for_end(text: str) -> None:
    """Wait until no process has a text in its command line: one that trains ends when its parent has gone."""
    limit = time.monotonic() + END_S
    while left := processes_of(text):
        assert time.monotonic() < limit, f"orphans: {left}"


def check_nothing_was_computed_again(fed: Federation, lives: Sequence[tuple[str, int, Mapping[str, str]]]) -> None:
    """An order whose reply was stored when a life ended is never done again, and the reply keeps its bytes.

    Args:
        fed: whose sites were killed.
        lives: of each, the site, how many lines it had written, and digests of its stored replies by order.
    """
    for name, position, stored in lives:
        assert stored.items() <= answers_of(fed, name).items()
        later = [json.loads(line) for line in fed.lines.get(name, [])[position:] if line.startswith("{")]
        assert not [event for event in later if event["event"] == "asked" and event["order"] in stored]
