"""Ledger, manifest and provenance of a run of seeds in one folder: what is read is what was written, or nothing is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.directions.bank import BANKS
from fedtune.directions.seed_ledger import SeedLedger, describe_base
from fedtune.directions.space import directions
from fedtune.errors import StoreError
from fedtune.methods.method import SeedModel
from fedtune.store import manifest, seeds

LISTED = describe_base({name: np.full((2, 3), value, np.float32) for value, name in enumerate(("a", "b", "layers.é"))})


def change(bank: str = "hadamard") -> SeedModel:
    sums = np.arange(-8, 8, dtype=np.int32)
    return SeedModel(SeedLedger(BANKS[bank](16, 2**64 - 1), 12, 5, LISTED.digest, sums), LISTED, (0, 2))


@pytest.mark.parametrize("bank", ["hadamard", "gaussian", "kron"])
def test_what_is_read_is_what_was_written(bank: str, tmp_path: Path) -> None:
    folder = seeds.write(tmp_path / "seeds", change(bank), {"round": 5, "labels": ["ü"]})
    assert folder == tmp_path / "seeds"
    found, origin = seeds.read(folder)
    assert found.ledger.encode() == change(bank).ledger.encode()
    assert (found.manifest, found.trainable) == (LISTED, (0, 2))
    assert origin == {"round": 5, "labels": ["ü"], "trainable": ["a", "layers.é"]}
    assert {path.name for path in folder.iterdir()} == {"ledger.ftks", "manifest.ftkm", "fedtune.json"}
    assert (folder / "ledger.ftks").stat().st_size == 60 + 4 * 16


def of_tensors(*ordinals: int) -> SeedModel:
    """A change by numbers of each tensor, over two banks."""
    bank = directions("kron", 4, [2**64 - 1, 7], "tensor", ordinals)
    sums = np.arange(bank.size, dtype=np.int32)
    return SeedModel(SeedLedger(bank, 12, 5, LISTED.digest, sums), LISTED, (0, 2))


def test_numbers_of_each_tensor_and_several_banks_are_read_as_they_were_written(tmp_path: Path) -> None:
    again, _ = seeds.read(seeds.write(tmp_path / "seeds", of_tensors(0, 2), {}))
    assert again.ledger.encode() == of_tensors(0, 2).ledger.encode()
    adapter = seeds.kron_adapter(again, transposed=False)
    assert {name: factors.a.shape[0] for name, factors in adapter.items()} == {"a": 4, "layers.é": 4}


@pytest.mark.parametrize("ordinals", [(0,), (0, 1), (0, 2, 9), (0, 2**32 - 1)])
def test_a_ledger_with_numbers_of_other_tensors_than_are_named_is_refused(
    ordinals: tuple[int, ...], tmp_path: Path
) -> None:
    folder = seeds.write(tmp_path / "seeds", of_tensors(*ordinals), {})
    with pytest.raises(StoreError, match="those that the ledger has numbers for"):
        seeds.read(folder)


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = seeds.write(tmp_path / "seeds", change("kron"), {"round": 4})
    (folder / "stray").write_text("")
    seeds.write(folder, change(), {"round": 5})
    assert seeds.read(folder)[1]["round"] == 5
    assert not (folder / "stray").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["seeds"]


def test_a_folder_without_a_ledger_says_how_to_get_one(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match=r"expected a seed ledger \(ledger\.ftks\); run fedtune simulate first"):
            seeds.read(path)


@pytest.mark.parametrize("file", ["ledger.ftks", "manifest.ftkm", "fedtune.json"])
def test_a_file_that_is_torn_or_missing_is_told_by_its_folder(file: str, tmp_path: Path) -> None:
    folder = seeds.write(tmp_path / "seeds", change(), {})
    whole = (folder / file).read_bytes()
    for length in range(0, len(whole) - 1, 7):
        (folder / file).write_bytes(whole[:length])
        with pytest.raises(StoreError, match=rf"seeds/{file}: expected .*; put back a copy"):
            seeds.read(folder)
    (folder / file).unlink()
    with pytest.raises(StoreError, match="seeds"):
        seeds.read(folder)


@pytest.mark.parametrize("facts", [{}, {"trainable": 3}, {"trainable": ["c"]}, {"trainable": [[]]}])
def test_a_provenance_that_names_no_tensors_of_the_base_is_refused(facts: Any, tmp_path: Path) -> None:
    folder = seeds.write(tmp_path / "seeds", change(), {})
    manifest.write(folder, facts)
    with pytest.raises(StoreError, match="expected whole files of one run"):
        seeds.read(folder)


def test_the_manifest_of_another_base_is_refused(tmp_path: Path) -> None:
    folder = seeds.write(tmp_path / "seeds", change(), {})
    other = describe_base({name: np.full((2, 3), 9, np.float32) for name in ("a", "b", "layers.é")})
    (folder / "manifest.ftkm").write_bytes(other.encode())
    with pytest.raises(StoreError, match=r"manifest\.ftkm: expected the digest"):
        seeds.read(folder)
    manifest.write(folder, manifest.parse((folder / manifest.NAME).read_bytes(), folder).facts)
    with pytest.raises(StoreError, match="expected the manifest that the ledger names; got another"):
        seeds.read(folder)


def test_provenance_is_text_that_others_can_read(tmp_path: Path) -> None:
    folder = seeds.write(tmp_path / "seeds", change(), {"name": "mine"})
    assert json.loads((folder / "fedtune.json").read_text(encoding="utf-8"))["name"] == "mine"
