from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.directions.bank import BANKS
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.edge.current_model import NAME, CurrentModel, read_model, store_model
from fedtune.errors import StoreError
from fedtune.store import files

LEDGER = SeedLedger(BANKS["kron"](16, 3), 12, 5, bytes(32), np.arange(16, dtype=np.int32))


def test_a_model_is_read_as_it_was_stored_and_by_its_owner_alone(tmp_path: Path) -> None:
    assert read_model(tmp_path) is None
    for round in (5, 6):
        model = CurrentModel(SeedLedger(LEDGER.bank, 12, round, bytes(32), LEDGER.accumulators), (0, 3, 70000))
        store_model(tmp_path, model)
        stored = read_model(tmp_path)
        assert stored is not None
        assert (stored.ledger.encode(), stored.trainable) == (model.ledger.encode(), model.trainable)
    assert (tmp_path / NAME).stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@given(st.data())
def test_every_changed_or_cut_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("state")
    store_model(folder, CurrentModel(LEDGER, (1, 2)))
    whole = (folder / NAME).read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    other = bytes([whole[place] ^ data.draw(st.integers(1, 255))])
    (folder / NAME).write_bytes(whole[:place] if cut else whole[:place] + other + whole[place + 1 :])
    with pytest.raises(StoreError, match="delete the file"):
        read_model(folder)


def test_a_write_that_fails_leaves_the_model_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_model(tmp_path, CurrentModel(LEDGER, (1,)))

    def full(descriptor: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(StoreError, match="free some space"):
        store_model(tmp_path, CurrentModel(LEDGER, (2,)))
    stored = read_model(tmp_path)
    assert stored is not None
    assert stored.trainable == (1,)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
