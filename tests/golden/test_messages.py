"""Messages, states and journals are the bytes that 0.2.0 wrote; `record.py` beside this file records them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden import messages

RECORDED = json.loads((Path(__file__).parent / "messages.json").read_text())["values"]
GOT = json.loads(json.dumps(messages.values()))


@pytest.mark.parametrize("group", sorted(RECORDED))
def test_the_bytes_are_those_that_were_recorded(group: str) -> None:
    assert GOT[group] == RECORDED[group]


def test_every_kind_of_message_is_recorded() -> None:
    assert sorted(GOT) == sorted(RECORDED)
