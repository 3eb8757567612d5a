"""The transformers config of a base: its classes, its padding token, and whether its task fits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fedtune.errors import ConfigError, Fault
from fedtune.model.base_files import check_config, check_folder, locate, not_found, readable
from fedtune.model.classes import Classes, class_settings, match_classes, named_rows
from fedtune.model.libraries import quiet
from fedtune.model.settings import ModelSettings


def read_config(path: str | Path, settings: ModelSettings, labels: Sequence[str]) -> tuple[Any, Classes]:
    """Return the transformers config of a base, with the names of the classes for classification, and those classes.

    Raises:
        ConfigError: if the base is of a kind that cannot be used.
    """
    # Without an explicit trust_remote_code=False transformers would ask on the terminal whether to run code.
    load = partial(AutoConfig.from_pretrained, path, revision=settings.revision, trust_remote_code=False)
    with quiet():
        config, classes = load(), Classes((), fits=True)
        check_config(config.to_dict(), settings.base)
        if settings.task == "classification":
            classes = match_classes(named_rows(config), labels)
            config = load(**class_settings(classes.labels))
    if type(config) not in auto_class(settings.task)._model_mapping:
        expected = f"a model with a head for model.task = {settings.task!r}"
        hint = "choose a decoder" if settings.task == "causal" else "choose a text encoder or decoder"
        raise ConfigError(Fault("model.base", expected, f"{settings.base} ({config.model_type})", hint))
    # A padding token that was added to the tokenizer and not to the model: what is padded is masked, any other will do.
    rows = getattr(config, "vocab_size", None)
    if rows and config.pad_token_id is not None and config.pad_token_id >= rows:
        config.pad_token_id = None
    return config, classes


def auto_class(task: str) -> Any:
    """Return the class of transformers that loads a model for a task."""
    return AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM


def class_order(settings: ModelSettings, root: Path, labels: Sequence[str]) -> Sequence[str]:
    """Return the classes of data with these labels by row of the base's head; in this order where that is new.

    Raises:
        ConfigError: if the base has no config.
    """
    path = locate(settings, root)
    check_folder(settings, path)
    try:
        return read_config(readable(path, settings.revision), settings, labels)[1].labels
    except (OSError, ValueError) as error:
        raise not_found(settings, error) from error
