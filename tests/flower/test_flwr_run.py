"""`flwr run` against a real SuperLink on loopback: the bundle in simulation, and the stub with two SuperNodes."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from flwr.cli.build import build_fab_from_disk

import fedtune
from fedtune.config import Recipe, bind, render
from fedtune.flower import ENVIRONMENT
from tests.cli.test_flower_server import site_files

ROOT = Path(__file__).parents[2]
STUB = ROOT / "server" / "superlink"
BIN = Path(sys.executable).parent


def bundle(folder: Path) -> set[str]:
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))) as archive:
        return set(archive.namelist())


# Flower asks pathspec for a pattern's old name.
OLD_NAME = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


@OLD_NAME
def test_the_bundle_holds_the_package_and_nothing_else() -> None:
    shipped = bundle(ROOT) - {"pyproject.toml", ".info/CONTENT"}
    assert shipped == {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedtune").rglob("*.py")}


@OLD_NAME
def test_the_stub_ships_no_code() -> None:
    assert bundle(STUB) == {"pyproject.toml", ".info/CONTENT"}


def test_the_stub_is_the_app_of_this_release() -> None:
    import tomllib

    ours, stub = (tomllib.loads((folder / "pyproject.toml").read_text()) for folder in (ROOT, STUB))
    for key in ("name", "version", "license"):
        assert stub["project"][key] == ours["project"][key]
    for key in ("publisher", "components", "config"):
        assert stub["tool"]["flwr"]["app"][key] == ours["tool"]["flwr"]["app"][key]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Loopback:
    """A SuperLink of its own, with nothing of the user's Flower."""

    def __init__(self, folder: Path, *, simulation: bool) -> None:
        self.folder, self.port = folder, free_port()
        self.home = folder / "home"
        self.home.mkdir()
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "RAY_", "FEDTUNE_"))
        } | {
            **ENVIRONMENT,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.home),
            "FEDTUNE_HOME": str(folder / "fedtune"),
            "PYTHONWARNINGS": "ignore",
        }
        self.simulation = simulation

    @contextmanager
    def started(self, *sites: Path) -> Iterator[None]:
        link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port)]
        link += ["--disable-runtime-dependency-installation", *(["--simulation"] if self.simulation else [])]
        with ExitStack() as stack:
            # The test's own folder lies too deep for Ray's sockets.
            self.environment["RAY_TMPDIR"] = stack.enter_context(TemporaryDirectory(prefix="ray-"))
            stack.enter_context(self.process("superlink", link))
            self.await_health()
            for site in sites:
                node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}"]
                node += ["--host", "127.0.0.1", "--port", str(free_port())]
                stack.enter_context(self.process(site.stem, [*node, "--node-config", f'fedtune-site="{site}"']))
            yield

    @contextmanager
    def process(self, name: str, command: Sequence[str]) -> Iterator[None]:
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
            try:
                yield
            finally:
                process.terminate()
                try:
                    process.wait(30)
                finally:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()

    def await_health(self) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                with urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (URLError, ConnectionError):
                time.sleep(0.1)
        raise TimeoutError((self.folder / "superlink.log").read_text())

    def run(self, app: Path, recipe: Recipe, *more: str, **config: str) -> str:
        run_config = self.folder / "run.toml"
        text = render(recipe)
        values = {"recipe": text, **config}
        run_config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
        done = subprocess.run(
            ["flwr", "run", str(app), "test", "--stream", "--run-config", str(run_config), *more],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        return done.stdout + done.stderr + "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def summary(self, recipe: Recipe) -> Mapping[str, Any]:
        loaded = json.loads((self.folder / "fedtune" / "runs" / recipe.name / "summary.json").read_text())
        assert isinstance(loaded, dict)
        return loaded


@pytest.mark.slow
def test_two_supernodes_with_files_of_their_own_train_as_in_simulation(tmp_path: Path, tables: dict[str, Any]) -> None:
    data = tables["data"] | {"split": tables["data"]["split"] | {"only": ["client-0", "client-1"]}}
    tables = tables | {"data": data, "override": tables["override"][:1]}
    recipe = bind(tables | {"rounds": {"count": 2, "min_clients": 2}})
    expected = fedtune.simulate(recipe, out=tmp_path / "simulated").summary
    sites = site_files(tmp_path, tables, ("client-0", "client-1"))
    loopback = Loopback(tmp_path, simulation=False)
    with loopback.started(*sites, tmp_path / "absent.toml"):
        said = loopback.run(STUB, recipe)
    assert (tmp_path / "fedtune" / "runs" / recipe.name / "summary.json").exists(), said
    summary = loopback.summary(recipe)
    assert summary["state_digest"] == expected["state_digest"]
    # The third one's error has come through Flower as it was raised.
    expected_reason = "1 fault expected a site file; got no such file; fedtune site init writes one"
    assert [(failure["kind"], failure["reason"]) for failure in summary["failures"]] == [
        ("refused", f"refused: {tmp_path / 'absent.toml'}: {expected_reason}")
    ]


@pytest.mark.slow
def test_flwr_run_simulates_the_bundle(tmp_path: Path, tables: dict[str, Any]) -> None:
    recipe = bind(tables | {"rounds": {"count": 2, "min_clients": 3}})
    expected = fedtune.simulate(recipe, out=tmp_path / "simulated").summary
    loopback = Loopback(tmp_path, simulation=True)
    with loopback.started():
        said = loopback.run(ROOT, recipe, "--federation-config", "num-supernodes=3 client-resources-num-cpus=1")
    assert (tmp_path / "fedtune" / "runs" / recipe.name / "summary.json").exists(), said
    assert loopback.summary(recipe)["state_digest"] == expected["state_digest"]
