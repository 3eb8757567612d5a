"""HumanEval (arXiv 2107.03374): functions to be completed, which count as right if they pass their tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedtune.evaluation.files import Row
from fedtune.evaluation.items import Problem

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a completion ends at the latest (section 2.1 of the paper)."""


def problems(rows: Sequence[Row], shot_rows: Sequence[Row], shots: int) -> Sequence[Problem]:
    """Return the functions to be completed, each with its tests.

    Raises:
        ConfigError: naming the row without a prompt, tests or the function's name.
    """
    items = []
    for row in rows:
        if shots:
            raise row.fault("no shots", str(shots), "leave --shots out for humaneval")
        name = row.text("entry_point")
        if not name.isidentifier():
            raise row.fault("entry_point as a name", repr(name)[:80])
        # As it is, to the last blank: the completion goes on in the same line.
        prompt = row.text("prompt")
        items.append(Problem(row.place, prompt, "", {"tests": f"{row.text('test')}\ncheck({name})\n"}))
    return items


def program(problem: Problem, completion: str) -> str:
    """Return prompt, completion and tests as one program."""
    return f"{problem.prompt}{completion}\n{problem.extra['tests']}"


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the chance that one of k of the samples passes, 1 - C(n-c, k) / C(n, k) (eq. 1 of the paper).

    >>> pass_at_k(10, 3, 1), round(pass_at_k(10, 3, 5), 4), pass_at_k(5, 0, 5)
    (0.3, 0.9167, 0.0)
    """
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)
