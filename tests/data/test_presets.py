from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from fedtune.data.presets import PRESETS, columns_of
from fedtune.data.settings import DataSettings, PresetName, Split
from fedtune.data.source import read_source
from fedtune.errors import ConfigError

ONE = Split("iid", clients=1)


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_name_has_its_columns() -> None:
    assert set(PRESETS) == set(get_args(PresetName))
    assert all({"instruction", "output"} <= preset.columns.keys() for preset in PRESETS.values())
    assert all(len(preset.revision or "0" * 40) == 40 for preset in PRESETS.values())


@pytest.mark.parametrize(
    ("preset", "row"),
    [
        ("dolly", {"instruction": "q", "context": "c", "response": "a", "category": "qa"}),
        ("dolly", {"instruction": "q", "input": "c", "output": "a"}),
        ("gsm8k", {"question": "q", "answer": "a"}),
        ("alpaca", {"instruction": "q", "input": "c", "output": "a", "text": "the whole prompt"}),
        ("code-search-net", {"docstring": "q", "language": "c", "code": "a", "repo": "r"}),
        ("code-search-net", {"func_documentation_string": "q", "language": "c", "func_code_string": "a"}),
    ],
)
def test_a_local_copy_is_read_under_the_published_and_the_hubs_names(
    preset: PresetName, row: dict[str, str], tmp_path: Path
) -> None:
    write(tmp_path / "x.jsonl", row)
    rows = read_source(DataSettings("x.jsonl", ONE, preset=preset), tmp_path, task="causal").rows
    expected = {"instruction": "q", "output": "a"} | ({} if preset == "gsm8k" else {"input": "c"})
    assert {name: rows.column(name)[0] for name in rows.names} == expected


def test_a_mapping_of_the_recipe_comes_first(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", {"question": "q", "answer": "a", "short": "s"})
    settings = DataSettings("x.jsonl", ONE, preset="gsm8k", fields={"output": "short"})
    assert read_source(settings, tmp_path, task="causal").rows.column("output") == ["s"]


def test_what_a_recipe_maps_is_not_looked_for_under_the_names_of_the_preset(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", {"prompt": "q", "good": "a", "bad": "b"})
    fields: Any = {"instruction": "prompt", "chosen": "good", "rejected": "bad"}
    settings = DataSettings("pairs.jsonl", ONE, preset="alpaca", template="alpaca", fields=fields)
    rows = read_source(settings, tmp_path, task="causal").rows
    assert {name: rows.column(name) for name in rows.names} == {
        "instruction": ["q"],
        "output": ["a"],
        "rejected": ["b"],
    }


def test_other_columns_are_refused_with_those_that_the_name_has(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", {"question": "q", "text": "a"})
    with pytest.raises(ConfigError, match=r"data\.preset: expected a column answer or output, as gsm8k has; got quest"):
        read_source(DataSettings("x.jsonl", ONE, preset="gsm8k"), tmp_path, task="causal")
    assert columns_of("gsm8k", ["question", "answer", "input"], "x")["input"] == "input"


def test_what_cannot_be_reached_names_the_file_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        raise ConnectionError("no way to the hub")

    monkeypatch.setattr("fedtune.data.stored.load_dataset", load_dataset)
    settings = DataSettings("openai/gsm8k", ONE, preset="gsm8k", subset="main", revision="e53f")
    text = r"name a local copy in data\.source: train\.jsonl, from github\.com/openai/grade-school-math"
    with pytest.raises(ConfigError, match=rf"no way to the hub.*{text}"):
        read_source(settings, tmp_path, task="causal")
    assert asked == [(("openai/gsm8k", "main"), {"split": "train", "revision": "e53f"})]
    with pytest.raises(ConfigError, match=r"rosetta_alpaca\.json, from github\.com/sahil280114/codealpaca"):
        read_source(DataSettings("rosetta_alpaca.json", ONE, preset="rosetta"), tmp_path, task="causal")
