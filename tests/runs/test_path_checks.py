from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import bind
from fedtune.errors import ConfigError, ExtraError
from fedtune.runs.path_checks import check_paths


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"model": {"base": "./none"}}, r"model\.base: .*nothing at"),
        ({"data": {"source": "none.jsonl"}}, r"data\.source: .*'none\.jsonl'"),
        ({"data": {"test": ["none.jsonl"]}}, r"data\.test: .*'none\.jsonl'"),
    ],
)
def test_paths_to_nothing_are_refused_by_key(part: dict[str, Any], message: str, tables: dict[str, Any]) -> None:
    check_paths(bind(tables))
    recipe = bind({**tables, **{table: {**tables[table], **keys} for table, keys in part.items()}})
    with pytest.raises(ConfigError, match=message):
        check_paths(recipe)


def test_a_base_without_a_tokenizer_is_refused_and_what_has_none_of_its_own_is_left_to_its_loader(
    tmp_path: Path, tables: dict[str, Any]
) -> None:
    recipe = bind({**tables, "model": {**tables["model"], "base": str(tmp_path)}})
    check_paths(recipe)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.base: expected a tokenizer in .*; got none"):
        check_paths(recipe)
    for name in ("model.gguf", "adapter_config.json", "tokenizer.json"):
        (tmp_path / name).write_text("")
        check_paths(recipe)
        (tmp_path / name).unlink()


def test_an_engine_without_its_package_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tables: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExtraError, match=r"fedtune\[ray\]"):
        check_paths(bind({**tables, "engine": "ray"}))


def test_a_missing_file_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        'model = { base = "embedded" }\ndata = { source = "none.jsonl", split = { kind = "iid", clients = 2 } }\n'
    )
    code = (
        "import sys, fedtune\ntry: fedtune.simulate('r.toml')\nexcept fedtune.ConfigError as error: print(error)\n"
        "print(*({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    first, last = ended.stdout.splitlines()
    assert "data.source" in first
    assert last == ""
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]
    assert ended.stderr == ""
