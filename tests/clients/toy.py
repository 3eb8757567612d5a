"""A program of two files for tests of the packer, packed as the real ones are."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType

EDGE = Path(__file__).parents[2] / "clients" / "edge"
DIGEST = re.compile("[0-9a-f]{64}")
PROGRAM = '#!/bin/sh\n[ "${1-}" = version ] && exit 0\nprintf "%s\\n" "$$" "$@"\n'


def load(name: str) -> ModuleType:
    """Return a module of clients/edge, which is no package."""
    spec = importlib.util.spec_from_file_location(f"clients_edge_{name}", EDGE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toy_tree(folder: Path, *, program: str = PROGRAM, name: str = "toy", size: int = 5000) -> Path:
    tree = folder / "tree"
    (tree / "_internal").mkdir(parents=True)
    (tree / name).write_text(program)
    (tree / name).chmod(0o755)
    (tree / "_internal" / "lib.so").write_bytes(bytes(i * i % 251 for i in range(size)))
    return tree


def toy_file(
    folder: Path, *, program: str = PROGRAM, name: str = "toy", size: int = 5000, arch: str = os.uname().machine
) -> Path:
    tree = toy_tree(folder, program=program, name=name, size=size)
    path = load("pack").pack(tree, folder / "dist", name=name, version="1.0", arch=arch, epoch=0)
    assert isinstance(path, Path)
    return path


def run_file(path: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a packed file with nothing in its environment but PATH."""
    environment = {"FEDTUNE_HOME": str(home), "PATH": os.environ["PATH"]}
    return subprocess.run([path, *arguments], env=environment, capture_output=True, text=True, check=False)
