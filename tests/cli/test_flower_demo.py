from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.cli.flower_demo import demo_recipe, home
from fedtune.config import bind
from fedtune.runs.demo_code import CLIENTS


def test_the_demo_is_written_once_below_fedtunes_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    path = demo_recipe()
    assert path.is_relative_to(tmp_path)
    assert {file.stem for file in (path.parent / "data").iterdir()} == set(CLIENTS)
    assert bind(path).model.base == "embedded"
    path.write_text("mine")
    assert demo_recipe().read_text() == "mine"


def test_fedtunes_home_is_a_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTUNE_HOME", raising=False)
    assert home() == Path.home() / ".fedtune"
