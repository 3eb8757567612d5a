from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from fedtune.report.differences import Interval, differences, interval, settings_table, warnings
from fedtune.report.reader import Run, Scores, read_run
from tests.report.conftest import WriteRun


def ended(run: Run, loss: float, clients: dict[str, float] | None = None, **base: Any) -> Run:
    assert run.summary is not None
    held_out = {name: Scores(loss=value) for name, value in (clients or {}).items()}
    summary = run.summary
    before = replace(summary.before, test=Scores(loss=4.0, examples=8, tokens=80))
    after = replace(summary.after, test=Scores(loss=loss), held_out=held_out)
    return replace(run, summary=replace(summary, before=before, after=after, base=replace(summary.base, **base)))


def test_an_interval_by_hand() -> None:
    # Mean 0.2, deviation 0.1, three pairs: 4.303 * 0.1 / sqrt(3) = 0.2484.
    three = interval([0.1, 0.2, 0.3])
    assert (three.mean, three.low, three.high) == pytest.approx((0.2, -0.0484, 0.4484), abs=1e-4)
    assert three.pairs == 3
    alone = interval([0.5])
    assert (alone.mean, alone.pairs) == (0.5, 1)
    assert math.isnan(alone.low)


def test_seeds_that_two_recipes_share_are_paired(write_run: WriteRun) -> None:
    runs = {seed: read_run(write_run(f"s{seed}", seed=seed)) for seed in (0, 1, 2)}
    first = [ended(runs[0], 2.0), ended(runs[1], 3.0)]
    # Of seed 2 there is no run of the first recipe: its loss of 9 must not count.
    other = [replace(ended(runs[seed], loss), name="b") for seed, loss in ((0, 2.5), (1, 3.5), (2, 9.0))]
    (found,) = differences([first, other])
    assert (found.recipe, found.measure, found.paired_by) == ("b", "test loss", "seed")
    assert found.interval == Interval(0.5, 0.5, 0.5, 2)


def test_with_one_seed_clients_are_paired(write_run: WriteRun) -> None:
    run = read_run(write_run())
    first, other = ended(run, 2.0, {"a": 1.0, "b": 2.0, "c": 9.0}), ended(run, 2.5, {"a": 1.25, "b": 2.25, "d": 0.0})
    (found,) = differences([[first], [other]])
    assert (found.measure, found.paired_by) == ("held-out loss", "client")
    assert found.interval == Interval(0.25, 0.25, 0.25, 2)
    (found,) = differences([[ended(run, 2.0)], [ended(run, 2.5)]])
    assert (found.measure, found.interval.mean, found.interval.pairs) == ("test loss", 0.5, 1)
    stranger = replace(other, seed=7)
    assert differences([[first], [stranger]]) == []


def test_settings_that_differ_are_named_and_seeds_are_not(write_run: WriteRun) -> None:
    run = read_run(write_run())
    texts = [
        'name = "a"\nseed = 0\n[client]\nsteps = 3\nbatch = 4\n[engine]\nname = "ray"\n',
        'name = "b"\nseed = 1\n[client]\nsteps = 5\nbatch = 4\n[pruning]\ntarget = 0.5\n',
    ]
    groups = [[replace(run, recipe=text)] for text in texts]
    assert settings_table(groups) == {"client.steps": ["3", "5"], "pruning.target": ["-", "0.5"]}


def test_other_bases_and_other_test_data_are_warned_of(write_run: WriteRun) -> None:
    run = read_run(write_run())
    first = ended(run, 2.0)
    assert list(warnings([[first], [replace(first, name="b")]])) == []
    (text,) = warnings([[first], [ended(run, 2.0, digest="f" * 64)]])
    assert "other bases" in text
    assert first.summary is not None
    for test in (Scores(loss=4.1, examples=8, tokens=80), Scores(loss=4.0, examples=9, tokens=80)):
        other = replace(first, summary=replace(first.summary, before=replace(first.summary.before, test=test)))
        (text,) = warnings([[first], [other]])
        assert "seed 0: the test data differ" in text
    stopped = replace(first, summary=replace(first.summary, state="interrupted"))
    assert list(warnings([[first], [stopped]])) == [f"{run.name}, seed 0, did not finish"]


def test_other_rows_of_clients_are_warned_of(write_run: WriteRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ended(read_run(write_run()), 2.0)
    data = iter(["one", "two"])
    monkeypatch.setattr("fedtune.report.differences.RunJournal.inputs", lambda path: {"data": next(data)})
    (text,) = warnings([[run], [run]])
    assert text.endswith("the clients hold other rows")
