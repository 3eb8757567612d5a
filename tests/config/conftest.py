"""A recipe of twelve lines, and the messages with which it is refused once it was changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedtune.config import bind
from fedtune.errors import ConfigError

MINIMAL = """\
model = { base = "embedded" }
adapter = { rank = 8, targets = ["q_proj", "v_proj"] }
method = "flora"

[client]
steps = 30
batch = 4
learning_rate = 3e-4

[rounds]
count = 20

[data]
source = "absent.jsonl"
split = { kind = "iid", clients = 4 }
"""


@pytest.fixture
def minimal() -> str:
    """Text of a recipe in which all that has a default is left out."""
    return MINIMAL


@pytest.fixture
def refused() -> Callable[..., list[str]]:
    """Bind the minimal recipe with `--set` overrides and return the faults' texts."""

    def messages(*overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            bind(MINIMAL, overrides=overrides)
        return [str(fault) for fault in caught.value.faults]

    return messages
