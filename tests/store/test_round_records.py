from __future__ import annotations

import json
import math
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import StoreError
from fedtune.rounds.record import ClientRecord, ModuleRecord, RoundRecord, UnsolicitedRecord, observations
from fedtune.store import files, round_records
from fedtune.store.round_records import append_round, mend_rounds, read_rounds, scan


def record(number: int, **fields: object) -> RoundRecord:
    return RoundRecord(round=number, seconds=1.5, **fields)  # type: ignore[arg-type]


OK = ClientRecord(
    "ok", rank=2, steps=3, examples=30, bytes_down=100, bytes_up=10, ratio=0.5, deadline_s=9.0, why="fits",
    compute_s=2.0, transfer_s=1.0, overhead_s=0.5, loss_before=4.0, loss_after=2.0, seconds=1.0, peak_bytes=10,
    tokens=20, norm=0.5, importance=0.25,
)  # fmt: skip


def test_the_keys_of_a_line_and_their_order_are_those_of_version_1(tmp_path: Path) -> None:
    """They are read by other programs, and by every later release."""
    clients = {
        "ann": replace(OK, skipped_steps=2),
        "bob": ClientRecord("failed", "no memory", examples=10),
        "cyd": ClientRecord("ok", norm=None),
    }
    full = record(
        0,
        clients=clients,
        unsolicited=(UnsolicitedRecord("dan", "late", 7, "late"),),
        modules={"x": ModuleRecord(2, 5.0, (4.0, 3.0), 0.9), "y": ModuleRecord(1, 1.0, (1.0,))},
        deployed={"loss": 1.0},
    )
    append_round(tmp_path, full)
    line = json.loads((tmp_path / "rounds.jsonl").read_text())
    assert list(line) == [
        "version", "round", "state_digest", "seconds", "cohort", "loss_before", "loss_after", "test", "held_out",
        "clients", "aside", "bytes_down", "bytes_up", "modules", "figures", "clock_s", "deployed",
    ]  # fmt: skip
    asked = ["status", "reason", "rank", "steps", "examples", "bytes_down", "bytes_up"]
    measured = ["loss_before", "loss_after", "seconds", "peak_bytes", "tokens", "norm"]
    device = ["compute_s", "transfer_s", "overhead_s"]
    assert list(line["clients"]["ann"]) == [
        *asked,
        "ratio",
        "deadline_s",
        "why",
        *device,
        *measured,
        "importance",
        "skipped_steps",
    ]
    assert list(line["clients"]["bob"]) == asked
    assert list(line["clients"]["cyd"]) == [*asked, *measured]
    assert line["aside"] == [{"client": "dan", "reason": "late", "num_bytes": 7, "kind": "late"}]
    assert list(line["modules"]["x"]) == ["rank", "norm", "singular_values", "energy_kept"]
    assert list(line["modules"]["y"]) == ["rank", "norm", "singular_values"]
    assert read_rounds(tmp_path) == (full,)


def test_what_was_planned_for_a_client_is_read_back_and_left_out_where_it_is_as_usual(tmp_path: Path) -> None:
    arms: dict[str, Any] = {
        "top": 0.6,
        "share": 0.5,
        "back": 0.25,
        "down_rank": 4,
        "base_dtype": "nf4",
        "view": "deployed",
    }
    losses: dict[str, Any] = {"whole_loss_before": 3.0, "whole_loss_after": 2.5}
    full = record(0, clients={"ann": replace(OK, **arms, **losses), "bob": replace(OK, ranks=(0, 2)), "cyd": OK})
    append_round(tmp_path, full)
    line = json.loads((tmp_path / "rounds.jsonl").read_text())["clients"]
    assert {key: line["ann"][key] for key in arms | losses} == arms | losses
    assert line["ann"].keys() - line["cyd"].keys() == arms.keys() | losses.keys()
    assert line["bob"].keys() - line["cyd"].keys() == {"ranks"}
    assert read_rounds(tmp_path) == (full,)
    seen = {one.client: one for one in observations(full)}
    assert (seen["ann"].top, seen["ann"].share, seen["ann"].back, seen["ann"].down_rank) == (0.6, 0.5, 0.25, 4)
    assert (seen["ann"].base_dtype, seen["ann"].view, seen["ann"].whole_loss_after) == ("nf4", "deployed", 2.5)
    assert (seen["bob"].ranks, seen["bob"].steps, seen["bob"].peak_bytes) == ((0, 2), 3, 10)


