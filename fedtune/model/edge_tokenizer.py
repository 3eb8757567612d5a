"""A base's tokenizer as the files of a bundle, by which a device without transformers gives the same tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedtune.errors import ConfigError, Fault

TOKENIZER, CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


def tokenizer_files(tokenizer: Any) -> Mapping[str, bytes]:
    """Return the files of a tokenizer by name, as it is in use.

    Not the base's own files: transformers changes a tokenizer as it loads it (the tokens that it puts around a text,
    special tokens that it adds), and names some of its properties in code alone.

    Args:
        tokenizer: of transformers.

    Raises:
        ConfigError: if it is not a fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        expected = "a fast tokenizer (tokenizer.json), which devices can read"
        raise ConfigError(Fault("model.base", expected, type(tokenizer).__name__))
    templates = tokenizer.chat_template
    config: dict[str, Any] = {
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        # Again as a whole: families of models have special tokens of their own, which templates read too.
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "model_max_length": int(tokenizer.model_max_length),
        "model_input_names": list(tokenizer.model_input_names),
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "pad_token_type_id": int(tokenizer.pad_token_type_id),
        "split_special_tokens": bool(tokenizer.split_special_tokens),
        "clean_up_tokenization_spaces": bool(tokenizer.clean_up_tokenization_spaces),
    }
    if isinstance(templates, Mapping):
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    files = {
        TOKENIZER: tokenizer.backend_tokenizer.to_str().encode(),
        CONFIG: (json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode(),
    }
    return files | ({CHAT_TEMPLATE: templates.encode()} if isinstance(templates, str) else {})
