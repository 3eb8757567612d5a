from __future__ import annotations

import json

from fedtune.report.headline import headline
from fedtune.report.notebook import run_html
from fedtune.report.reader import read_run
from tests.report.conftest import WriteRun


def test_a_notebook_shows_headline_and_rounds_with_names_as_text(write_run: WriteRun) -> None:
    path = write_run(rounds=2)
    summary = json.loads((path / "summary.json").read_text())
    summary["name"] = "<script>"
    (path / "summary.json").write_text(json.dumps(summary))
    text = run_html(path)
    assert "&lt;script&gt;" in text
    assert "<script>" not in text
    assert headline(read_run(path)) in text
    assert text.count("<tr>") == 4  # the head, and rounds 0 to 2
