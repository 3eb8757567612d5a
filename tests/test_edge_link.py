"""Devices and clients with torch in one run over the gRPC link, with the real processes of both."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from fedtune.edge.current_model import read_model
from fedtune.runs.edge_bundle import export_bundle
from tests.cli.test_flower_server import toml
from tests.link.federation import Federation, federation

COMMAND = "import sys; from fedtune.cli.edge import main; sys.exit(main())"
FULL, SMALL = "full", ("small-a", "small-b")
NAMES = (FULL, *SMALL)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(stories, tmp_path_factory.mktemp("edge") / "bundle").path


def recipe(stories: Path, **rounds: Any) -> str:
    return toml(
        {
            "name": "devices",
            "model": {"base": str(stories), "threads": 1},
            "method": {"name": "fedkseed", "bank": "kron", "seeds": 1024, "perturbation": 2e-3},
            "client": {"steps": 32, "batch": 4, "learning_rate": 3e-5},
            "rounds": {"count": 4, "min_clients": 3, **rounds},
            "data": {"template": "plain", "max_tokens": 96},
            "evaluate": {"client_examples": 16},
        }
    )


def site_files(shared: Path, stories: Path, bundle: Path) -> dict[str, str]:
    """Return the file of each site but for its name and link: rows of its own, and torch or a bundle."""
    files = {}
    for place, name in enumerate(NAMES):
        data = {
            "source": str(shared / "data" / "dolly" / "small_train.jsonl"),
            "template": "plain",
            "max_tokens": 96,
            "limit": 60,
        }
        tables: dict[str, Any] = {"seed": place, "model": {"base": str(bundle)}, "data": data}
        if name == FULL:
            tables |= {"model": {"base": str(stories)}, "adapter": {"targets": ["all-linear"]}}
        files[name] = toml(tables | {"policy": {"min_examples": 1, "unsigned_base": True}})
    return files


def join(fed: Federation, *names: str) -> None:
    for name in names:
        if name == FULL:
            fed.join(name)
        else:
            fed.start(name, "-c", COMMAND, "join", str(fed.folder / name / "site.toml"), "--log", "json")


def states(fed: Federation) -> list[str]:
    return [one["state"] for one in fed.events("server", "committed")]


def model_bytes(fed: Federation, name: str) -> bytes:
    """Return the model that a device has on its disk."""
    model = read_model(fed.folder / name / "state")
    assert model is not None
    return model.ledger.encode()


def test_two_devices_and_a_client_with_torch_hold_one_model_and_it_learns(
    shared: Path, stories: Path, bundle: Path, tmp_path: Path
) -> None:
    with federation(tmp_path, recipe(stories), NAMES, site=site_files(shared, stories, bundle)) as fed:
        fed.serve()
        join(fed, *NAMES)
        assert fed.exit_statuses("server", *NAMES) == [0] * 4, fed.log("server") + fed.log("small-a")
        # The server uses an update only if its client states the state and the block checks that follow from it.
        assert [one["updates"] for one in fed.events("server", "committed")] == [3] * 4
        assert not [one for name in NAMES for one in fed.events(name, "refused")]
        summary = json.loads((fed.run / "summary.json").read_text())
        # What the last request for scores brought is what the last round has left.
        result = (fed.run / "seeds" / "ledger.ftks").read_bytes()
        assert {model_bytes(fed, name) for name in SMALL} == {result}
        assert not [one for name in NAMES for one in fed.events(name, "declined")]
        before, after = (
            {name: scores["loss"] for name, scores in summary[when]["held_out"].items()} for when in ("before", "after")
        )
        assert before.keys() == set(NAMES)
        for name in NAMES:
            assert after[name] < before[name] - 0.02, (before, after)
        for name in SMALL:
            (given,) = fed.events(name, "result")
            assert (Path(given["path"]) / "ledger.ftks").read_bytes() == result


def test_a_late_device_and_one_that_missed_rounds_take_part_at_once(
    shared: Path, stories: Path, bundle: Path, tmp_path: Path
) -> None:
    text, files = recipe(stories, count=12, min_clients=1), site_files(shared, stories, bundle)
    # A device that was killed is not waited for.
    with federation(tmp_path, text, NAMES, site=files, server={"lease_s": 2.0, "lost_s": 4.0, "hold_s": 1.0}) as fed:
        fed.serve("--expect", "2")
        join(fed, FULL, "small-a")
        fed.until(lambda: len(states(fed)) >= 2)
        join(fed, "small-b")
        fed.until(lambda: fed.events("small-b", "trained"))
        late = fed.events("small-b", "trained")[0]["round"]
        assert late > 2
        fed.kill("small-a", signal.SIGKILL)
        missed = len(states(fed))
        fed.until(lambda: len(states(fed)) >= missed + 2)
        join(fed, "small-a")
        assert fed.exit_statuses("server", *NAMES) == [0] * 4, fed.log("server")
        rounds = [one["round"] for one in fed.events("small-a", "trained")]
        assert max(rounds) > missed + 2
        # Each of its orders was answered with scalars: none had to be sent again in another form.
        for name in SMALL:
            assert {one["verdict"] for one in fed.events(name, "receipt")} <= {"ACCEPTED", "NOTED"}
            assert model_bytes(fed, name) == (fed.run / "seeds" / "ledger.ftks").read_bytes()


def test_a_run_of_lora_ends_a_device_with_one_line_and_status_2(
    shared: Path, stories: Path, bundle: Path, tmp_path: Path
) -> None:
    tables = {
        "name": "lora",
        "model": {"base": str(stories)},
        "method": {"name": "flora"},
        "client": {"steps": 1, "batch": 1, "learning_rate": 1e-3},
        "rounds": {"count": 1},
        "data": {"template": "plain"},
    }
    with federation(tmp_path, toml(tables), NAMES, site=site_files(shared, stories, bundle)) as fed:
        fed.serve()
        join(fed, "small-a")
        assert fed.exit_statuses("small-a") == [2]
        said = [line for line in fed.log("small-a").splitlines() if not line.startswith("{")]
        assert said[0] == "fedtune-edge: the server's recipe: 1 fault"
        assert "take part with fedtune-client" in said[1]
        assert len(said) == 2
