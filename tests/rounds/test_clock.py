from __future__ import annotations

from fedtune.rounds.clock import ClientTime


def test_a_clients_time_is_that_of_its_parts() -> None:
    assert ClientTime(1.0, 2.0, overhead_s=0.5).seconds == 3.5


def test_a_client_that_is_given_up_has_spent_its_energy_until_then() -> None:
    whole = ClientTime(6.0, 3.0, overhead_s=1.0, joules=50.0)
    assert whole.cut(4.0) == ClientTime(4.0, 0.0, joules=20.0)
    assert whole.cut(40.0).joules == 50.0  # it had finished
    assert ClientTime(6.0, 3.0).cut(4.0) == ClientTime.until_deadline(4.0)
    assert ClientTime(0.0, 0.0, joules=0.0).cut(1.0).joules is None
