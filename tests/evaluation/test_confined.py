from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from fedtune.evaluation import confined


def test_it_imports_the_standard_library_alone() -> None:
    tree = ast.parse(Path(confined.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("assert __name__ == '__main__'", "passed"),
        ("raise KeyboardInterrupt", "failed"),
        ("raise SystemExit", "failed"),
        ("raise MemoryError", "memory"),
        ("x = '\\0'\0", "failed"),
    ],
)
def test_an_outcome_is_how_the_program_ends(program: str, outcome: str) -> None:
    assert confined.run(program) == outcome


def test_a_program_that_was_killed_early_ran_out_of_memory() -> None:
    assert confined.judge(-9, 10**6) == confined.OUT_OF_MEMORY
    assert confined.judge(-9, 0) == confined.OUT_OF_TIME
    assert (confined.judge(0, 0), confined.judge(1, 10**6), confined.judge(-11, 10**6)) == (0, 1, 245)
