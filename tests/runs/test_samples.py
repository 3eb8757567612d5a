from __future__ import annotations

from pathlib import Path
from typing import Any

import fedtune
from fedtune.config import bind
from fedtune.model.base import load_tokenizer
from fedtune.model.samples import Answer
from fedtune.runs.samples import prompts, side_by_side


def test_prompts_with_and_without_references(tables: dict[str, Any]) -> None:
    recipe = bind({**tables, "evaluate": {"prompt": "the", "prompts": ["a?", "b?"], "references": ["x", "y"]}})
    asked = prompts(recipe, load_tokenizer(recipe.model, recipe.root))
    assert [(prompt.question, prompt.reference) for prompt in asked] == [("the", ""), ("a?", "x"), ("b?", "y")]
    assert [prompt.text[-14:] for prompt in asked] == ["the", "\n### Response:", "\n### Response:"]
    as_text = prompts(recipe, load_tokenizer(recipe.model, recipe.root), "text")
    assert [prompt.text for prompt in as_text] == ["the", "a?", "b?"]
    answers = [Answer(str(place), {"loss": place}) for place in range(3)]
    content = side_by_side(recipe.evaluate, asked, answers, answers[::-1])
    assert content["sample"] == {"prompt": "the", "before": "0", "after": "2"}
    assert content["samples"][1] == {
        "prompt": "b?",
        "before": "2",
        "after": "0",
        "reference": "y",
        "scores": {"before": {"loss": 2}, "after": {"loss": 0}},
    }


def test_a_run_answers_its_prompts_before_and_after(tables: dict[str, Any], tmp_path: Path) -> None:
    settings = {
        "batch": 8,
        "prompts": ["the quick", "the dog"],
        "references": [" brown fox", " sleeps"],
        "new_tokens": 4,
    }
    ran = fedtune.simulate({**tables, "rounds": {"count": 1}, "evaluate": settings}, out=tmp_path / "run")
    first, second = ran.summary["samples"]
    assert ran.summary["sample"] is None
    assert first["scores"]["after"]["loss"] < first["scores"]["before"]["loss"]
    assert second["reference"] == " sleeps"
    assert first["before"] != first["after"]
