"""Counts of guarantees are of what really ran, and every mark names a row of the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SAMPLE = """
import pytest
from hypothesis import assume, given, settings, strategies as st

@pytest.mark.guarantee("G1")
@pytest.mark.parametrize("number", [1, 2])
def test_once_for_every_parameter(number): pass

@pytest.mark.guarantee("G1", "G2")
def test_loop(cases):
    for _ in range(7):
        cases(1)

@pytest.mark.guarantee("G2")
def test_no_turn_of_its_loop(cases):
    for _ in range(0):
        cases(1)

@pytest.mark.guarantee("G3")
@pytest.mark.parametrize("number", [1, 2])
@settings(max_examples=20, database=None)
@given(st.integers())
def test_property(number, drawn): assume(drawn % 2 == 0)

@pytest.mark.guarantee("G3")
def test_fails_after_some(cases):
    cases(5)
    raise AssertionError

@pytest.mark.guarantee("G4")
def test_skipped(): pytest.skip("no GPU")

@pytest.mark.guarantee("G4")
@pytest.mark.slow
def test_slow(): pass

def test_unmarked(): pass
"""


def test_what_ran_is_counted_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  guarantee(*names): rows\n  slow: of the full tier\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.guarantees", "-p", "no:cacheprovider"]
    command += ["--guarantees", str(tmp_path / "build" / "counts.json"), "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    record = json.loads((tmp_path / "build" / "counts.json").read_text())
    assert record["guarantees"] == {
        "G1": {"test_sample.py::test_loop": {"fast": 7}, "test_sample.py::test_once_for_every_parameter": {"fast": 2}},
        "G2": {"test_sample.py::test_loop": {"fast": 7}, "test_sample.py::test_no_turn_of_its_loop": {"fast": 0}},
        "G3": {"test_sample.py::test_property": {"fast": 40}},
        "G4": {"test_sample.py::test_slow": {"full": 1}},
    }
    assert record["failed"] == ["test_sample.py::test_fails_after_some", "test_sample.py::test_skipped"]
