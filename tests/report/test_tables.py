from __future__ import annotations

from dataclasses import replace

from fedtune.report.reader import read_run
from fedtune.report.tables import clients, failures, failures_table, losses, verbs
from tests.report.conftest import WriteRun


def test_failures_are_listed_without_a_summary(write_run: WriteRun) -> None:
    path = write_run(clients=3, rounds=2)
    with_summary = failures(read_run(path))
    (path / "summary.json").unlink()
    assert list(failures(read_run(path))) == list(with_summary)
    assert len(with_summary) > 0


def test_steps_that_clients_left_out_are_listed_beside_failures(write_run: WriteRun) -> None:
    run = read_run(write_run(clients=3, rounds=2))
    record = run.rounds[-1]
    name = next(name for name, client in record.clients.items() if client.status == "ok")
    skipping = replace(record.clients[name], skipped_steps=2)
    table = failures_table(replace(run, rounds=(replace(record, clients={name: skipping}),)))
    assert table is not None
    assert table.rows[-1] == [str(record.round), name, "ok", "steps left out, as loss or gradient was not finite: 2"]


def test_the_rate_of_each_round_is_listed_where_it_is_not_always_the_recipe_s(write_run: WriteRun) -> None:
    run = read_run(write_run(clients=2, rounds=2))
    assert not any("rate" in name for name in losses(run).head)
    slower = replace(run, rounds=tuple(replace(r, rate_share=0.5) if r.round == 1 else r for r in run.rounds))
    table = losses(slower)
    column = list(table.head).index("learning rate, times the recipe's")
    assert [row[column] for row in table.rows[1:]] == ["0.5000", "1.000"]


def test_descending_and_probing_are_compared_where_there_are_both(write_run: WriteRun) -> None:
    run = read_run(write_run(clients=3, rounds=1))
    assert verbs(run) is None
    record = run.rounds[-1]
    base = next(client for client in record.clients.values() if client.status == "ok")
    base = replace(base, loss_before=3.0)
    done = {
        "gpu": replace(base, verb="descend", bytes_up=4000, loss_after=2.0),
        "phone": replace(base, bytes_up=100, loss_after=2.9),
        "tablet": replace(base, verb="probe", bytes_up=300, loss_after=2.7),
    }
    done["late"] = replace(base, status="late", verb="descend", bytes_up=9)
    table = verbs(replace(run, rounds=(replace(record, clients=done),)))
    assert table is not None
    columns = [table.head.index(name) for name in ("verb", "updates", "sent up", "fall of the loss")]
    assert [[row[at] for at in columns] for row in table.rows] == [
        ["descend", "1", "4 kB", "1.00"],
        ["probe", "2", "200 B", "0.200"],
    ]


def test_the_column_of_the_rank_is_the_verb_s_where_some_descend(write_run: WriteRun) -> None:
    run = read_run(write_run(clients=2, rounds=1))
    assert run.summary is not None
    totals = {name: replace(total, verb="descend") for name, total in run.summary.clients.items()}
    table = clients(replace(run, summary=replace(run.summary, clients=totals)))
    assert table is not None
    assert "rank" not in table.head
    assert {row[table.head.index("verb")] for row in table.rows} == {"descend"}
