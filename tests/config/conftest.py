"""A recipe with nothing but what it must hold, and the faults it has once it was changed."""

from __future__ import annotations

from typing import Protocol

import pytest

from fedtune.config import Recipe, bind
from fedtune.errors import ConfigError

SHORTEST = """\
model = { base = "embedded" }
adapter = { rank = 8, targets = ["q_proj", "v_proj"] }
method = "flora"
client = { steps = 20, batch = 4, learning_rate = 3e-4 }
rounds = { count = 10 }

[data]
source = "train.jsonl"
split = { kind = "iid", clients = 4 }
"""


class Faulty(Protocol):
    def __call__(self, *overrides: str, text: str = SHORTEST, more: str = "") -> dict[str, str]: ...


@pytest.fixture
def recipe() -> Recipe:
    return bind(SHORTEST)


@pytest.fixture
def faulty() -> Faulty:
    """Bind a text, with more text after it and `--set` overrides; return the faults' messages by path."""

    def messages(*overrides: str, text: str = SHORTEST, more: str = "") -> dict[str, str]:
        with pytest.raises(ConfigError) as caught:
            bind(text + more, overrides=overrides)
        found = {fault.path: str(fault) for fault in caught.value.faults}
        assert len(found) == len(caught.value.faults), f"two faults of one key: {caught.value}"
        return found

    return messages
