"""The notebook as a page, with its stored outputs; run it again with `python -m docs.notebook_pages`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parent / "notebooks" / "first-federation.ipynb"

RUNNER = """
import base64, contextlib, io, json, sys, types

outputs, names = [], {"__name__": "__main__"}
shown = types.ModuleType("IPython.display")
shown.Image = lambda path: base64.b64encode(path.read_bytes()).decode()
shown.display = lambda picture: outputs[-1].append({"image/png": picture})
fake = {"IPython": types.ModuleType("IPython"), "IPython.display": shown}
for source in json.load(sys.stdin):
    outputs.append([])
    sys.modules |= fake if "IPython" in source else {}  # only for that cell: libraries ask a real one more
    with contextlib.redirect_stdout(io.StringIO()) as text:
        exec(compile(source, "cell", "exec"), names)
    for name in fake:
        sys.modules.pop(name, None)
    if text.getvalue():
        outputs[-1].insert(0, {"text/plain": text.getvalue()})
json.dump(outputs, sys.stdout)
"""
"""Runs cells one after the other in a fresh interpreter, as a notebook does, without its packages."""


def read_notebook(path: Path = NOTEBOOK) -> dict[str, Any]:
    """Return a notebook's content."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def sources(notebook: Mapping[str, Any]) -> list[str]:
    """Return the code of every cell that has any."""
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_notebook(notebook: Mapping[str, Any]) -> list[list[Mapping[str, str]]]:
    """Run the cells, and return what each of them shows: texts and pictures by their media type.

    Raises:
        subprocess.CalledProcessError: if a cell fails; its error is on standard error.
    """
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(sources(notebook)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    outputs: list[list[Mapping[str, str]]] = json.loads(done.stdout)
    return outputs


def with_outputs(notebook: Mapping[str, Any], outputs: list[list[Mapping[str, str]]]) -> dict[str, Any]:
    """Return the notebook with what its cells have shown."""
    shown = iter(outputs)
    cells = [
        {**cell, "outputs": list(map(stored_output, next(shown)))} if cell["cell_type"] == "code" else cell
        for cell in notebook["cells"]
    ]
    return {**notebook, "cells": cells}


def stored_output(output: Mapping[str, str]) -> Mapping[str, Any]:
    """Return an output as a notebook stores it."""
    if "text/plain" in output:
        lines = output["text/plain"].splitlines(keepends=True)
        return {"name": "stdout", "output_type": "stream", "text": lines}
    return {"data": dict(output), "metadata": {}, "output_type": "display_data"}


def notebook_page(path: Path = NOTEBOOK) -> str:
    """Return a notebook as Markdown: texts, code, and what the code showed when it was last run."""
    parts = [part for cell in read_notebook(path)["cells"] for part in cell_parts(cell)]
    title, rest = parts[0].split("\n", 1)
    link = f"[Download the notebook]({path.name}), or read it here with what it showed on two CPU cores."
    return "\n\n".join([title, link, rest.strip(), *parts[1:]]) + "\n"


def cell_parts(cell: Mapping[str, Any]) -> Iterator[str]:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield text
        return
    yield f"```python\n{text}\n```"
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            yield f"```text\n{''.join(output['text']).rstrip()}\n```"
        else:
            yield f"![What the cell shows](data:image/png;base64,{output['data']['image/png'].strip()})"


if __name__ == "__main__":
    read = read_notebook()
    text = json.dumps(with_outputs(read, run_notebook(read)), indent=1, ensure_ascii=False)
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")
