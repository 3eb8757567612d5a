from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedtune
from fedtune import api
from fedtune.runs.deployed_scores import exported_scores
from fedtune.runs.trained_run import load_run

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_every_exported_model_is_scored_beside_the_whole_one(shrunk: api.Run, tmp_path: Path) -> None:
    folder = fedtune.deploy(shrunk.path, out=tmp_path / "deploy")
    told = json.loads((folder / "deploy.json").read_text())
    whole, small = told["whole"], told["ratios"]["0.5"]["measured"]
    assert small["parameters"] < whole["parameters"]
    assert small["megabytes"] == pytest.approx(4e-6 * small["parameters"], abs=1e-3)
    assert small["latency_ms"].keys() == {"prefill", "decode"}
    # As the run has scored the model that it deploys, and its whole model.
    assert small["scores"]["loss"] == pytest.approx(shrunk.summary["deployed"]["loss"], rel=1e-5)
    assert whole["scores"]["loss"] == pytest.approx(shrunk.summary["after"]["test"]["loss"], rel=1e-5)
    card = (folder / "README.md").read_text()
    assert f"| ratio-0.5 | {100 * told['ratios']['0.5']['sparsity']:.1f} % | {small['parameters']:,} |" in card
    assert "client-" not in card
    # In half the bytes: what is scored are the written files, and not the model in memory.
    short = fedtune.deploy(shrunk.path, out=tmp_path / "short", dtype="bfloat16")
    again = exported_scores(load_run(shrunk.path), short / "ratio-0.5" / "model", dtype="bfloat16")
    assert again["megabytes"] == pytest.approx(small["megabytes"] / 2, abs=1e-3)
    assert again["scores"]["loss"] == pytest.approx(small["scores"]["loss"], rel=0.05)
