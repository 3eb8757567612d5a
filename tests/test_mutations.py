"""The table of planted faults fits the source; `tests/mutations.py` plants them and says which of them tests catch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.mutations import FAULTS, ROOT, narrow, unplantable


def test_every_fault_can_be_planted() -> None:
    assert [problem for fault in FAULTS if (problem := unplantable(fault))] == []


def test_no_fault_is_planted_twice() -> None:
    assert len({(fault.file, fault.new, fault.old) for fault in FAULTS}) == len(FAULTS)
    assert len({fault.what for fault in FAULTS}) == len(FAULTS)


def test_every_folder_of_the_package_has_faults() -> None:
    package = ROOT / "fedtune"
    folders = {path.parent for path in package.rglob("*.py") if path.stem != "__init__"}
    generated, trains_a_model_once = package / "wire" / "v1", package / "model" / "embedded"
    assert folders - {generated, trains_a_model_once} == {(package / fault.file).parent for fault in FAULTS}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"file": "methods/no_method.py"}, "expected a file of fedtune/"),
        ({"old": "no such text"}, "expected this text once; got it 0 times"),
        ({"old": "return"}, "expected this text once; got it"),
        ({"new": "if"}, "expected Python after the change"),
        ({"tests": ("methods/test_no_method.py",)}, "expected tests; got none"),
    ],
)
def test_a_fault_that_cannot_be_planted_is_described(changes: dict[str, Any], problem: str) -> None:
    assert problem in unplantable(replace(FAULTS[1], **changes))


def test_the_tests_of_a_fault_are_those_of_its_module_and_those_that_it_names() -> None:
    fault = next(fault for fault in FAULTS if fault.file == "store/files.py" and fault.tests)
    assert narrow(fault) == ["tests/store/test_files.py", "tests/test_crash.py"]
