from __future__ import annotations

from decimal import Decimal

import pytest

from fedtune.errors import ConfigError
from fedtune.evaluation.gsm8k import final_number, last_number, problems, scores
from fedtune.evaluation.items import Problem
from tests.evaluation.conftest import gsm8k_row, rows


def test_the_first_rows_are_shown_in_their_order() -> None:
    [problem] = problems(rows(gsm8k_row(7)), rows(gsm8k_row(1), gsm8k_row(2), gsm8k_row(3)), 2)
    assert problem.prompt == (
        "Question: What is 1 plus 1?\nAnswer: 1+1=<<1+1=2>>2\n#### 2\n\n"
        "Question: What is 2 plus 1?\nAnswer: 2+1=<<2+1=3>>3\n#### 3\n\n"
        "Question: What is 7 plus 1?\nAnswer:"
    )
    assert problem.gold == "8"


@pytest.mark.parametrize(
    ("gold", "answer", "strict", "flexible"),
    [
        ("18", "so it is\n#### 18.0", 1, 1),
        ("18", "#### $18", 1, 1),
        ("1000", "#### 1,000.00", 1, 1),
        ("18", "The answer is 18.", 0, 1),
        ("18", "#### 17\nno, 18", 0, 1),
        ("18", "#### 18\n\n20 are left", 1, 0),
        ("-5", "#### -5", 1, 1),
        ("3", "that is 8-5 = 3", 0, 1),
        ("5", "8-5", 0, 1),
        ("18", "180", 0, 0),
        ("18", "", 0, 0),
        ("18", "####", 0, 0),
        ("18", "eighteen", 0, 0),
        ("0.5", "half, .50", 0, 1),
        ("18", "18%", 0, 1),
        ("-1000", "a loss of -$1,000", 0, 1),
    ],
)
def test_answers_are_compared_as_decimals(gold: str, answer: str, strict: float, flexible: float) -> None:
    assert scores(Problem("", "", gold), answer) == {"strict": strict, "flexible": flexible}


def test_numbers_are_read_as_english_writes_them() -> None:
    assert last_number("1,2,3") == 3
    assert last_number("12,345.60 dollars.") == Decimal("12345.60")
    assert last_number("\u22127") == -7
    assert final_number("#### 4 #### 5") == 4
    assert last_number("9" * 400) == Decimal("9" * 400)


def test_rows_without_a_final_number_are_refused_by_place() -> None:
    with pytest.raises(ConfigError, match=r"file row 2: expected a number after #### in the answer; got '.*eight'"):
        problems(rows(gsm8k_row(), gsm8k_row(answer="it is #### eight")), [], 0)
    with pytest.raises(ConfigError, match="file row 1: expected the column answer or output; got question"):
        problems(rows({"question": "?"}), [], 0)
    with pytest.raises(ConfigError, match="expected question as a text; got an int"):
        problems(rows(gsm8k_row(question=3)), [], 0)


def test_fewer_rows_than_shots_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected 8 shots; got 1; lower --shots gsm8k=N"):
        problems(rows(gsm8k_row()), rows(gsm8k_row(1)), 8)
