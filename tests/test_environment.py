"""What works where nothing is installed but what the table `dependencies` of pyproject.toml asks for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedtune.config import bind, render
from fedtune.deployment.server_setup import data_at_sites
from tests.deployment.test_coordinator import RECIPE
from tests.deployment.test_join import SITE
from tests.link.link_server import run_link_server

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HIDE = """
import sys
from importlib.machinery import PathFinder

class Visible(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Visible
"""
EACH_MODULE = """
import importlib, json, pkgutil, fedtune
from fedtune.errors import ExtraError

without = {}
for module in pkgutil.walk_packages(fedtune.__path__, "fedtune.", onerror=lambda name: None):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        without[module.name] = error.name
    except ExtraError as error:
        without[module.name] = str(error)
print(json.dumps(without))
"""
MAIN = "from fedtune.cli.main import main\nsys.argv = ['fedtune', *ARGUMENTS]\nmain()"
LAZY = {
    "fedtune.data.arrow": "pyarrow",
    "fedtune.data.stored": "pyarrow",
    "fedtune.directions.moves_numba": "numba",
    "fedtune.directions.projection_numba": "numba",
    "fedtune.edge.onnx_runtime": "onnxruntime",
    "fedtune.model.onnx_graph": "onnx",
}
"""Modules that are imported where an optional package is used, and the package; the caller says what to do."""
OPTIONAL = {
    *("fedtune.cli.flower_client", "fedtune.cli.flower_server", "fedtune.link.server.metrics"),
    *("fedtune.deployment.coordinator", "fedtune.deployment.server_setup", "fedtune.directions.rebuild_numba"),
}
"""Modules beside those of fedtune.flower whose import names the missing extra."""


@cache
def core_packages() -> frozenset[str]:
    """Return the distributions that `pip install fedtune` brings, of the versions that are installed here."""
    seen, ahead = set[tuple[str, str]](), [Requirement(text) for text in PROJECT["dependencies"]]
    while ahead:
        wanted = ahead.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            try:
                further = requires(name) or []
            except PackageNotFoundError:
                continue  # of another platform
            ahead += [
                one for one in map(Requirement, further) if one.marker is None or one.marker.evaluate({"extra": extra})
            ]
    return frozenset(name for name, _ in seen)


def hidden_modules() -> set[str]:
    """Return the importable names of this environment that the core does not bring."""
    core = core_packages()
    return {
        module
        for module, distributions in packages_distributions().items()
        if module.isidentifier()
        and module != "fedtune"
        and not core & {canonicalize_name(distribution) for distribution in distributions}
    }


def run_without(*names: str, code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, and in those that it starts, that find no module of these names."""
    (cwd / "hidden").mkdir(exist_ok=True)
    # Before anything of the environment is imported, also in worker processes.
    (cwd / "hidden" / "sitecustomize.py").write_text(f"HIDDEN = {set(names)!r}\n{HIDE}")
    path = os.pathsep.join([str(cwd / "hidden"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "100", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def run_core(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command with the core's packages alone."""
    return run_without(*hidden_modules(), code=f"import sys\nARGUMENTS = {list(arguments)!r}\n{MAIN}", cwd=cwd)


def test_each_extra_is_hidden_here_and_the_core_is_not() -> None:
    """Else the tests below would show nothing."""
    hidden = hidden_modules()
    optional = {"flwr", "ray", "prometheus_client", "matplotlib", "datasets", "pyarrow", "numba", "optuna", "onnx"}
    assert optional | {"sklearn", "rouge_score", "tensorboard"} <= hidden
    assert not {"torch", "transformers", "peft", "grpc", "cryptography", "typer", "pydantic"} & hidden


@pytest.mark.slow
def test_modules_that_cannot_be_imported_without_an_extra_say_so(tmp_path: Path) -> None:
    done = run_without(*hidden_modules(), code=EACH_MODULE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    without: Mapping[str, str] = json.loads(done.stdout)
    sentences = {name: text for name, text in without.items() if " " in text}
    assert all(re.search(r'expected .*; got .*; run pip install "fedtune\[\w+\]"', text) for text in sentences.values())
    assert {name for name in sentences if not name.startswith("fedtune.flower")} == OPTIONAL
    assert without.keys() - sentences.keys() <= LAZY.keys(), without


def test_a_site_joins_with_the_core_alone(tmp_path: Path) -> None:
    shown = run_core("join", "--help", cwd=tmp_path)
    assert "Usage: fedtune join" in shown.stdout, shown.stderr
    with run_link_server(tmp_path, recipe=render(data_at_sites(RECIPE))) as running:
        site = tmp_path / "site-a" / "site.toml"
        site.write_text(SITE.replace("localhost:1", f"localhost:{running.port}"))
        asked = run_core("join", str(site), "--dry-run", "--json", cwd=tmp_path)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert json.loads(asked.stdout)["allowed"]


def test_a_simulation_runs_with_the_core_alone(tiny_recipe: Mapping[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(render(bind(dict(tiny_recipe))))
    done = run_core("simulate", "tiny.toml", "--out", "run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["state"] == "finished"
    assert 'run pip install "fedtune[report]"' in run_core("report", "run", cwd=tmp_path).stderr
    page = (tmp_path / "run" / "report.html").read_text()
    assert "run pip install &#34;fedtune[report]&#34;" in page
    assert ("Losses by round" in page, "<svg" in page) == (True, False)


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        pytest.param(("serve", "tiny.toml"), "flower", id="serve"),
        pytest.param(("simulate", "tiny.toml", "--engine", "ray"), "ray", id="ray", marks=pytest.mark.slow),
    ],
)
def test_a_command_that_needs_flower_names_the_extra(
    words: tuple[str, ...], extra: str, tiny_recipe: Mapping[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "tiny.toml").write_text(render(bind(dict(tiny_recipe))))
    done = run_core(*words, cwd=tmp_path)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("fedtune: expected the package flwr")
    assert f'"fedtune[{extra}]"' in line


def test_a_split_in_parquet_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n' * 12)
    (tmp_path / "recipe.toml").write_text('model = { base = "embedded" }\ndata = { source = "rows.jsonl" }\n')
    done = run_core("split", "recipe.toml", "--out", "parts", "--form", "parquet", cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        'fedtune: --form parquet: expected the package pyarrow; got none; run pip install "fedtune[data]", '
        "or leave --form out for JSON lines",
    )
    assert not (tmp_path / "parts").exists()
