from __future__ import annotations

from fedtune.rounds.clock import ClientTime


def test_a_clients_time_is_that_of_its_parts() -> None:
    assert ClientTime(1.0, 2.0, overhead_s=0.5).seconds == 3.5
