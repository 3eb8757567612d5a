"""A client's personal states: the last two rounds, none that is damaged or another's, and only for their owner."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedtune.client.personal_state import PersonalState, StateFolder, client_folder
from fedtune.errors import ClientError


def state(round: int, value: float = 1.0, client: str = "ann") -> PersonalState:
    return PersonalState(client, round, "ditto", 2.0, factors={"x.b": np.full((3, 2), value, np.float32)})


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    return StateFolder(tmp_path / "personal")


def rounds(folder: StateFolder) -> list[int]:
    return sorted(int(path.name[:6]) for path in folder.path.iterdir())


def test_a_state_comes_back_bit_for_bit_with_the_digest_that_was_stated(folder: StateFolder) -> None:
    assert folder.load("ann", before=9) is None
    digest = folder.store(state(1, value=0.1))
    stored = folder.load("ann", before=2)
    assert stored is not None
    assert (stored.digest, len(digest)) == (digest, 8)
    assert stored.state.factors["x.b"].tobytes() == state(1, value=0.1).factors["x.b"].tobytes()
    assert replace(stored.state, factors={}) == replace(state(1), factors={})


def test_a_round_that_is_done_again_starts_from_the_same_state(folder: StateFolder) -> None:
    for round in (1, 4, 7):
        folder.store(state(round, value=round))
    assert rounds(folder) == [4, 7]  # of the last two in which the client took part
    again = folder.load("ann", before=7)
    assert again is not None
    assert again.state.round == 4
    folder.store(state(7, value=8.0))  # on another machine the same round may come out otherwise
    assert rounds(folder) == [4, 7]
    assert float(folder.load("ann", before=8).state.factors["x.b"][0, 0]) == 8.0  # type: ignore[union-attr]


def test_states_of_rounds_that_a_server_has_taken_back_go(folder: StateFolder) -> None:
    for round in (1, 2, 3):
        folder.store(state(round))
    folder.store(state(3))
    folder.store(state(2))
    assert rounds(folder) == [2]
    assert folder.load("ann", before=2) is None


def test_what_is_damaged_or_of_another_client_is_none(folder: StateFolder) -> None:
    folder.store(state(1))
    assert folder.load("bob", before=2) is None
    [path] = folder.path.iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # still a state, of other numbers
    path.write_bytes(bytes(data))
    assert folder.load("ann", before=2) is None
    path.write_bytes(b"none")
    assert folder.load("ann", before=2) is None


def test_numbers_that_are_not_finite_are_not_stored(folder: StateFolder) -> None:
    folder.store(state(1))
    with pytest.raises(ClientError, match=r"ann: its personal model: .*lower personal\.rate"):
        folder.store(state(2, value=np.nan))
    assert rounds(folder) == [1]


def test_only_the_owner_can_read_a_state(folder: StateFolder) -> None:
    folder.store(state(1))
    [path] = folder.path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_clients_of_a_simulation_have_a_folder_each_whatever_their_names(tmp_path: Path) -> None:
    names = ["a/b", "../a", "a", "A" * 500]
    folders = {client_folder(tmp_path, name).path for name in names}
    assert len(folders) == len(names)
    assert {path.parent for path in folders} == {tmp_path}
