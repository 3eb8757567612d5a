from __future__ import annotations

from fedtune.evaluation.items import few_shot


def test_shots_stand_between_the_introduction_and_the_question_in_order() -> None:
    shots = [("Q: 1", " A1"), ("Q: 2", " A2")]
    assert few_shot("Facts.\n\n", shots, "Q: 3") == "Facts.\n\nQ: 1 A1\n\nQ: 2 A2\n\nQ: 3"
    assert few_shot("", [], "Q: 3") == "Q: 3"
