from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest

from fedtune.errors import StoreError
from fedtune.link.client import outbox
from fedtune.link.client.outbox import Entry
from fedtune.wire.v1 import link_pb2 as pb

RUN = "0123456789abcdef"


def entry(state: Path, number: int = 1) -> Entry:
    header = pb.Header(run=RUN, round=number, to="anna")
    return outbox.open_entry(state, pb.Envelope(header=header.SerializeToString()), header)


def request(data: bytes, *, inline: bool) -> pb.SubmitRequest:
    part = pb.Part(key="update", digest=sha256(data).digest(), num_bytes=len(data))
    header = pb.Header(run=RUN, parts=[part]).SerializeToString()
    sent = [pb.Inline(digest=part.digest, data=data)] if inline else []
    return pb.SubmitRequest(envelope=pb.Envelope(header=header, signature=b"s"), inline=sent)


def test_a_task_is_found_again_with_what_came_of_it(tmp_path: Path) -> None:
    item = entry(tmp_path)
    assert item.reply() is None
    item.store_reply(request(b"small", inline=True))
    item.store_receipt(pb.Envelope(header=b"r"))
    (result,) = outbox.load_entries(tmp_path, RUN)
    assert result.digest == item.digest
    assert result.reply() == request(b"small", inline=True)
    assert result.receipt() == pb.Envelope(header=b"r")
    assert entry(tmp_path).reply() is not None


def test_a_reply_without_its_bytes_is_none_and_is_made_anew(tmp_path: Path) -> None:
    item = entry(tmp_path)
    item.update.write_bytes(b"large")
    item.store_reply(request(b"large", inline=False))
    assert item.reply() is not None
    item.update.unlink()
    assert item.reply() is None


@pytest.mark.guarantee("G13")
def test_an_update_is_durable_before_the_reply_that_promises_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    monkeypatch.setattr(outbox, "make_durable", lambda path: steps.append(path.name))
    monkeypatch.setattr(outbox, "write_bytes", lambda path, data, mode: steps.append(path.name))
    item = entry(tmp_path)
    item.store_reply_and_update(request(b"large", inline=False))
    assert steps == ["update", "answer"]


def test_bodies_go_with_the_next_round_and_what_was_signed_stays(tmp_path: Path) -> None:
    first = entry(tmp_path, 1)
    first.update.write_bytes(b"large")
    first.part(b"\1" * 32).write_bytes(b"down")
    first.store_reply(request(b"large", inline=False))
    outbox.remove_earlier_bodies(tmp_path, RUN, keep=first)
    assert first.update.exists()
    outbox.remove_earlier_bodies(tmp_path, RUN, keep=entry(tmp_path, 2))
    assert sorted(path.name for path in first.folder.iterdir()) == ["answer", "order"]


def test_rounds_and_bytes_are_counted_over_what_was_answered(tmp_path: Path) -> None:
    for number, data in ((1, b"x" * 100), (2, b"y" * 50)):
        item = entry(tmp_path, number)
        item.update.write_bytes(data)
        item.store_reply(request(data, inline=False))
    entry(tmp_path, 3)
    assert outbox.count_replies(tmp_path, RUN) == 2
    assert [outbox.count_answers(tmp_path, pb.Header(run=RUN, round=number)) for number in (1, 2, 3)] == [1, 1, 0]
    now = (tmp_path / "runs" / RUN).stat().st_mtime
    assert outbox.bytes_sent_last_day(tmp_path, now=now) == 150
    old = outbox.load_entries(tmp_path, RUN)[0].folder / "answer"
    os.utime(old, (now - 90_000, now - 90_000))
    assert outbox.bytes_sent_last_day(tmp_path, now=now) == 50


def test_a_task_that_was_not_written_whole_is_left_out(tmp_path: Path) -> None:
    item = entry(tmp_path)
    (item.folder / "order").write_bytes(b"\xff\xff\xff")
    assert outbox.load_entries(tmp_path, RUN) == []
    (item.folder / "order").unlink()
    assert outbox.load_entries(tmp_path, RUN) == []


def test_the_last_run_is_complete_until_it_goes_on_or_another_begins(tmp_path: Path) -> None:
    assert outbox.complete_run(tmp_path) == ""
    outbox.store_plan(tmp_path, "1" * 16, pb.Envelope(), b"")
    outbox.store_end(tmp_path, "1" * 16)
    assert outbox.complete_run(tmp_path) == "1" * 16
    outbox.store_plan(tmp_path, "1" * 16, pb.Envelope(), b"")
    assert outbox.complete_run(tmp_path) == ""


def test_a_damaged_reply_is_named(tmp_path: Path) -> None:
    item = entry(tmp_path)
    (item.folder / "answer").write_bytes(b"\xff\xff\xff")
    with pytest.raises(StoreError, match="move its folder away"):
        outbox.bytes_sent_last_day(tmp_path, now=item.folder.stat().st_mtime)


def test_the_plan_of_a_run_is_kept_for_people_to_read(tmp_path: Path) -> None:
    outbox.store_plan(tmp_path, RUN, pb.Envelope(header=b"p"), b'name = "x"\n')
    assert (tmp_path / "runs" / RUN / "recipe.toml").read_text() == 'name = "x"\n'
    assert outbox.load_entries(tmp_path, RUN) == []


def test_what_a_kill_leaves_half_written_goes_at_the_next_start_but_not_a_pause_that_is_being_ordered(
    tmp_path: Path,
) -> None:
    run = tmp_path / "runs" / "0123456789abcdef"
    (run / ".adapter.abc.partial").mkdir(parents=True)
    (run / ".adapter.abc.partial" / "half").write_bytes(b"x")
    stays = [tmp_path / "status.json", run / "plan", tmp_path / ".pause.abc.partial"]
    for path in (*stays, tmp_path / ".status.json.abc.partial", run / ".plan.abc.partial"):
        path.write_bytes(b"x")
    outbox.sweep(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(stays)
    outbox.sweep(tmp_path / "none")
