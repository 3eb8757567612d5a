from __future__ import annotations

from typing import Any

import pytest

from fedtune.errors import ConfigError
from fedtune.evaluation.items import Question
from fedtune.evaluation.multiple_choice import arc, choose, mmlu
from tests.evaluation.conftest import arc_row, mmlu_row, rows


def test_mmlu_is_asked_as_lm_eval_asks_it() -> None:
    shown = rows(mmlu_row(5), mmlu_row(8, "other"), mmlu_row(6, answer="C"), mmlu_row(7))
    [question] = mmlu(rows(mmlu_row(1, question=" 1+1=? ")), shown, 2)
    assert question.prompt == (
        "The following are multiple choice questions (with answers) about high school sums.\n\n"
        "5+1=?\nA. 5\nB. 6\nC. 7\nD. 8\nAnswer: B\n\n"
        "6+1=?\nA. 6\nB. 7\nC. 8\nD. 9\nAnswer: C\n\n"
        "1+1=?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    # The blank belongs to the letter, as the shots write it: many tokenizers have another token for the bare letter.
    assert (question.options, question.gold, question.group) == ([" A", " B", " C", " D"], 1, "high_school_sums")


def test_arc_is_asked_as_lm_eval_asks_it() -> None:
    [question] = arc(rows(arc_row(1)), rows(arc_row(2), arc_row(3)), 1)
    assert question.prompt == "Question: who runs 2?\nAnswer: the quick fox\n\nQuestion: who runs 1?\nAnswer:"
    assert (question.options, question.gold) == ([" a dog", " the quick fox", " no"], 1)


def test_arcs_labels_may_be_numbers() -> None:
    numbered = arc_row(choices={"text": ["x", "y"], "label": ["1", "2"]}, answerKey="2")
    assert arc(rows(numbered), [], 0)[0].gold == 1
    # A file that has lost the quotes means the same option, and not the one at that place from 0.
    assert arc(rows({**numbered, "answerKey": 2}), [], 0)[0].gold == 1


def test_options_are_chosen_by_likelihood_and_by_likelihood_per_character() -> None:
    question = Question("", "q", [" ab", " abcdefgh", " a"], 0)
    assert choose(question, [-3.0, -4.0, -3.5]) == {"acc": 0, "acc_norm": 1}
    assert choose(question, [-3.0, -12.0, -3.0]) == {"acc": 0, "acc_norm": 0}  # of equal ones the first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 4}, "expected an answer of A, B, C, D or its place from 0; got 4"),
        ({"answer": True}, "got True"),
        ({"answer": "E"}, "got 'E'"),
        ({"answer": "AB"}, "got 'AB'"),
        ({"answer": ""}, "got ''"),
        ({"answer": "-1"}, "got '-1'"),
        ({"choices": ["1", "2"]}, "expected four choices; got 2"),
        ({"choices": ["1", "2", "3", 4]}, "expected choices as a list of texts"),
        ({"choices": "abcd"}, "expected choices as a list of texts; got a str"),
        ({"subject": None}, "expected the column subject"),
        ({"question": ""}, "expected question as a text; got an empty text"),
    ],
)
def test_rows_that_are_no_question_of_mmlu_are_refused_by_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        mmlu(rows(mmlu_row(), mmlu_row(1, **changes)), [], 0)
    assert str(refused.value).startswith("file row 2: ")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"choices": ["a", "b"]},
        {"choices": {"text": ["a", "b"], "label": ["A"]}},
        {"choices": {"text": ["a", "b"], "label": ["A", "A"]}, "answerKey": "A"},
        {"choices": {"text": ["a", ""], "label": ["A", "B"]}},
        {"choices": {"label": ["A"]}},
        {"answerKey": "D"},
        {"choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": 0},
    ],
)
def test_rows_that_are_no_question_of_arc_are_refused_by_place(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="file row 1: "):
        arc(rows(arc_row(**changes)), [], 0)


def test_no_shot_is_dropped_in_silence() -> None:
    with pytest.raises(ConfigError, match=r"expected 2 shots of the subject 'new'; got 1; set --shots mmlu=1"):
        mmlu(rows(mmlu_row(subject="new")), rows(mmlu_row(subject="new"), mmlu_row()), 2)
    with pytest.raises(ConfigError, match="expected 2 shots; got 1"):
        arc(rows(arc_row()), rows(arc_row()), 2)
