"""The table of guarantees says what the marks of the tests and the last run of all of them say."""

from __future__ import annotations

import ast
from pathlib import Path

from docs.guarantees import GUARANTEES, guarantees_page, marked_tests, marks, read_record

SAMPLE = """
@pytest.mark.guarantee("G1", "G5")
@pytest.mark.slow
def test_marked(): pass

def test_unmarked(): pass
"""
ROOT = Path(__file__).parents[2]


def test_marks_are_read_from_the_source(tmp_path: Path) -> None:
    (tmp_path / "wire").mkdir()
    (tmp_path / "wire" / "test_codec.py").write_text(SAMPLE)
    assert marked_tests(tmp_path) == {name: {"wire/test_codec.py::test_marked"} for name in ("G1", "G5")}


def test_no_mark_stands_where_it_would_not_be_read() -> None:
    """As in `pytestmark`, or in a parameter's marks: the table would lack it."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        if "mark.guarantee" in text and path.name != "test_guarantees.py":
            assert text.count("mark.guarantee") == len([*marks(ast.parse(text))]), path


def test_only_guarantees_that_are_built_have_tests() -> None:
    assert marked_tests().keys() <= {name for name, guarantee in GUARANTEES.items() if guarantee.built}


def test_counts_are_of_tests_that_exist_and_passed() -> None:
    record, tests = read_record(), marked_tests()
    assert record["failed"] == []
    for name, counts in record["guarantees"].items():
        assert counts.keys() <= tests[name], f"docs/guarantees.json, {name}: expected marked tests; run make guarantees"
        assert all(count > 0 for tiers in counts.values() for count in tiers.values())


def test_the_page_shows_every_guarantee_its_tests_and_their_counts() -> None:
    record = {
        "release": "1.2.3",
        "commit": "abc",
        "guarantees": {"G5": {"a/test_b.py::test_some_name": {"fast": 2000, "full": 8000}}},
    }
    page = guarantees_page(record, {"G5": {"a/test_b.py::test_some_name", "a/test_b.py::test_new"}})
    assert "release 1.2.3, commit `abc`" in page
    assert "| G5 | Repeated, swapped and late replies are safe | 10,000 | 2,000 | 10,000 | [2](#g5) |" in page
    assert "| some name<br>`tests/a/test_b.py` | 2,000 | 10,000 |" in page
    assert "| new<br>`tests/a/test_b.py` | not measured yet | not measured yet |" in page
    assert "| G7 | The secure sum is exact | 1,000 | not built | not built | not built |" in page
