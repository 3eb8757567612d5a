from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ConfigError
from fedtune.evaluation.humaneval import pass_at_k, problems, program
from tests.evaluation.conftest import humaneval_row, rows


def test_a_program_is_prompt_completion_and_tests() -> None:
    [problem] = problems(rows(humaneval_row()), [], 0)
    assert problem.prompt == 'def add(a, b):\n    """Add."""\n'
    text = program(problem, "    return a + b")
    exec(compile(text, "text", "exec"), {})  # written here
    with pytest.raises(AssertionError):
        exec(compile(program(problem, "    return a - b"), "text", "exec"), {})


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples: int, data: st.DataObject) -> None:
    passed, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    draws = list(combinations([True] * passed + [False] * (samples - passed), k))
    assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_rows_that_are_no_problem_are_refused() -> None:
    with pytest.raises(ConfigError, match="file row 1: expected entry_point as a name; got 'f\\(\\); evil'"):
        problems(rows(humaneval_row(entry_point="f(); evil")), [], 0)
    with pytest.raises(ConfigError, match="expected the column test"):
        problems(rows(humaneval_row(test=None)), [], 0)
    with pytest.raises(ConfigError, match="expected no shots; got 2"):
        problems(rows(humaneval_row()), [], 2)
