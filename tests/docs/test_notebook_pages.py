"""The notebook runs as it is, and its page shows every cell and what it has shown."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

import pytest

import fedtune
from docs.notebook_pages import NOTEBOOK, notebook_page, read_notebook, run_notebook, sources, with_outputs


def test_the_notebook_is_one_and_its_code_uses_public_names() -> None:
    notebook = read_notebook()
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for source in sources(notebook):
        used = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
        names = {node.attr for node in used if isinstance(node.value, ast.Name) and node.value.id == "fedtune"}
        assert names <= set(fedtune.__all__)


def test_what_it_has_shown_names_no_path_of_a_machine() -> None:
    shown = [output for cell in read_notebook()["cells"] for output in cell.get("outputs", ())]
    texts = "".join("".join(output.get("text", ())) for output in shown)
    assert "test_loss" in texts
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|usr)/", texts)
    assert any("image/png" in output.get("data", {}) for output in shown)


def test_the_page_shows_every_cell() -> None:
    page = notebook_page()
    assert page.startswith("# A first federation in a notebook\n\n[Download the notebook](first-federation.ipynb)")
    for source in sources(read_notebook()):
        assert f"```python\n{source}\n```" in page


def test_cells_share_names_and_show_texts_and_pictures() -> None:
    picture = "import base64, pathlib\nfrom IPython.display import Image, display\n"
    picture += "class File:\n    def read_bytes(self): return b'png'\ndisplay(Image(File()))"
    cells: list[dict[str, Any]] = [
        {"cell_type": "code", "source": ["x = 1\n", "print(x)"]},
        {"cell_type": "markdown", "source": ["words"]},
        {"cell_type": "code", "source": [picture]},
        {"cell_type": "code", "source": ["x += 1"]},
    ]
    outputs = run_notebook({"cells": cells})
    assert outputs == [[{"text/plain": "1\n"}], [{"image/png": "cG5n"}], []]
    stored = with_outputs({"cells": cells}, outputs)["cells"]
    assert stored[0]["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["1\n"]}]
    assert (stored[2]["outputs"][0]["data"], stored[3]["outputs"]) == ({"image/png": "cG5n"}, [])


@pytest.mark.slow
def test_the_notebook_runs_in_a_fresh_interpreter_and_shows_what_it_is_about() -> None:
    outputs = run_notebook(read_notebook())
    texts = ["".join(output.get("text/plain", "") for output in shown) for shown in outputs]
    assert "test_loss" in texts[1]
    lines = [line.split() for line in texts[2].splitlines()]
    assert [line[0] for line in lines] == ["email", "http", "logging", "mock"]
    assert all(float(line[3]) < float(line[1]) for line in lines)  # every client gained
    assert any("image/png" in output for shown in outputs for output in shown)
    assert "def close(self):" in texts[-2]
    assert json.loads(NOTEBOOK.read_text())  # it was read, not written
