from __future__ import annotations

import threading
from pathlib import Path

from fedtune.link.client import pause
from fedtune.link.client.conditions import PAUSED, Conditions
from fedtune.link.client.device_watch import DeviceWatch
from fedtune.link.settings import Policy


def test_each_change_is_one_event(tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, int | str]]] = []
    watch = DeviceWatch(
        Conditions(Policy(), tmp_path),
        stop=threading.Event(),
        record=lambda kind, **fields: events.append((kind, dict(fields))),
    )
    assert watch.obstacle() == ""
    pause.pause(tmp_path, None)
    assert [watch.obstacle(), watch.obstacle()] == [PAUSED, PAUSED]
    pause.resume(tmp_path)
    assert watch.wait()
    assert watch.obstacle() == ""
    assert events == [("waits", {"reason": PAUSED}), ("works", {})]


def test_a_client_that_ends_waits_no_longer(tmp_path: Path) -> None:
    stop = threading.Event()
    watch = DeviceWatch(Conditions(Policy(), tmp_path), stop=stop, record=lambda kind, **fields: None)
    pause.pause(tmp_path, None)
    stop.set()
    assert not watch.wait()
    watch.run()
