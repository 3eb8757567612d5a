"""The prompts of a recipe as the model reads them, and the answers before and after as summary.json holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from fedtune.config import Recipe
from fedtune.data.encode import Tokenizer, prompt_text
from fedtune.data.settings import Form
from fedtune.model.samples import Answer, Prompt
from fedtune.model.settings import EvaluationSettings


def prompts(recipe: Recipe, tokenizer: Tokenizer, form: Form = "instruction") -> Sequence[Prompt]:
    """Return `evaluate.prompt` and then each of `evaluate.prompts`, as a model of this recipe reads them.

    The first is continued as it is; the others are written as the training rows, of the given form, were.
    """
    settings = recipe.evaluate
    single = [] if settings.prompt is None else [Prompt(settings.prompt, settings.prompt)]
    questions = zip_longest(settings.prompts, settings.references, fillvalue="")
    return [
        *single,
        *(
            Prompt(question, *prompt_text(question, recipe.data, tokenizer, form=form), reference=reference)
            for question, reference in questions
        ),
    ]


def side_by_side(
    settings: EvaluationSettings, asked: Sequence[Prompt], before: Sequence[Answer], after: Sequence[Answer]
) -> Mapping[str, Any]:
    """Return `sample`, of `evaluate.prompt`, and `samples`, of `evaluate.prompts`: without any, that key is missing."""
    pairs = [sample(*parts) for parts in zip(asked, before, after, strict=True)]
    single, several = (None, pairs) if settings.prompt is None else (pairs[0], pairs[1:])
    return {"sample": single} | ({"samples": several} if several else {})


def sample(prompt: Prompt, before: Answer, after: Answer) -> Mapping[str, Any]:
    """Return one prompt with its two answers; with a reference also that, and the scores of both."""
    texts = {"prompt": prompt.question, "before": before.text, "after": after.text}
    if not prompt.reference:
        return texts
    return {**texts, "reference": prompt.reference, "scores": {"before": before.scores, "after": after.scores}}
