"""Which runtime runs a bundle, and what a program without it says."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.edge.bundle import read_bundle
from fedtune.edge.runtime import load_runtime
from fedtune.errors import ConfigError
from tests.edge.bundles import write_bundle


@pytest.mark.parametrize("name", ["onnx", "gguf"])
def test_a_bundle_is_run_by_the_runtime_that_it_names(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = SimpleNamespace(load=lambda bundle, *, threads: (name, bundle.base_name, threads))
    monkeypatch.setitem(sys.modules, f"fedtune.edge.{name}_runtime", module)
    bundle = read_bundle(write_bundle(tmp_path / "bundle", runtime=name))
    assert load_runtime(bundle, threads=3) == (name, "tiny", 3)  # type: ignore[comparison-overlap]


def test_a_program_without_the_runtime_says_which_one_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fedtune.edge.gguf_runtime", None)
    bundle = read_bundle(write_bundle(tmp_path / "bundle", runtime="gguf"))
    with pytest.raises(ConfigError, match=r"one for gguf; .*fedtune\[edge-gguf\]"):
        load_runtime(bundle, threads=1)
