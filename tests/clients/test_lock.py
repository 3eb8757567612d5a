"""The locked packages of the files for devices: what the package asks for, with a digest for every architecture."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.clients.toy import EDGE

LOCKS = sorted((EDGE / "lock").glob("*.txt"))
PROJECT = tomllib.loads((EDGE.parents[1] / "pyproject.toml").read_text())["project"]
HEAVY = {"torch", "transformers", "peft", "datasets", "typer", "rich", "matplotlib", "scikit-learn", "flwr"}


def pins(*paths: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)", "\n".join(path.read_text() for path in paths), re.MULTILINE))


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: str(path.stem))
def test_every_package_has_one_version_and_digests(path: Path) -> None:
    blocks = re.split(r"\n(?=\S)", path.read_text().strip())
    for block in blocks:
        assert re.fullmatch(r"[\w-]+==[\w.]+( \\\n    --hash=sha256:[0-9a-f]{64}){1,2}", block), block
    names = [block.split("==")[0] for block in blocks]
    assert names == sorted(set(names))


@pytest.mark.parametrize(("file", "extra"), [("fedtune-edge", "edge"), ("fedtune-edge-gguf", "edge-gguf")])
def test_the_locked_versions_are_those_that_the_package_asks_for(file: str, extra: str) -> None:
    locked = pins(EDGE / "lock" / "common.txt", EDGE / "lock" / f"{file}.txt")
    asked = {
        canonicalize_name(need.name): need
        for need in map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]])
    }
    assert {
        canonicalize_name(one) for one in (Requirement(text).name for text in PROJECT["optional-dependencies"][extra])
    } <= set(locked)
    assert not HEAVY & set(locked)
    for name in set(asked) & set(locked):
        assert asked[name].specifier.contains(locked[name]), name
    assert len(set(asked) & set(locked)) >= 8
