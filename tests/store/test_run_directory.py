from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.errors import StoreError
from fedtune.store import files
from fedtune.store.run_directory import (
    append_round,
    check_run,
    check_vacant,
    mend_rounds,
    read_rounds,
    read_summary,
    write_recipe,
    write_summary,
)


def test_a_taken_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"expected a new or an empty folder; .*--resume .*--fresh"):
        check_vacant(tmp_path / "demo")
    assert (tmp_path / "demo" / "notes.txt").read_text() == "mine"


def test_a_fresh_run_takes_the_next_free_name(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        run = check_vacant(tmp_path / "demo", fresh=True)
        write_recipe(run, "name = 'x'")
        names.append(run.name)
    assert names == ["demo", "demo-2", "demo-3"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    with pytest.raises(StoreError, match="expected a new or an empty folder"):
        check_vacant(tmp_path / "demo")


def test_lines_and_summary_are_read_back(tmp_path: Path) -> None:
    write_recipe(tmp_path, "")
    append_round(tmp_path, {"round": 0})
    append_round(tmp_path, {"round": 1})
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert lines == [{"version": 1, "round": 0}, {"version": 1, "round": 1}]
    write_summary(tmp_path, {"name": "demo"})
    assert read_summary(tmp_path) == {"version": 1, "name": "demo"}


def test_a_diverged_loss_is_written_as_null(tmp_path: Path) -> None:
    append_round(tmp_path, {"test": {"loss": float("nan"), "perplexity": float("inf")}, "seconds": [1.5]})
    line = json.loads((tmp_path / "rounds.jsonl").read_text())
    assert line == {"version": 1, "test": {"loss": None, "perplexity": None}, "seconds": [1.5]}


@pytest.mark.parametrize(
    ("content", "message"), [("{torn", "expected JSON"), ("[]", "of version 1"), ('{"version": 9}', "of version 1")]
)
def test_a_summary_that_cannot_be_trusted_is_named(tmp_path: Path, content: str, message: str) -> None:
    write_recipe(tmp_path, "")
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(StoreError, match=message):
        read_summary(tmp_path)


def test_a_folder_that_is_no_run_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"expected a run directory .*fedtune simulate"):
        read_summary(tmp_path)


def test_a_run_without_a_summary_is_a_run(tmp_path: Path) -> None:
    write_recipe(tmp_path, "")
    check_run(tmp_path)
    with pytest.raises(StoreError, match="No such file"):
        read_summary(tmp_path)


def test_rounds_are_read_as_they_were_appended(tmp_path: Path) -> None:
    assert read_rounds(tmp_path) == []
    loss = {"test": {"loss": float("nan")}}
    records = [append_round(tmp_path, {"round": number, "cohort": ("ann",), **loss}) for number in range(3)]
    assert records[1] == {"version": 1, "round": 1, "cohort": ["ann"], "test": {"loss": None}}
    assert read_rounds(tmp_path) == records


def test_a_line_torn_at_any_byte_is_left_out_and_cut_by_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    kept = [append_round(tmp_path, {"round": 0}), append_round(tmp_path, {"round": 1})]
    whole = path.read_bytes()
    append_round(tmp_path, {"round": 2, "text": "ü"})
    data = path.read_bytes()
    torn = [data[:length] for length in range(len(whole), len(data))]
    torn += [data[:length] + bytes(len(data) - length) for length in range(len(whole), len(data))]
    torn += [whole + bytes(20) + b"\n"]
    for content in torn:
        path.write_bytes(content)
        assert read_rounds(tmp_path) == kept
        assert path.read_bytes() == content
        mend_rounds(tmp_path)
        assert path.read_bytes() == whole
    append_round(tmp_path, {"round": 2})
    assert [line["round"] for line in read_rounds(tmp_path)] == [0, 1, 2]


def test_lines_that_are_whole_are_synced_before_a_run_goes_on_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mend_rounds(tmp_path)
    append_round(tmp_path, {"round": 0})
    steps = list[str]()
    for step in ("sync", "sync_folder"):
        monkeypatch.setattr(files, step, lambda _, step=step: steps.append(step))
    mend_rounds(tmp_path)
    assert steps == ["sync", "sync_folder"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"version": 1, "round": 0}', "{torn", '{"version": 1, "round": 2}'], r"line 2: expected the record"),
        (["[]", '{"version": 1, "round": 2}'], r"line 1: expected the record of a round; TypeError"),
        (["{}", '{"version": 1, "round": 2}'], r"line 1: expected the record of a round; KeyError\('version'\)"),
        (['{"version": 1, "round": 0}', '{"version": 1, "round": 2}'], r"line 2: expected round 1 in version 1; got"),
        (['{"version": 1, "round": 1}', '{"version": 1, "round": 1}'], r"line 2: expected round 2 in version 1; got"),
        (['{"version": 9, "round": 0}'], r"line 1: expected round 0 in version 1; got round 0 in version 9; put back"),
    ],
)
def test_lines_that_cannot_be_trusted_are_named(tmp_path: Path, lines: list[str], message: str) -> None:
    data = "\n".join([*lines, ""])
    (tmp_path / "rounds.jsonl").write_text(data)
    for use in (read_rounds, mend_rounds):
        with pytest.raises(StoreError, match=rf"rounds\.jsonl, {message}"):
            use(tmp_path)
    assert (tmp_path / "rounds.jsonl").read_text() == data
