"""A run with a repair adapter: exported for the structure that it is of, and kept out of everything that is whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fedtune
from fedtune.errors import ConfigError
from fedtune.lora.adapter import delta
from fedtune.runs.trained_run import load_run
from fedtune.store import peft
from fedtune.store.peft_import import read_adapter
from tests.conftest import Simulated
from tests.runs.conftest import Tables, spine

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_a_recipe_folder_with_the_repair_adapter_is_no_start_and_no_part_of_a_whole_adapter(
    tables: Tables, tmp_path: Path, simulated: Simulated
) -> None:
    run = simulated(spine(tables, pruning={"adapters": "two"}, rounds={"count": 2}), tmp_path / "run")
    recipe = next(fedtune.deploy(run.path).glob("*/recipe"))
    whole, with_repair = peft.read(run.adapter)[0], peft.read(recipe)[0]
    second = load_run(run.path).tuned.second
    name = next(iter(second))
    expected = delta(whole[name]) + delta(second[name])
    assert np.allclose(delta(with_repair[name]), expected, atol=1e-6)
    assert np.abs(delta(second[name])).max() > 0
    start = {"start": str(recipe), "rank": 4, "targets": ["all-linear"]}
    with pytest.raises(ConfigError, match=r"an adapter of the whole base; got one of a pruned model alone"):
        fedtune.simulate(tables | {"adapter": start}, out=tmp_path / "again")
    with pytest.raises(ConfigError, match=r"an adapter of the whole base"):
        fedtune.merge([recipe, run.adapter], out=tmp_path / "merged")
    assert read_adapter(run.path).adapter.keys() == whole.keys()
    fedtune.load_pruned(recipe)
