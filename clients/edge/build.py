"""Build a file for this machine's architecture: python clients/edge/build.py fedtune-edge (make edge builds all).

Packages come from lock/ with their digests, into an environment of their own: nothing slips in that is not named there.
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from contents import EXCLUDED, FORBIDDEN, HIDDEN, check_contents, sizes
from licences import add_licences
from pack import pack, write_sums

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LOCKS = {
    "fedtune-edge": ("tool", "common", "fedtune-edge"),
    "fedtune-edge-gguf": ("tool", "common", "fedtune-edge-gguf"),
    "fedtune-client": ("tool",),
}
STRIPPED = ("libpython*.so*", "xllamacpp*.so", "libllama*.so*", "libggml*.so*")
"""Libraries without their symbols for debuggers; all of them at once break numpy's."""


def run(*command: object, **environment: str) -> None:
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=os.environ | environment, check=False)
    if done.returncode:
        raise SystemExit(f"expected status 0 of {command[0]}; got {done.returncode}; its output stands above")


def environment(name: str, folder: Path) -> Path:
    """Return the interpreter of an environment that holds what a file is built from and nothing else."""
    locks = [HERE / "lock" / f"{lock}.txt" for lock in LOCKS[name]]
    mark = hashlib.sha256(b"".join(path.read_bytes() for path in locks)).hexdigest()
    python, stamp = folder / "venv" / "bin" / "python", folder / "venv" / ".built-from"
    if not stamp.exists() or stamp.read_text() != mark:
        shutil.rmtree(folder / "venv", ignore_errors=True)
        run(sys.executable, "-m", "venv", folder / "venv")
        pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        run(*pip, "--no-deps", "--require-hashes", *(word for path in locks for word in ("-r", path)))
        if name == "fedtune-client":
            # With what reads Parquet: there is no pip at the site to add it.
            run(*pip, f"torch=={os.environ.get('TORCH', '2.13.0')}", f"{ROOT}[data]")
        stamp.write_text(mark)
    shutil.rmtree(folder / "wheel", ignore_errors=True)
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "wheel")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", *(folder / "wheel").iterdir())
    return python


def freeze(name: str, python: Path, folder: Path, epoch: int) -> tuple[Path, set[str]]:
    """Return the folder of the frozen program, and the modules that lie in its archive."""
    entry = HERE / f"{name.replace('-', '_').removesuffix('_gguf')}.py"
    exclude = [word for module in EXCLUDED[name].split() for word in ("--exclude-module", module)]
    places = ("--distpath", folder / "tree", "--workpath", folder / "work", "--specpath", folder)
    shutil.rmtree(folder / "work", ignore_errors=True)
    # The order of sets and the time of day would else be in the file.
    settings = {"PYTHONHASHSEED": "0", "SOURCE_DATE_EPOCH": str(epoch)}
    options = ("--noconfirm", "--onedir", "--log-level", "WARN", "--name", name, "--copy-metadata", "fedtune")
    # Loaded when a bundle asks for it, by a name that no import statement of the entry has.
    hidden = [word for module in HIDDEN[name].split() for word in ("--hidden-import", module)]
    # -P: the package that was installed is frozen, and not the source below this folder, which may change meanwhile.
    run(python, "-P", "-m", "PyInstaller", *options, *places, *exclude, *hidden, entry, **settings)
    table = ast.literal_eval((folder / "work" / name / "PYZ-00.toc").read_text())
    return folder / "tree" / name, {row[0] for row in table[1]}


def trim(tree: Path, name: str) -> None:
    """Remove what a program does not read: symbols for debuggers, lists that name paths of this machine, and the
    metadata of packages that are left out, which others ask for to know whether they are there.
    """
    for pattern in STRIPPED:
        for path in (path for path in tree.rglob(pattern) if not path.is_symlink()):
            run("strip", path)
    for file in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
        for path in tree.rglob(f"*.dist-info/{file}"):
            path.unlink()
    for package in FORBIDDEN[name].split():
        for path in tree.rglob(f"{package}-*.dist-info"):
            shutil.rmtree(path)


def main() -> None:
    """Build the file that is named, and print what it is made of."""
    name, arch = sys.argv[1], os.uname().machine
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
    folder = ROOT / "build" / "edge" / name
    python = environment(name, folder)
    tree, modules = freeze(name, python, folder, epoch)
    trim(tree, name)
    check_contents(tree, modules, name=name)
    (packages,) = (folder / "venv" / "lib").glob("python3.*/site-packages")
    rows = add_licences(tree, packages, modules)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    path = pack(tree, ROOT / "dist", name=name, version=version, arch=arch, epoch=epoch)
    for extra in ("install.sh", "fedtune-edge.service"):
        shutil.copy(HERE / extra, path.parent)
    write_sums(path.parent, [path.name, "install.sh", "fedtune-edge.service"])
    print(f"{'part':32}{'unpacked MB':>12}")
    for part, size in sizes(tree).items():
        if size > 500_000:
            print(f"{part:32}{size / 1e6:12.1f}")
    print(f"{'all':32}{sum(sizes(tree).values()) / 1e6:12.1f}; {len(rows)} parts with a licence of their own")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.1f} MB, SHA-256 in dist/SHA256SUMS")


if __name__ == "__main__":
    main()
