"""The table of guarantees says what the marks of the tests and the last run of all of them say."""

from __future__ import annotations

import ast
from pathlib import Path

from docs.guarantees import GUARANTEES, guarantees_page, marked_tests, names_of, read_record

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


def test_a_mark_of_the_module_is_one_of_each_of_its_tests(tmp_path: Path) -> None:
    common = 'pytestmark = [pytest.mark.slow, pytest.mark.guarantee("G2")]\n'
    (tmp_path / "test_codec.py").write_text(common + SAMPLE)
    assert marked_tests(tmp_path)["G2"] == {"test_codec.py::test_marked", "test_codec.py::test_unmarked"}


def test_every_mark_is_one_that_the_table_reads() -> None:
    """Not one of a parameter or of a class: the table would lack it."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if path.name == "test_guarantees.py":
            continue
        tree = ast.parse(path.read_text())
        everywhere = [*names_of(tree)]
        read = [name for node in tree.body for mark in places(node) for name in names_of(mark)]
        assert len(everywhere) == len(read), f"{path}: expected marks of functions, or pytestmark"


def places(node: ast.stmt) -> list[ast.expr]:
    """Return where a statement of a module may have marks."""
    if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node):
        return [node.value]
    return node.decorator_list if isinstance(node, ast.FunctionDef) else []


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
