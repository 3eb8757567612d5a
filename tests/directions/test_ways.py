from __future__ import annotations

import pytest

from fedtune.directions.rebuild import rebuild
from fedtune.directions.ways import fastest


def test_the_fastest_way_is_numbas_where_it_is_installed() -> None:
    pytest.importorskip("numba")
    from fedtune.directions import numba_rebuild

    assert fastest() is numba_rebuild.rebuild


def test_without_numba_it_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert fastest() is rebuild
