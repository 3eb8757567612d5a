"""A pruned run scored whole, as clients trained it, and as it is deployed."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedtune
from fedtune import api
from fedtune.errors import ConfigError
from fedtune.runs import pruned_scores
from tests.runs.conftest import Tables, spine

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_three_views_of_one_change(shrunk: api.Run) -> None:
    scores = pruned_scores.views(shrunk.path)
    assert scores["deployed"].keys() == {"0.5"}
    whole, half = scores["whole"], scores["deployed"]["0.5"]
    assert whole["loss"] == pytest.approx(fedtune.evaluate(shrunk.path)["after"]["loss"], rel=1e-5)
    assert half["sparsity"] == pytest.approx(0.5, abs=0.1)
    assert half["parameters"] < whole["parameters"]
    assert half["forward_ms"] > 0
    assert scores["clients"].keys() == {"client-0", "client-1", "client-2"}
    assert pruned_scores.views(shrunk.path, ratios=[0.25])["deployed"].keys() == {"0.25"}


def test_without_test_data_the_models_are_timed_and_not_scored(tables: Tables, tmp_path: Path) -> None:
    bare = spine(tables, data={"held_out": 0.0}, rounds={"count": 3})
    bare["data"].pop("test", None)
    ran = fedtune.simulate(bare, out=tmp_path / "run")
    scores = fedtune.views(ran.path)
    assert "loss" not in scores["whole"]
    assert scores["whole"]["forward_ms"] > 0
    with pytest.raises(ConfigError, match=r"ratio: expected numbers from 0 to 0\.875; got 5"):
        fedtune.views(ran.path, ratios=[5.0, 0.5])
