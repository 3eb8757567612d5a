"""What a program's folder holds: which packages must not be in it, and how large its parts are."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

HEAVY = (
    "torch transformers peft datasets pyarrow flwr accelerate pandas scipy sklearn matplotlib typer rich numba sympy "
    "prometheus_client huggingface_hub hf_xet PyInstaller pip"
)
FORBIDDEN = {
    "fedtune-edge": f"{HEAVY} xllamacpp",
    "fedtune-edge-gguf": f"{HEAVY} onnxruntime",
    "fedtune-client": "flwr ray numba tensorboard mkdocs pytest mypy nvidia triton PyInstaller pip",
}
"""Packages that a file must not hold, by the name of the file."""
NEEDED = {
    "fedtune-edge": "fedtune grpc numpy onnxruntime tokenizers",
    "fedtune-edge-gguf": "fedtune grpc numpy tokenizers xllamacpp",
    "fedtune-client": "fedtune grpc numpy peft torch transformers",
}
"""Packages that it must hold: what is imported when it is first used may be missed."""
UNUSED = (
    "tkinter sqlite3 _sqlite3 readline curses _curses setuptools pkg_resources distutils lib2to3 ensurepip "
    "numpy.f2py numpy.testing numpy.distutils"
)
EXCLUDED = {
    "fedtune-edge": f"{UNUSED} onnxruntime.quantization onnxruntime.transformers onnxruntime.tools "
    "onnxruntime.datasets onnxruntime.backend",
    "fedtune-edge-gguf": UNUSED,
    "fedtune-client": f"tkinter {FORBIDDEN['fedtune-client']}",
}
"""Modules that are left out though something imports them, where they are there."""
HIDDEN = {
    "fedtune-edge": "fedtune.edge.onnx_runtime",
    "fedtune-edge-gguf": "fedtune.edge.gguf_runtime xllamacpp",  # of which the library is loaded by its path
    "fedtune-client": "fedtune.client.site_process fedtune.client.share_process fedtune.client.worker_process",
}
"""Modules that are loaded by name."""


def check_contents(tree: Path, modules: set[str], *, name: str) -> None:
    """Refuse a program that holds a package which its users do without, or lacks one that it works with.

    Args:
        tree: the program's folder.
        modules: in its archive.
        name: of the file.

    Raises:
        SystemExit: naming them.
    """
    folders = {path.name.partition("-")[0] for place in ("_internal", ".") for path in (tree / place).glob("*")}
    parts = {module.partition(".")[0] for module in modules} | folders
    if surplus := sorted(parts & set(FORBIDDEN[name].split())):
        raise SystemExit(f"expected {name} without {', '.join(surplus)}; something that it imports brings them in")
    if missing := sorted(set(NEEDED[name].split()) - parts):
        raise SystemExit(f"expected {name} with {', '.join(missing)}; nothing that it imports brings them in")


def sizes(tree: Path) -> dict[str, int]:
    """Return bytes of a tree by part, the largest first; a package and its libraries are one part."""
    result: Counter[str] = Counter()
    for path in (path for path in tree.rglob("*") if path.is_file() and not path.is_symlink()):
        parts = [part for part in path.relative_to(tree).parts if part != "_internal"]
        result[re.sub(r"(-[\d.]+[\w.]*)?\.(libs|dist-info)$", "", parts[0])] += path.stat().st_size
    return dict(result.most_common())
