"""The page that compares frameworks, and the README's copy of it, say what the files of the job say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCH = runpy.run_path(str(ROOT / "benchmarks" / "frameworks.py"))
PAGE = (ROOT / "docs" / "comparison.md").read_text()
README = (ROOT / "README.md").read_text()


def cells(text: str, row: str) -> list[str]:
    """Return the cells of the row of a table that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_files_and_lines_are_those_of_the_job() -> None:
    counted = [f"{len(files)}, {sum(map(BENCH['lines'], files))}" for files in BENCH["FILES"].values()]
    for text in (PAGE, README):
        assert cells(text, "files to write, lines in them")[:3] == counted


def test_changed_lines_are_those_of_the_scripts() -> None:
    changed = BENCH["changed"]
    assert changed("trl/train.py", "fedtune/train.py") == "+2 -0 lines"
    assert changed("trl/train.py", "nvflare/train.py") == "+4 -2 lines"
    assert changed("flower/app/server_app.py", "fedtune/server_app.py") == "+5 -6 lines"
    assert BENCH["lines"]("fedtune/site.toml") == 2
    ours, _, theirs, _, _ = cells(PAGE, "a trl script becomes a client")
    assert "2 lines more" in ours
    assert "site's file of 2" in ours
    assert theirs.startswith("4 lines more, 2 fewer")
    assert "5 more, 6 fewer" in cells(PAGE, "a Flower app takes clients of ranks that differ, exactly")[0]


def test_the_readme_says_of_packages_and_results_what_the_page_says() -> None:
    assert cells(README, "packages, MB on disk") == cells(PAGE, "packages, MB on disk")[:4]
    for ranks, row in ((4, "LoRA ranks 8 and 4"), (1, "LoRA ranks 8 and 1")):
        ours, theirs = cells(README, row), cells(PAGE, f"ranks 8 and {ranks}")
        assert ("ValueError" in ours[1]) == ("ValueError" in theirs[1])
        assert ("wrong sum" in ours[1]) == ("without a word" in theirs[1])


def test_every_row_has_a_source_and_the_page_a_date() -> None:
    tables = re.findall(r"^\| \| fedtune.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.M)
    assert len(tables) == 3
    for table in tables:
        for line in table.splitlines():
            assert len(line.strip("|").split("|")) == 6, line
            assert line.strip("|").split("|")[-1].strip(), line
    assert re.search(r"of 20\d\d-\d\d-\d\d", PAGE)
    assert {path.name for path in BENCH["APPS"].iterdir()} == {"fedtune", "flower", "nvflare", "trl"}
