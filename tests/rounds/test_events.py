from __future__ import annotations

from typing import Any

from fedtune.rounds.events import ClientFinished, RoundStarted
from tests.rounds.scripted import (
    answer,
    rounds,
)


def test_the_watcher_sees_start_and_every_client() -> None:
    events: list[Any] = []
    rounds({"ann": answer(), "bob": answer()}, count=2, watch=events.append)
    assert [event.round for event in events if isinstance(event, RoundStarted)] == [1, 2]
    assert [event.outcome.client for event in events if isinstance(event, ClientFinished)] == ["ann", "bob"] * 2
