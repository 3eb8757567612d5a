"""`fedtune split`: the folder's name on standard output, the table beside it, one sentence for what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from fedtune.cli.main import app

run = CliRunner().invoke


def test_a_split_is_written_and_shown(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {row}"}) + "\n" for row in range(12)))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = { base = "embedded" }\ndata = { source = "rows.jsonl" }\n')
    out = tmp_path / "parts"
    shown = run(app, ["split", str(recipe), "--out", str(out)])
    assert (shown.exit_code, shown.stdout) == (0, f"{out}\n")
    assert "Split iid: 4 clients hold 12 rows; 0 go to none" in shown.stderr
    assert (out / "train" / "client-0.jsonl").is_file()
    again = run(app, ["split", str(recipe), "--out", str(out)])
    assert again.exit_code == 2
    assert "expected a new or an empty folder" in again.stderr
    printed = run(app, ["split", str(recipe), "--out", f"{out}2", "--form", "parquet", "--json"])
    assert json.loads(printed.stdout)["files"] == 8
