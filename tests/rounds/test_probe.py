from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from fedtune.messages import Client
from fedtune.rounds.journal import InterruptedRound
from fedtune.rounds.probe import CheckIns, Prober, SpeedProbe, limit_s, with_probes
from tests.rounds.scripted import Noted, answer, chosen

COHORT = [Client("ann", 8, s_per_tflop=9.0), Client("bob", 8)]


def measure(round: int, now_s: float, cohort: Sequence[Client], limit_s: float) -> Mapping[str, SpeedProbe]:
    return {"ann": SpeedProbe(2.0, 0.5, seconds=1.5 + now_s / 100)}


def test_a_speed_is_of_one_round_and_clients_may_say_nothing() -> None:
    clients, spent = with_probes(Prober(measure), 1, 0.0, COHORT)
    assert [(c.s_per_tflop, c.s_per_mb) for c in clients] == [(2.0, 0.5), (None, None)]
    assert spent == 1.5


def test_without_a_prober_what_a_client_said_before_counts_for_nothing() -> None:
    clients, spent = with_probes(None, 1, 0.0, COHORT)
    assert [(c.s_per_tflop, c.s_per_mb) for c in clients] == [(None, None)] * 2
    assert spent == 0.0


def test_probes_are_part_of_the_clock_and_of_what_a_planner_observes() -> None:
    replies = {"ann": answer(), "bob": answer()}
    plain = chosen(replies, {"ann": 2.0, "bob": 3.0})
    asked = chosen(replies, {"ann": 2.0, "bob": 3.0}, prober=Prober(measure))
    assert [result.clock_s for result in plain] == [4.0, 8.0]
    # The second one begins after the first, at 5.5 s.
    assert [result.clock_s for result in asked] == pytest.approx([5.5, 5.5 + 1.5 + 0.055 + 4.0])
    seen = {each.client: (each.probed_s_per_tflop, each.probed_s_per_mb) for each in asked[0].observations}
    assert seen == {"ann": (2.0, 0.5), "bob": (None, None)}
    assert all(each.probed_s_per_tflop is None for each in plain[0].observations)


@pytest.mark.parametrize("repeatable", [True, False])
def test_an_interrupted_round_goes_on_with_the_probes_that_it_began_with(repeatable: bool) -> None:
    """What a simulated clock says again takes its time again; a machine would say something else by now."""
    replies, seconds, journal = {"ann": answer(), "bob": answer()}, {"ann": 2.0, "bob": 3.0}, Noted()
    whole = chosen(replies, seconds, count=1, prober=Prober(measure), journal=journal)
    noted = journal.noted
    assert noted["probes"] == {"ann": (2.0, 0.5)}

    def other(round: int, now_s: float, cohort: Sequence[Client], limit_s: float) -> Mapping[str, SpeedProbe]:
        return measure(round, now_s, cohort, limit_s) if repeatable else {"ann": SpeedProbe(77.0, 77.0, 77.0)}

    held = InterruptedRound({"ann": 10, "bob": 10}, noted["digests"], {}, probes=noted["probes"])
    rest = chosen(replies, seconds, count=1, prober=Prober(other, repeatable=repeatable), journal=Noted(held))
    assert rest[0].observations == whole[0].observations
    assert rest[0].clock_s == (whole[0].clock_s if repeatable else 4.0)


def test_a_probe_never_takes_more_than_a_twentieth_of_a_mean_round() -> None:
    """Rounds of MiniLM lasted 1.4 to 2.2 s, and probes of two seconds before them made them longer."""
    for mean_s in (0.1, 2.0, 20.0, 1e6):
        for round in (2, 3, 50):
            assert 2 * limit_s(round, (round - 1) * mean_s) <= min(2.0, 0.05 * mean_s * (1 + 1e-9))


def test_what_a_client_says_at_check_in_is_for_one_round() -> None:
    said = CheckIns()
    first = said(1, 0.0, COHORT, 1.0)
    assert first["ann"] == SpeedProbe(9.0, None)
    assert "ann" not in said(2, 0.0, COHORT, 1.0)
    again = [Client("ann", 8, s_per_tflop=8.5)]  # it was away, and has measured anew
    assert said(3, 0.0, again, 1.0) == {"ann": SpeedProbe(8.5, None)}
