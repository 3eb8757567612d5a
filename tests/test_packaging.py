"""Wheel and sdist build without a network, and what a fresh environment installs from them works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import bind, render

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
OTHERS = ("3.12", "3.13")
"""Versions of Python beside the one that the tests run in; the least is `requires-python`."""
IMPORTER = """
import importlib, json, pkgutil, sys
import fedtune

imported, lacking = [], {}
for module in pkgutil.walk_packages(fedtune.__path__, "fedtune.", onerror=lambda name: None):
    try:
        importlib.import_module(module.name)
        imported.append(module.name)
    except ModuleNotFoundError as error:
        lacking[module.name] = error.name
print(json.dumps([fedtune.__file__, imported, lacking]))
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Return what a command prints, in an environment that does not find the working tree by itself."""
    bare = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=bare | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (archive,) = folder.glob("fedtune-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from what the sdist holds and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    (built,) = folder.glob("fedtune-*.whl")
    return built


def installed(python: str | Path, wheel: Path, folder: Path) -> Path:
    """Install the wheel alone into a new environment of an interpreter, and return the folder of its programs."""
    run(python, "-m", "venv", folder, cwd=folder.parent)
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps")
    run(folder / "bin" / "python", *pip, wheel, cwd=folder.parent)
    return folder / "bin"


def test_the_wheel_holds_the_package_and_nothing_beside_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fedtune"}
    tracked = run("git", "ls-files", "fedtune", cwd=ROOT).splitlines() if (ROOT / ".git").exists() else []
    assert set(tracked) <= names


def test_a_fresh_environment_gives_help_and_a_run(wheel: Path, tiny_recipe: Mapping[str, Any], tmp_path: Path) -> None:
    """Its dependencies are those of the environment that runs the tests; the package is the wheel's."""
    programs = installed(sys.executable, wheel, tmp_path / "fresh")
    (site,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
    # After the new environment's own packages, and without the links of an editable install.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where, imported, lacking = json.loads(run(programs / "python", "-W", "ignore", "-c", IMPORTER, cwd=tmp_path))
    assert Path(where).is_relative_to(site)
    assert len(imported) > 150
    assert set(lacking.values()) <= {"ray"}
    assert "Usage: fedtune demo" in run(programs / "fedtune", "demo", "--help", cwd=tmp_path, COLUMNS="100")
    (tmp_path / "tiny.toml").write_text(render(bind(dict(tiny_recipe))))
    out = run(programs / "fedtune", "simulate", "tiny.toml", "--out", "run", "--json", cwd=tmp_path)
    assert json.loads(out)["state"] == "finished"


def interpreter(version: str) -> str | None:
    """Return an interpreter of a version: on the path, or one that pyenv has installed."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    places = [shutil.which(f"python{version}"), *map(str, sorted(root.glob(f"{version}.*/bin/python{version}")))]
    for place in filter(None, places):
        # pyenv puts programs on the path that only say which versions there are.
        asked = subprocess.run(
            [place, "-c", "import ensurepip, sys; print(*sys.version_info[:2], sep='.')"],
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.returncode == 0 and asked.stdout.strip() == version:
            return place
    return None


@pytest.mark.parametrize("version", OTHERS)
def test_another_python_compiles_every_module_and_imports_those_that_need_no_package(
    version: str, wheel: Path, tmp_path: Path
) -> None:
    """Without the dependencies, which this machine has for one version alone: syntax, and the standard library."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"needs Python {version}")
    programs = installed(python, wheel, tmp_path / "fresh")
    (site,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
    compiler = ("-W", "error", "-m", "compileall", "-q", "-f", site / "fedtune")
    run(programs / "python", *compiler, cwd=tmp_path)
    _, imported, lacking = json.loads(run(programs / "python", "-W", "error", "-c", IMPORTER, cwd=tmp_path))
    assert {"fedtune.errors", "fedtune.runs.demo"} <= set(imported)
    assert not {name for name in lacking.values() if name.startswith("fedtune")}
