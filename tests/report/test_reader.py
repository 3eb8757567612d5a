from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import StoreError
from fedtune.report.reader import finite, read_run
from tests.report.conftest import WriteRun

Lines = list[dict[str, Any]]


def test_a_run_is_read_as_it_was_written(write_run: WriteRun) -> None:
    run = read_run(write_run(name="ward", method="fedit", seed=7, clients=2, rounds=2))
    assert (run.name, run.method, run.seed, run.state, run.torn) == ("ward", "fedit", 7, "finished", False)
    assert [record.round for record in run.rounds] == [0, 1, 2]
    assert run.rounds[1].clients["client-0"].status == "failed"
    assert run.rounds[1].clients["client-0"].reason == "out of memory"
    assert run.rounds[2].modules["model.layers.0.self_attn.q_proj"].singular_values[0] == 0.5
    assert run.rounds[0].loss_before is None
    assert run.summary is not None
    assert run.summary.after.worst is not None
    assert run.summary.after.worst.client == "client-1"


def test_a_torn_last_line_of_an_interrupted_run_is_left_out_and_said(write_run: WriteRun) -> None:
    path = write_run(rounds=3)
    (path / "summary.json").unlink()
    lines = (path / "rounds.jsonl").read_bytes()
    (path / "rounds.jsonl").write_bytes(lines[:-40])
    run = read_run(path)
    assert run.torn
    assert run.state == "interrupted"
    assert run.rounds[-1].round == 2


@pytest.mark.parametrize("cut", range(1, 200, 7))
def test_wherever_the_last_line_is_cut_the_rest_is_read(write_run: WriteRun, cut: int) -> None:
    path = write_run(clients=1, rounds=1, layers=0)
    (path / "summary.json").unlink()
    first, second = (path / "rounds.jsonl").read_bytes().splitlines(keepends=True)
    (path / "rounds.jsonl").write_bytes(first + second[:cut])
    run = read_run(path)
    assert run.torn
    assert len(run.rounds) == 1


def test_a_torn_line_of_a_finished_run_is_a_fault(write_run: WriteRun) -> None:
    path = write_run(rounds=3)
    (path / "rounds.jsonl").write_bytes((path / "rounds.jsonl").read_bytes()[:-40])
    with pytest.raises(StoreError, match=r"rounds\.jsonl, line 4: expected a whole line, .* that is cut off"):
        read_run(path)


def test_a_broken_line_in_the_middle_names_file_and_line(write_run: WriteRun) -> None:
    path = write_run(rounds=3)
    (path / "summary.json").unlink()
    lines = (path / "rounds.jsonl").read_text().splitlines()
    lines[1] = lines[1][:50]
    (path / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(StoreError, match=r"rounds\.jsonl, line 2: expected one JSON object"):
        read_run(path)


def test_without_a_summary_name_method_and_seed_come_from_the_recipe(write_run: WriteRun) -> None:
    path = write_run(name="ward", method="ffa", seed=3)
    (path / "summary.json").unlink()
    run = read_run(path)
    assert (run.name, run.method, run.seed) == ("ward", "ffa", 3)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("round", "1", r"line 2: round: expected int; got '1'"),
        ("seconds", True, r": seconds: expected float; got True"),
        ("cohort", ["a", 1], r": cohort\[1\]: expected str; got 1"),
        ("test", [], r": test: expected an object; got \[\]"),
        ("version", 2, r"line 2: expected version 1; got 2"),
        ("round", 0, r"line 2: expected round 1: every round from 0 on has one line, in order; got round 0"),
        ("round", 3, r"line 2: expected round 1: every round from 0 on has one line, in order; got round 3"),
        (
            "clients",
            {"a": {"status": "tired"}},
            r": clients\.a\.status: expected 'ok' or 'failed' or 'refused' or 'late'",
        ),
        ("modules", {"m": {"norm": 1.0}}, r": modules\.m: expected the key 'rank'"),
    ],
)
def test_a_malformed_value_is_named_with_its_key(write_run: WriteRun, key: str, value: object, message: str) -> None:
    path = write_run(edit=lambda lines, summary: lines[1].update({key: value}))
    with pytest.raises(StoreError, match=message):
        read_run(path)


def test_a_malformed_summary_is_named(write_run: WriteRun) -> None:
    path = write_run()
    (path / "summary.json").write_text('{"version": 1,\n "name": ')
    with pytest.raises(StoreError, match=r"summary\.json, line 2: expected JSON"):
        read_run(path)


def test_without_rounds_there_is_nothing_to_read(write_run: WriteRun) -> None:
    path = write_run()
    (path / "rounds.jsonl").unlink()
    with pytest.raises(StoreError, match=r"rounds\.jsonl: expected this file in a run directory"):
        read_run(path)


@pytest.mark.parametrize(
    ("removed", "sentences"),
    [
        (["recipe.toml"], ["recipe.toml is not in the folder: name, method and seed are those of summary.json"]),
        (["summary.json"], []),  # as an interrupted run is
        (
            ["recipe.toml", "summary.json"],
            ["recipe.toml is not in the folder: method and seed are not known", "summary.json is not in the folder"],
        ),
    ],
)
def test_what_a_copy_lacks_is_named(write_run: WriteRun, removed: list[str], sentences: list[str]) -> None:
    path = write_run(rounds=3)
    for name in removed:
        (path / name).unlink()
    run = read_run(path)
    assert len(run.missing) == len(sentences)
    for sentence, beginning in zip(run.missing, sentences, strict=True):
        assert sentence.startswith(beginning)


def test_a_copy_of_fewer_rounds_than_the_run_has_is_named(write_run: WriteRun) -> None:
    path = write_run(rounds=3)
    lines = (path / "rounds.jsonl").read_bytes().splitlines(keepends=True)
    (path / "rounds.jsonl").write_bytes(b"".join(lines[:2]))
    assert read_run(path).missing == ("rounds.jsonl ends with round 1 and the run with round 3: copy it again.",)


def test_a_run_whose_recipe_has_been_run_to_its_end_and_has_no_summary_is_not_called_interrupted(
    write_run: WriteRun,
) -> None:
    path = write_run(rounds=3)
    (path / "summary.json").unlink()
    (path / "recipe.toml").write_text('name = "ward"\n[rounds]\ncount = 3\n')
    assert read_run(path).missing[0].startswith("summary.json is not in the folder")


@pytest.mark.parametrize("recipe", ['seed = "x"\n', "rounds = 3\n", "method = 3\n", "name = 3\n"])
def test_a_recipe_of_other_types_is_shown_as_it_is(write_run: WriteRun, recipe: str) -> None:
    path = write_run(rounds=1)
    (path / "summary.json").unlink()
    (path / "recipe.toml").write_text(recipe)
    assert read_run(path).recipe == recipe


def test_a_run_without_a_complete_round_is_refused(write_run: WriteRun) -> None:
    path = write_run()
    (path / "rounds.jsonl").write_text("")
    with pytest.raises(StoreError, match="at least one complete round"):
        read_run(path)


def test_unknown_keys_are_ignored_and_missing_optional_ones_are_none(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('name = "x"\n')
    (tmp_path / "rounds.jsonl").write_text(json.dumps({"version": 1, "round": 0, "seconds": 1, "new": [1]}) + "\n")
    run = read_run(tmp_path)
    assert run.rounds[0].test is None
    assert run.rounds[0].seconds == 1.0


def test_only_numbers_that_can_be_drawn_are_finite() -> None:
    assert finite(2.5) == 2.5
    assert all(math.isnan(finite(value)) for value in (None, math.nan, math.inf))
