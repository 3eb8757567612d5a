from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedtune.errors import ConfigError
from fedtune.flower import FedIT, FLoRA
from fedtune.flower.initial_arrays import read_arrays
from fedtune.flower.peft_records import from_record, to_record
from fedtune.lora.adapter import delta
from tests.flower.stock_app import LAYERS, NumpyClient, delta_of, first_state, grid_of


def saved(folder: Path, *, rounds: int = 1) -> FLoRA:
    strategy = FLoRA(alpha=16, ranks={"node-0": 2})
    grid = grid_of(NumpyClient(0), NumpyClient(1))
    strategy.start(grid=grid, initial_arrays=to_record(first_state(4)), num_rounds=rounds, timeout=1)
    strategy.save(folder)
    return strategy


def test_a_saved_run_is_read_back_as_the_same_change(tmp_path: Path) -> None:
    strategy = saved(tmp_path / "a")
    state = from_record(read_arrays(tmp_path / "a", alpha=32))
    rank = max(state.ranks.values())
    assert set(state.ranks.values()) == {rank}
    for name in LAYERS:
        whole = delta(strategy.adapter[name])
        assert np.abs(delta_of(state, name, 32 / rank) - whole).max() < 1e-6 * np.abs(whole).max()


def test_a_run_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    first = saved(tmp_path / "a")
    arrays = read_arrays(tmp_path / "a", alpha=16)
    rank = max(from_record(arrays).ranks.values())
    later = FLoRA(alpha=16)
    clients = [NumpyClient(0), NumpyClient(1)]
    later.start(grid=grid_of(*clients), initial_arrays=arrays, num_rounds=1, timeout=1)
    for name in LAYERS:
        whole = delta(first.adapter[name])
        assert np.abs(delta_of(clients[0].got[0], name, 16 / rank) - whole).max() < 1e-5 * np.abs(whole).max()


def test_rows_that_a_module_lacks_can_be_trained(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    state = from_record(read_arrays(tmp_path / "a", alpha=16, use_rslora=True))
    assert all(np.linalg.norm(state.factors[f"{name}.a"], axis=1).all() for name in LAYERS)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a PEFT adapter"):
        read_arrays(tmp_path, alpha=16)


def test_a_method_that_cannot_start_from_an_adapter_says_so(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    strategy = FedIT(alpha=16, ranks=1)
    with pytest.raises(ConfigError, match="expected at most rank 1"):
        strategy.start(grid=grid_of(), initial_arrays=read_arrays(tmp_path / "a", alpha=16), num_rounds=1)
