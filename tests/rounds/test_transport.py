from __future__ import annotations

from fedtune.rounds.schedule import Schedule
from fedtune.rounds.transport import Rule, Transport
from fedtune.simulation.inprocess import InProcess


def test_an_engine_is_a_transport() -> None:
    transport: Transport = InProcess([], {})
    assert list(transport.exchange({}, Rule(quorum=1))) == []


def test_a_rule_without_a_deadline_waits_for_every_client() -> None:
    assert Schedule(count=1).rule == Rule(quorum=1, deadline_s=None, grace_s=60.0)
    assert Schedule(count=1, min_clients=3, deadline_s=5.0, grace_s=2.0).rule == Rule(3, 5.0, 2.0)


def test_updates_and_time_so_far_count_towards_quorum_and_deadline() -> None:
    rule = Rule(quorum=3, deadline_s=10.0, grace_s=5.0)
    assert rule.remaining(2, 4.0) == Rule(quorum=1, deadline_s=6.0, grace_s=5.0)
    assert rule.remaining(4, 11.0) == Rule(quorum=0, deadline_s=0.0, grace_s=5.0)
    assert Rule(quorum=1).remaining(0, 4.0) == Rule(quorum=1)
