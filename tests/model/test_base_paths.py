from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.errors import ConfigError
from fedtune.model.base_paths import local_base
from fedtune.model.settings import ModelSettings


def test_folders_and_gguf_files_are_local_and_other_names_are_the_hubs(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "m.gguf").write_bytes(b"")
    for name in ("model", "m.gguf"):
        assert local_base(ModelSettings(base=name), tmp_path) == tmp_path / name
    for name in ("gpt2", "someone/model"):
        assert local_base(ModelSettings(base=name), tmp_path) is None


@pytest.mark.parametrize("name", ["./model", "~/none/at/all", "a/b/c", "notes.txt"])
def test_a_path_to_nothing_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match=r"model\.base: expected a folder with config\.json.*check the path"):
        local_base(ModelSettings(base=name), tmp_path)
