from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from io import StringIO

import pytest
from rich.console import Console

from fedtune.messages import (
    AdmittedUpdate,
    ClientUpdate,
    Failure,
    LoraResult,
    Traffic,
)
from fedtune.rounds.events import ClientFinished, Event, Phase, RoundFinished, RoundStarted
from fedtune.rounds.record import ClientRecord, ModuleRecord
from fedtune.terminal.progress import Progress, ProgressState, after_round, failure_lines, round_line, table
from tests.terminal.conftest import record, round_events


def told(events: Sequence[Event], *, terminal: bool = False) -> str:
    file = StringIO()
    ticks = iter(range(10_000))
    console = Console(file=file, force_terminal=terminal, width=110, highlight=False, _environ={"TERM": "xterm"})
    with Progress(console, title="tiny", clock=lambda: float(next(ticks))) as progress:
        for event in events:
            progress(event)
    return file.getvalue()


def standing(events: Sequence[Event]) -> ProgressState:
    return reduce(after_round, events, ProgressState())


def test_without_a_terminal_each_round_is_one_plain_line(events: list[Event]) -> None:
    lines = told(events).splitlines()
    assert lines[0] == "3 examples were dropped"
    assert lines[1] == "before  test 2.800"
    assert lines[2] == (
        "round 1/3  local loss 2.600 -> 2.400  test 2.500 (best 2.500, round 1)  clients 2/2  up 1.0 kB  down 2.0 kB"
        "  2.0 s  ETA 4.0 s"
    )
    assert "test" not in lines[3]  # not scored in this round
    assert "clients 2/3" in lines[3]
    assert lines[5].startswith("round 3/3")
    assert "test 2.700 (best 2.500, round 1)" in lines[5]
    assert "ETA" not in lines[5]


def test_the_rate_of_a_round_is_in_its_line_where_it_is_not_the_recipe_s(events: list[Event]) -> None:
    first = next(event for event in events if isinstance(event, RoundFinished) and event.record.round == 1)
    slower = [replace(e, record=replace(e.record, rate_share=0.55)) if e is first else e for e in events]
    assert "  rate 0.55 x  clients 2/2" in told(slower)
    assert "rate" not in told(events)


def test_steps_that_clients_left_out_are_in_the_line_by_client() -> None:
    clients = {name: ClientRecord("ok", skipped_steps=count) for name, count in {"bob": 2, "ann": 1, "cyd": 0}.items()}
    state = standing([RoundFinished(replace(record(1, test=None), clients=clients))])
    assert "  skipped steps: ann 1, bob 2  " in round_line(state)


def test_the_least_share_that_a_bounded_rank_leaves_of_a_change_is_in_the_line() -> None:
    def line(*modules: ModuleRecord) -> str:
        named = {str(index): module for index, module in enumerate(modules)}
        return round_line(standing([RoundFinished(replace(record(1, test=None), modules=named))]))

    cut = ModuleRecord(rank=4, energy_kept=0.9, state_energy_kept=0.95)
    assert "  energy kept 85.5 %  " in line(ModuleRecord(rank=4), cut, ModuleRecord(rank=4, energy_kept=0.99))
    assert "energy" not in line(ModuleRecord(rank=4), ModuleRecord(rank=4, energy_kept=1.0))


def test_a_client_that_failed_is_named_with_its_reason_and_its_name_is_harmless(events: list[Event]) -> None:
    line = told(events).splitlines()[4]
    assert line == ("  [red]evil[/]\\x1b[2J\\u202e refused: norm 41.2 > 10.0 for [red]evil[/]\\x1b[2J\\u202e")


def test_many_failures_are_counted() -> None:
    lines = failure_lines([Failure.from_text(f"c{number}", "late") for number in range(12)])
    assert len(lines) == 6
    assert lines[-1] == "and 7 more"


def test_on_a_terminal_one_table_is_redrawn(events: list[Event]) -> None:
    text = told(events, terminal=True)
    assert "preparing" in text
    assert "round 3/3" in text
    assert "elapsed" in text
    assert "\x1b[2K" in text  # lines are erased before they are written again
    assert "\x1b[2J" not in text  # what the hostile name asks for


def test_the_table_shows_the_round_that_runs(events: list[Event]) -> None:
    console = Console(file=StringIO(), width=110)
    half = standing([*events[:6], *round_events(2, test=None, failures=["late-one"])[:3]])
    with console.capture() as caught:
        console.print(table(half, "tiny", 14.0))
    text = caught.get()
    assert "round 2/3" in text
    assert "elapsed 14.0 s" in text
    assert "ETA 4.0 s" in text
    assert "loss 2.600 -> 2.400" in text
    assert "clients 2/3" in text
    assert "up 2.0 kB   down 4.0 kB" in text  # the first round's bytes and this one's


def test_a_client_refused_after_its_update_arrived_counts_once() -> None:
    update = AdmittedUpdate(ClientUpdate("a", 1, 1, LoraResult({})))
    traffic = Traffic(down=10, up=5)
    end = standing(
        [
            RoundStarted(1, 1, ("a",)),
            ClientFinished(1, update, traffic),
            ClientFinished(1, Failure.from_text("a", "norm", kind="refused"), traffic),
        ]
    )
    assert [failure.reason for failure in end.failures] == ["norm"]
    assert end.total == traffic


def test_the_end_is_estimated_from_the_median_of_the_last_rounds() -> None:
    lengths = [100.0, 100.0, 2.0, 2.0, 50.0, 2.0, 3.0]
    events: list[Event] = [RoundStarted(1, 10, ())]
    events += [RoundFinished(record(number, test=None, seconds=each)) for number, each in enumerate(lengths, 1)]
    assert standing(events).remaining_s == pytest.approx(3 * 2.0)
    assert ProgressState().remaining_s is None


def test_the_best_score_is_kept_with_its_round(events: list[Event]) -> None:
    assert standing(events).best == (2.5, 1)


def test_the_line_of_round_zero_begins_another_run(events: list[Event]) -> None:
    again = standing([*events, RoundFinished(record(0, test=3.5))])
    assert again.best == (3.5, 0)
    assert again.total == Traffic()
    assert again.seconds == ()


def test_steps_outside_the_rounds_have_names() -> None:
    assert told([Phase("loading the base")]).splitlines() == ["loading the base ..."]
    on_terminal = told([Phase("loading\x1b the base")], terminal=True)
    assert "loading\\x1b the base" in on_terminal
    state = standing([RoundStarted(1, 2, ("a",)), Phase("scoring the base")])
    console = Console(file=StringIO(), width=110)
    with console.capture() as caught:
        console.print(table(state, "tiny", 1.0))
    assert "scoring the base" in caught.get()
    assert after_round(state, RoundStarted(2, 2, ("a",))).phase == ""


def test_the_estimated_end_comes_nearer_within_a_round() -> None:
    state = standing([RoundStarted(1, 3, ()), RoundFinished(record(1, test=None, seconds=10.0))])
    console = Console(file=StringIO(), width=110)
    for since, shown in ((0.0, "ETA 20.0 s"), (7.0, "ETA 13.0 s"), (99.0, "ETA 0.0 s")):
        with console.capture() as caught:
            console.print(table(state, "tiny", 10.0 + since, since))
        assert shown in caught.get()
