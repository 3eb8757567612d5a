"""An asynchronous run killed at any step, in mid-buffer too, and resumed ends in the bytes of one left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import bind
from fedtune.devices.profiles import PROFILES
from fedtune.devices.simulated_clock import Load, SimulatedClock
from fedtune.rounds.clock import CompletedWork
from fedtune.runs.context import RunContext
from fedtune.runs.verification import check_results
from fedtune.store.blobs import Blobs
from fedtune.store.history import replay_journal
from fedtune.store.round_records import read_rounds
from tests import test_crash
from tests.test_crash import LOSSES, NEVER, STEPS, Disk, Ending, Killed, Loss, conduct, die, ending, offset

ROUNDS, PLAIN = 4, test_crash.setting
TABLES: Sequence[Mapping[str, Any]] = (
    {"asynchronous": {"buffer": 2}, "rounds": {"count": ROUNDS, "cohort": 4}},
    {"asynchronous": {"buffer": 2, "concurrency": 3, "max_staleness": 1, "send": "after-receiving"}},
)


def clock() -> SimulatedClock:
    """Devices of which one takes ten times as long, and whose speeds change."""
    tx2 = PROFILES["tx2"]
    speeds = {client.name: 1.0 + place for place, client in enumerate(test_crash.FLEET)} | {"client-4": 0.1}
    profiles = {name: replace(tx2, peak_tflops=tx2.peak_tflops * speed) for name, speed in speeds.items()}

    def load(work: CompletedWork) -> Load:
        return Load(tflop=10.0, gigabytes=0.0, bytes_down=work.traffic.down, bytes_up=work.traffic.up)

    return SimulatedClock(profiles, load, seed=3)


@cache
def setting(tables: int) -> RunContext:
    plain = PLAIN()
    recipe = bind({**test_crash.RECIPE, "rounds": {"count": ROUNDS}, "fleet": {"name": "phones"}, **TABLES[tables]})
    return replace(plain, recipe=recipe, clock=clock())


@pytest.fixture(params=range(len(TABLES)), ids=["after-aggregating", "after-receiving"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_crash, "setting", lambda rounds: setting(request.param))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(root)
    yield disk
    disk.forget()


@pytest.fixture
def undisturbed(tmp_path: Path, chosen: None) -> tuple[Ending, Sequence[str]]:
    root = tmp_path / "undisturbed"
    root.mkdir()
    disk = Disk(root)
    with disk.attached(NEVER, die):
        conduct(root / "run")
    disk.forget()
    check_results(root / "run")
    return ending(root / "run"), disk.steps


def test_buffers_overlap_and_some_updates_are_stale(undisturbed: tuple[Ending, Sequence[str]]) -> None:
    end, steps = undisturbed
    missed = [client.staleness for line in end.lines for client in line.clients.values() if client.status == "ok"]
    assert max(missed) >= 1
    assert any(line.working for line in end.lines)
    assert set(steps) == set(STEPS)
    assert len(set(end.digests)) == ROUNDS
    assert {"ok", "failed"} <= {client.status for line in end.lines for client in line.clients.values()}


@pytest.mark.guarantee("G12")
@pytest.mark.parametrize("every", [25, pytest.param(1, id="every step", marks=pytest.mark.slow)])
def test_an_asynchronous_run_killed_at_any_step_ends_in_the_same_bytes(
    disk: Disk, undisturbed: tuple[Ending, Sequence[str]], every: int, cases: Callable[[int], None]
) -> None:
    end, steps = undisturbed
    for at in range(1 + offset(every), len(steps) + 1, every):
        first: Loss = LOSSES[at // 5 % len(LOSSES)]
        disk.renew()
        reported: list[int] = []
        for loss, number in ((first, at), (LOSSES[at % len(LOSSES)], 1 + at * 7 % 29)):
            with suppress(Killed), disk.attached(number, die):
                conduct(disk.root / "run", reported)
            disk.crash(loss)
            assert set(reported) <= {line.round for line in read_rounds(disk.root / "run")}
        with disk.attached(NEVER, die):
            conduct(disk.root / "run")
        assert ending(disk.root / "run") == end, (at, steps[at - 1], first)
        cases(1)


def test_states_that_orders_start_from_stay_and_go_with_them(disk: Disk, chosen: None) -> None:
    """In mid-run the journal needs the state of every version that is still out, and no other."""
    run = disk.root / "run"
    seen = list[int]()

    class Reported(list[int]):
        def append(self, round: int) -> None:
            history, _ = replay_journal(run)
            seen.append(len({one.round for one in history.sent.values()}))
            versions = {history.digests[one.round - 2] for one in history.sent.values() if one.round > 1}
            assert versions <= history.needed().keys() == set(Blobs(run / "blobs").present())

    conduct(run, Reported())
    assert max(seen) > 1
    history, _ = replay_journal(run)
    assert not history.sent
    assert set(history.needed()) == {history.digests[-1]}
