"""Installs small packages into a folder of the search path, as pip would."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pytest

EXAMPLE = Path(__file__).parent / "example_plugin"
Install: TypeAlias = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """A function that installs a package of one module; it is uninstalled after the test."""
    modules = []

    def write(name: str, source: str, entry_points: Mapping[str, Mapping[str, str]]) -> None:
        folder = tmp_path / f"site-{name}"
        info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [
            f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in own.items()) for group, own in entry_points.items()
        ]
        (info / "entry_points.txt").write_text("\n".join(lines))
        modules.append(name.replace("-", "_"))
        (folder / f"{modules[-1]}.py").write_text(source)
        monkeypatch.syspath_prepend(str(folder))

    yield write
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def example(install: Install) -> None:
    """The example package, installed."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    install(project["name"], (EXAMPLE / "example_plugin.py").read_text(), project["entry-points"])


@pytest.fixture
def module(example: None) -> Any:
    """The example package's module."""
    import importlib

    return importlib.import_module("example_plugin")


@pytest.fixture
def recipe(tables: dict[str, Any]) -> dict[str, Any]:
    """The tiny recipe for clients of one rank."""
    return {**tables, "override": []}
