"""Encoded examples in the form that other libraries train on: a `datasets.Dataset` of token ids and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedtune.data.encode import Example
from fedtune.errors import ExtraError

if TYPE_CHECKING:
    from datasets import Dataset


def columns(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """Return examples by column: `input_ids` and `labels` (-100 where a token is not learned; or the class).

    Of rows with two answers: `prompt_ids`, `chosen_ids` and `rejected_ids`.
    """
    if any(example.rejected is not None for example in examples):
        pairs = [(example, example.rejected) for example in examples if example.rejected is not None]
        return {
            "prompt_ids": [one.input_ids[: one.prompt_tokens].tolist() for one, _ in pairs],
            "chosen_ids": [one.input_ids[one.prompt_tokens :].tolist() for one, _ in pairs],
            "rejected_ids": [other.input_ids[other.prompt_tokens :].tolist() for _, other in pairs],
        }
    labels = [one.labels if isinstance(one.labels, int) else one.labels.tolist() for one in examples]
    given: dict[str, list[Any]] = {"input_ids": [one.input_ids.tolist() for one in examples], "labels": labels}
    if all(one.token_types is not None for one in examples):
        given["token_type_ids"] = [one.token_types.tolist() for one in examples if one.token_types is not None]
    return given


def to_dataset(examples: Sequence[Example]) -> Dataset:
    """Return examples as a `datasets.Dataset`; see `columns`.

    Raises:
        ExtraError: if that package is not installed.
    """
    try:
        from datasets import Dataset
    except ModuleNotFoundError:
        raise ExtraError(
            "expected the package datasets, whose Dataset a trainer of one's own is given; got none; run "
            'pip install "fedtune[data]"'
        ) from None

    return Dataset.from_dict(columns(examples))
