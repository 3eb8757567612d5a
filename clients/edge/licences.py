"""The licences of everything that a file holds: each package's own texts, and a table of what is in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

NAMES = ("licen", "copying", "notice", "authors", "thirdparty")
APACHE = {"Apache-2.0", "Apache Software License", "Apache 2.0"}
OUR_OWN = Path(__file__).parents[2] / "LICENSE"
"""The text of Apache-2.0, for packages that name it and bring no copy."""


def licence_of(package: Distribution) -> str:
    """Return the licence that a package states: an SPDX expression, or what stands in its older fields."""
    data = package.metadata
    classes = [line.rsplit(" :: ", 1)[1] for line in data.get_all("Classifier", []) if line.startswith("License ::")]
    text = data.get("License-Expression") or ", ".join(classes) or data.get("License", "")
    return text.strip().splitlines()[0] if text.strip() else "see its licence file"


def copy_texts(package: Distribution, folder: Path) -> int:
    """Copy a package's licence texts to a folder, and return how many there are."""
    texts = [path for path in package.files or [] if any(word in path.name.lower() for word in NAMES)]
    texts = [path for path in texts if path.suffix not in {".py", ".pyc"} and Path(str(path.locate())).is_file()]
    for number, path in enumerate(sorted(texts)):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(path.locate()), folder / (f"{number}-{path.name}" if number else path.name))
    return len(texts)


def system_texts(tree: Path, folder: Path) -> list[tuple[str, str, str]]:
    """Copy the texts of the system's own libraries that were taken along, and return a row for each library."""
    rows = []
    for path in sorted((tree / "_internal").glob("lib*.so*")):
        if path.is_symlink() or path.name.startswith("libpython") or shutil.which("dpkg-query") is None:
            continue
        done = subprocess.run(["dpkg-query", "-S", f"*/{path.name}"], capture_output=True, text=True, check=False)
        owner = done.stdout.split(":")[0].split(",")[0]
        text = Path("/usr/share/doc") / owner / "copyright"
        if owner and text.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(text, folder / f"{owner}.txt")
        rows.append((path.name, f"of the package {owner or 'unknown'}", "see its text" if owner else "unknown"))
    return rows


def packages_in(tree: Path, packages: Path, modules: set[str]) -> list[PathDistribution]:
    """Return the packages of an environment of which something is in a tree or in its archive of modules."""
    parts = {module.partition(".")[0] for module in modules} | {path.name for path in (tree / "_internal").iterdir()}
    result = []
    for info in sorted(packages.glob("*.dist-info")):
        package = PathDistribution(info)
        tops = {path.parts[0].removesuffix(".py") for path in package.files or [] if path.parts[0] != info.name}
        # The program that starts the others is PyInstaller's, whose licence asks for no more than its text.
        if tops & parts or package.metadata["Name"] == "pyinstaller":
            result.append(package)
    return result


def add_licences(tree: Path, packages: Path, modules: set[str]) -> list[tuple[str, str, str]]:
    """Write `licences/` into a tree: texts, and a table of what is in it; return the table's rows.

    Args:
        tree: the program's folder.
        packages: site-packages that it was built from.
        modules: in its archive.

    Raises:
        SystemExit: if a package brings no text of its licence: it could not be passed on.
    """
    folder, rows = tree / "licences", []
    shutil.rmtree(folder, ignore_errors=True)
    for package in packages_in(tree, packages, modules):
        name, licence = package.metadata["Name"], licence_of(package)
        if not copy_texts(package, folder / name):
            if licence not in APACHE:
                raise SystemExit(f"expected a licence text in the package {name}; got none; licence: {licence}")
            (folder / name).mkdir(parents=True)
            shutil.copy(OUR_OWN, folder / name / "LICENSE")
        rows.append((name, package.version, licence))
    python = Path(sys.base_prefix) / "lib" / f"python3.{sys.version_info.minor}" / "LICENSE.txt"
    (folder / "python").mkdir(parents=True)
    shutil.copy(python, folder / "python" / "LICENSE.txt")
    rows += [("python", sys.version.split()[0], "PSF-2.0"), *system_texts(tree, folder / "system")]
    table = [dict(zip(("name", "version", "licence"), row, strict=True)) for row in rows]
    (folder / "contents.json").write_text(json.dumps(table, indent=1) + "\n")
    return rows
