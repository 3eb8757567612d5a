from __future__ import annotations

import threading

from fedtune.link.server.wakeup import Wakeup

END_S = 60.0


def test_a_flag_that_is_set_before_the_wait_ends_it_at_once_and_is_cleared() -> None:
    wakeup = Wakeup()
    wakeup.set()
    wakeup.wait(END_S)  # else the test would take a minute
    assert not wakeup._is_set


def test_a_wait_ends_when_another_thread_sets_the_flag() -> None:
    wakeup = Wakeup()
    waiter = threading.Thread(target=wakeup.wait, args=(END_S,))
    waiter.start()
    while waiter.is_alive():
        wakeup.set()
        waiter.join(0.01)
    wakeup.set()
    wakeup.wait(END_S)
