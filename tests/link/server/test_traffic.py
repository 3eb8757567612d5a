"""Bytes of a day by hand, and a client that sends them one at a time."""

from __future__ import annotations

from fedtune.link.server.traffic import DAY_S, SPAN_S, DayTraffic
from tests.link.harness import Clock


def test_bytes_count_for_a_day_by_client() -> None:
    clock = Clock()
    traffic = DayTraffic(clock)
    traffic.count("anna", 5)
    clock.now += SPAN_S
    traffic.count("anna", 7)
    traffic.count("bert", 1)
    assert (traffic.of("anna"), traffic.of("bert"), traffic.of("carl")) == (12, 1, 0)
    clock.now += DAY_S - SPAN_S
    assert traffic.of("anna") == 7
    clock.now += SPAN_S
    assert traffic.of("anna") == 0
    traffic.count("anna", 3)
    assert traffic.of("anna") == 3


def test_transfers_of_a_byte_take_an_entry_for_each_minute() -> None:
    """There was an entry for each: 12,000 a minute were 17 million in a day."""
    clock = Clock()
    traffic = DayTraffic(clock)
    for _ in range(20_000):
        clock.now += 0.05
        traffic.count("anna", 1)
    assert traffic.of("anna") == 20_000
    assert traffic.num_entries("anna") <= 20_000 * 0.05 / SPAN_S + 1
    clock.now += 2 * DAY_S
    traffic.count("anna", 1)
    assert traffic.num_entries("anna") == 1
