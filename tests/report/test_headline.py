from __future__ import annotations

from dataclasses import replace

import pytest

from fedtune.report.headline import adapter_rank, headline
from fedtune.report.reader import Scores, read_run
from tests.report.conftest import WriteRun


def test_the_headline_says_what_happened(write_run: WriteRun) -> None:
    run = read_run(write_run(clients=3, rounds=2))
    assert run.summary is not None
    before, after = (
        replace(run.summary.before, test=Scores(loss=3.4689)),
        replace(run.summary.after, test=Scores(loss=3.3)),
    )
    run = replace(run, summary=replace(run.summary, before=before, after=after, seconds=30.0))
    text = headline(run)
    assert text.startswith("Test loss 3.469 to 3.300; ")
    assert " clients better on held-out rows; " in text
    assert " in 30.0 s" in text


def test_accuracy_is_what_a_classifier_is_known_by(write_run: WriteRun) -> None:
    run = read_run(write_run())
    assert run.summary is not None
    scores = [Scores(loss=0.6, accuracy=accuracy) for accuracy in (0.5, 0.75)]
    parts = [
        replace(part, test=score) for part, score in zip((run.summary.before, run.summary.after), scores, strict=True)
    ]
    run = replace(run, summary=replace(run.summary, before=parts[0], after=parts[1]))
    assert headline(run).startswith("Test accuracy 0.5000 to 0.7500; ")


@pytest.mark.parametrize("largest", [4, 64])
def test_a_rank_beyond_the_clients_is_named(largest: int, write_run: WriteRun) -> None:
    run = read_run(write_run(clients=2, rounds=1))
    last = run.rounds[-1]
    modules = {name: replace(module, rank=largest) for name, module in last.modules.items()}
    clients = {name: replace(client, rank=4) for name, client in last.clients.items()}
    text = headline(replace(run, rounds=(*run.rounds[:-1], replace(last, modules=modules, clients=clients))))
    assert f"adapter of rank {largest}" in text
    assert ("(the recipe's clients train at most 4)" in text) is (largest == 64)


def test_a_run_that_was_stopped_says_so_first(write_run: WriteRun) -> None:
    path = write_run(rounds=2)
    (path / "summary.json").unlink()
    assert headline(read_run(path)).startswith("Stopped after round 2: ")


def test_the_rank_is_that_of_the_round_which_is_the_result(write_run: WriteRun) -> None:
    run = read_run(write_run(clients=2, rounds=2))
    assert run.summary is not None
    ranks = {1: 16, 2: 32}
    rounds = [
        replace(
            record, modules={name: replace(module, rank=ranks[record.round]) for name, module in record.modules.items()}
        )
        for record in run.rounds
        if record.round
    ]
    run = replace(run, rounds=(run.rounds[0], *rounds))
    assert adapter_rank(run) == 32
    assert run.summary is not None
    best = replace(run.summary, selection=replace(run.summary.selection, round=1))
    assert adapter_rank(replace(run, summary=best)) == 16