def test_joules_are_read_back_and_left_out_where_they_are_not_known(tmp_path: Path) -> None:
    append_round(tmp_path, record(0, clients={"ann": replace(OK, joules=12.5), "bob": OK}))
    (read,) = read_rounds(tmp_path)
    assert {name: client.joules for name, client in read.clients.items()} == {"ann": 12.5, "bob": None}
    assert "joules" not in json.loads((tmp_path / "rounds.jsonl").read_text())["clients"]["bob"]


def test_rounds_are_read_as_they_were_appended(tmp_path: Path) -> None:
    assert read_rounds(tmp_path) == ()
    test = {"loss": math.nan, "examples": 3}
    records = [record(number, cohort=("ann",), test=test, figures={"left": 4}) for number in range(3)]
    for each in records:
        append_round(tmp_path, each)
    (_, second, _) = read_rounds(tmp_path)
    assert second == record(1, cohort=("ann",), test={"loss": None, "examples": 3}, figures={"left": 4})
    assert second.test is not None
    assert type(second.test["examples"]) is int


def test_a_line_torn_at_any_byte_is_left_out_and_cut_by_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    append_round(tmp_path, record(0))
    append_round(tmp_path, record(1))
    whole, records = path.read_bytes(), read_rounds(tmp_path)
    append_round(tmp_path, record(2, state_digest="ü"))
    data = path.read_bytes()
    torn = [data[:length] for length in range(len(whole), len(data))]
    torn += [data[:length] + bytes(len(data) - length) for length in range(len(whole), len(data))]
    torn += [whole + bytes(20) + b"\n"]
    for content in torn:
        path.write_bytes(content)
        assert read_rounds(tmp_path) == records
        assert scan(path).torn_bytes == len(content) - len(whole)
        assert path.read_bytes() == content
        mend_rounds(tmp_path)
        assert path.read_bytes() == whole
    append_round(tmp_path, record(2))
    assert [each.round for each in read_rounds(tmp_path)] == [0, 1, 2]


def test_lines_that_are_whole_are_synced_before_a_run_goes_on_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mend_rounds(tmp_path)
    append_round(tmp_path, record(0))
    steps = list[str]()
    for step in ("sync", "sync_folder"):
        monkeypatch.setattr(files, step, lambda _, step=step: steps.append(step))
    mend_rounds(tmp_path)
    assert steps == ["sync", "sync_folder"]


def line(number: int, version: int = 1) -> str:
    return json.dumps({"version": version, "round": number, "seconds": 1})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line(0), "{torn", line(2)], r"line 2: expected one JSON object; got Expecting"),
        ([line(0), "", line(1)], r"line 2: expected one JSON object; got Expecting"),
        (["[]", line(1)], r"line 1: expected an object \(RoundRecord\); got \[\]"),
        (["{}", line(1)], r"line 1: expected version 1; got None"),
        ([line(0), line(1), line(3)], r"line 3: expected round 2: every round from 0 on has one line.*; got round 3;"),
        ([line(0), line(0)], r"line 2: expected round 1: .*; got round 0; put back a copy"),
        ([line(1), line(2)], r"line 1: expected round 0: .*; got round 1; put back a copy"),
        ([line(0, version=9)], r"line 1: expected version 1; got 9; read it with the fedtune that wrote it"),
        ([line(0), '{"version": 1, "round": 1}'], r"line 2: expected the key 'seconds'; got none"),
    ],
)
def test_lines_that_cannot_be_trusted_are_named(tmp_path: Path, lines: list[str], message: str) -> None:
    data = "\n".join([*lines, ""])
    (tmp_path / "rounds.jsonl").write_text(data)
    for use in (read_rounds, mend_rounds):
        with pytest.raises(StoreError, match=rf"rounds\.jsonl, {message}"):
            use(tmp_path)
    assert (tmp_path / "rounds.jsonl").read_text() == data


@pytest.mark.parametrize("block", [1, 7, 64 * 1024])
def test_the_digest_of_the_last_line_is_read_from_the_end(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_records, "BLOCK_BYTES", block)
    assert round_records.last_line_digest(tmp_path) == ""
    for text, last in ((b"", None), (b"torn", None), (b"a\n", b"a"), (b"a\nbcd\n", b"bcd"), (b"a\nbcd\nto", b"bcd")):
        (tmp_path / "rounds.jsonl").write_bytes(text)
        expected = sha256(last).hexdigest() if last is not None else ""
        assert round_records.last_line_digest(tmp_path) == expected
        assert list(round_records.line_digests(tmp_path))[-1:] == ([expected] if expected else [])
