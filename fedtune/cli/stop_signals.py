"""Work that SIGTERM and Ctrl-C end in order, on every command line."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


def until_signal(work: Callable[[], None]) -> None:
    """Do some work until it is done, or SIGTERM or Ctrl-C comes; a second signal ends the process at once.

    A journal survives both. No context manager: a signal between its block and its exit would pass all that catches it.
    """
    signals, inside = 0, True

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            os._exit(128 + number)
        if inside:
            raise KeyboardInterrupt

    before = dict[signal.Signals, Any]()
    try:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.getsignal(number)
                signal.signal(number, stop)
            work()
        finally:
            inside = False
    except KeyboardInterrupt:
        if not signals:  # of nothing that came here
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
