"""Licences that a file ships: each package's own texts, and a table of what is in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.clients.toy import EDGE, load

LICENCES = load("licences")


def add_package(folder: Path, name: str, licence: str, *, text: str = "") -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{licence}\n")
    files = [f"{name}/__init__.py", f"{info.name}/METADATA"]
    if text:
        (info / "licenses").mkdir()
        (info / "licenses" / "LICENSE").write_text(text)
        files.append(f"{info.name}/licenses/LICENSE")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree" / "_internal" / "beta").mkdir(parents=True)
    return tmp_path / "tree"


def test_each_package_that_is_in_a_file_brings_its_text_and_a_row(tree: Path, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    add_package(packages, "alpha", "License-Expression: MIT", text="of alpha")
    add_package(packages, "beta", "License-Expression: Apache-2.0")
    add_package(packages, "gamma", "License-Expression: MIT", text="of what is not in it")
    rows = LICENCES.add_licences(tree, packages, {"alpha.inner"})
    assert rows[:2] == [("alpha", "1.0", "MIT"), ("beta", "1.0", "Apache-2.0")]
    assert (tree / "licences" / "alpha" / "LICENSE").read_text() == "of alpha"
    assert (tree / "licences" / "beta" / "LICENSE").read_text() == (EDGE.parents[1] / "LICENSE").read_text()
    assert not (tree / "licences" / "gamma").exists()
    assert (tree / "licences" / "python" / "LICENSE.txt").stat().st_size > 1000
    table = json.loads((tree / "licences" / "contents.json").read_text())
    assert [row["name"] for row in table[:3]] == ["alpha", "beta", "python"]


def test_a_package_without_a_text_stops_the_build(tree: Path, tmp_path: Path) -> None:
    add_package(tmp_path / "packages", "alpha", "License: BSD")
    with pytest.raises(SystemExit, match="expected a licence text in the package alpha; got none; licence: BSD"):
        LICENCES.add_licences(tree, tmp_path / "packages", {"alpha"})


@pytest.mark.parametrize(
    ("lines", "licence"),
    [
        ("License-Expression: MIT AND BSD-3-Clause", "MIT AND BSD-3-Clause"),
        ("Classifier: License :: OSI Approved :: Apache Software License", "Apache Software License"),
        ("License: first line\n        second line", "first line"),
        ("Summary: nothing said", "see its licence file"),
    ],
)
def test_a_licence_is_read_where_packages_state_it(lines: str, licence: str, tmp_path: Path) -> None:
    add_package(tmp_path, "alpha", lines)
    assert LICENCES.licence_of(LICENCES.PathDistribution(tmp_path / "alpha-1.0.dist-info")) == licence
