"""A run has one result, an adapter or seeds, and whoever reads it need not know which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedtune.errors import StoreError
from fedtune.lora.adapter import Factors, pack
from fedtune.methods.method import GlobalModel
from fedtune.store import peft, result
from fedtune.tensors import digest
from tests.store.test_seeds import change

ADAPTER = {"q": Factors(a=np.ones((2, 3), np.float32), b=np.full((4, 2), 0.5, np.float32))}
TARGET = peft.Target(base="base", revision=None, task="causal", fan_in_fan_out=False, saved_modules=())
ADAPTED, SEEDED = GlobalModel(ADAPTER), GlobalModel(seeds=change())


def test_an_adapter_lies_in_one_folder_and_seeds_in_another(tmp_path: Path) -> None:
    assert result.folder(tmp_path) == tmp_path / "adapter"  # where it would lie
    assert result.write(tmp_path, ADAPTED, TARGET, {"round": 1}) == tmp_path / "adapter" == result.folder(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    assert result.write(other, SEEDED, TARGET, {"round": 1}) == other / "seeds" == result.folder(other)
    assert not (other / "adapter").exists()


@pytest.mark.parametrize("tuned", [ADAPTED, SEEDED], ids=["adapter", "seeds"])
def test_what_is_read_has_the_digest_of_what_was_written(tuned: GlobalModel, tmp_path: Path) -> None:
    result.write(tmp_path, tuned, TARGET, {"round": 7})
    found, origin = result.read(tmp_path)
    assert (found.seeds is None) == (tuned.seeds is None)
    assert origin["round"] == 7
    assert result.digest(found) == result.digest(tuned)


def test_the_digest_of_seeds_is_the_ledger_s_and_that_of_an_adapter_its_tensors_s() -> None:
    assert SEEDED.seeds is not None
    assert result.digest(SEEDED) == SEEDED.seeds.ledger.digest.hex()
    assert result.digest(ADAPTED) == digest(pack(ADAPTER))
    moved = replace(SEEDED.seeds.ledger, accumulators=np.ones(16, np.int32))
    assert result.digest(GlobalModel(seeds=replace(SEEDED.seeds, ledger=moved))) != result.digest(SEEDED)


def test_a_module_that_changes_nothing_is_not_written_and_does_not_count(tmp_path: Path) -> None:
    idle = {**ADAPTER, "v": Factors(a=np.ones((2, 3), np.float32), b=np.zeros((4, 2), np.float32))}
    assert result.digest(GlobalModel(idle)) == result.digest(ADAPTED)
    result.write(tmp_path, GlobalModel(idle), TARGET, {})
    assert result.digest(result.read(tmp_path)[0]) == result.digest(ADAPTED)


def test_a_run_without_a_result_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="expected an adapter"):
        result.read(tmp_path)
