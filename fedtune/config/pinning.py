"""The digest of a base written into a recipe's own text, whose comments and order stay as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fedtune.config.reading import parse
from fedtune.errors import ConfigError, Fault


def pin_digest(text: str, digest: str, *, label: str = "the recipe") -> str:
    """Return a recipe's text with `model.digest` set, whichever of TOML's forms its table `model` has.

    Raises:
        ConfigError: if the text is no recipe in TOML, or its table `model` cannot be changed safely.
    """
    before = parse(text, label)
    for changed in candidates(text, f"digest = {json.dumps(digest)}"):
        # Whatever the pattern has matched: only a text that differs in this key alone is good.
        if is_pinned(changed, before, digest):
            return changed
    expected, hint = "a table [model] that can be written to", f'add digest = "{digest}" to it'
    raise ConfigError(Fault("model.digest", expected, "another form", hint), source=label)


def candidates(text: str, entry: str) -> Iterator[str]:
    """Yield the text with an entry in each place that may be the table `model`."""
    yield re.sub(r"(?m)^(\s*)digest\s*=\s*(\"[^\"\n]*\"|'[^'\n]*')", lambda match: f"{match[1]}{entry}", text, count=1)
    yield re.sub(r"(?m)^(\s*model\.)digest\s*=\s*\"[^\"\n]*\"", lambda match: f"{match[1]}{entry}", text, count=1)
    inline = re.compile(r"(?m)^(\s*model\s*=\s*\{[^}\n]*?)(,?)\s*\}")
    yield inline.sub(lambda match: re.sub(r"digest\s*=\s*\"[^\"\n]*\"", entry, match[0]), text, count=1)
    yield inline.sub(lambda match: f"{match[1].rstrip()}, {entry} }}", text, count=1)
    yield re.sub(r"(?m)^[ \t]*\[\s*model\s*\][^\n]*$", lambda match: f"{match[0]}\n{entry}", text, count=1)
    yield re.sub(r"(?m)^[ \t]*model\.base\s*=[^\n]*$", lambda match: f"{match[0]}\nmodel.{entry}", text, count=1)


def is_pinned(text: str, before: Mapping[str, Any], digest: str) -> bool:
    """Return whether a text is the recipe `before` with this digest, and differs in nothing else."""
    try:
        after = dict(parse(text, ""))
    except ConfigError:
        return False
    model = before.get("model")
    return isinstance(model, Mapping) and after == {**before, "model": {**model, "digest": digest}}
