from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from fedtune.errors import StoreError
from fedtune.store import files, journal
from fedtune.store.journal import FRONT, MAX_RECORD_BYTES, End, Journal, Record, read


def records(path: Path) -> tuple[list[Record], End]:
    found: list[Record] = []
    end = read(path, found.append)
    return found, end


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of four records of one process and one of the next."""
    path = tmp_path / "journal"
    first = Journal(path, End())
    for number in range(4):
        first.append("step", {"number": number, "text": "ü\n" * number, "parts": [1, {"a": "b"}]})
    first.close()
    second = Journal(path, records(path)[1])
    second.append("last", {"names": ["ann", "bob"]})
    second.close()
    return path


def starts(path: Path) -> list[int]:
    """Offsets of the records."""
    data, offsets = path.read_bytes(), [0]
    while offsets[-1] < len(data):
        offsets.append(offsets[-1] + FRONT.size + FRONT.unpack_from(data, offsets[-1])[0])
    return offsets[:-1]


def test_what_is_appended_is_read_back_in_order(path: Path) -> None:
    found, end = records(path)
    assert [record.n for record in found] == [0, 1, 2, 3, 4]
    assert [record.epoch for record in found] == [1, 1, 1, 1, 2]
    assert found[3] == Record(3, 1, "step", {"number": 3, "text": "ü\nü\nü\n", "parts": [1, {"a": "b"}]})
    assert (end.count, end.epoch, end.num_bytes, end.torn_bytes) == (5, 2, path.stat().st_size, 0)


def test_a_record_is_canonical_json_behind_its_length_and_checksum(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", End())
    journal.append("start", {"z": 1, "a": "é"})
    journal.close()
    data = (tmp_path / "journal").read_bytes()
    length, checksum = FRONT.unpack_from(data)
    text = data[FRONT.size :]
    assert (length, checksum) == (len(text), crc32(text))
    assert text == json.dumps(json.loads(text), sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()
    assert json.loads(text).keys() == {"a", "z", "n", "prev", "epoch", "unix_ms", "kind"}
    assert json.loads(text)["prev"] == "0" * 64


def test_a_record_is_synced_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, steps = Journal(tmp_path / "journal", End()), list[str]()

    def write(descriptor: int, data: bytes) -> None:
        steps.append("write")
        os.write(descriptor, data)

    monkeypatch.setattr(files, "write", write)
    monkeypatch.setattr(files, "sync", lambda descriptor: steps.append("sync"))
    journal.append("start", {})
    assert steps == ["write", "sync"]
    journal.close()


def test_a_writer_makes_last_what_it_finds_and_the_files_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = list[str]()
    monkeypatch.setattr(files, "sync", lambda descriptor: steps.append("sync"))
    monkeypatch.setattr(files, "sync_folder", lambda folder: steps.append(folder.name))
    journal = Journal(tmp_path / "journal", End())
    assert steps == [tmp_path.name, "sync"]
    journal.append("start", {})
    journal.close()
    steps.clear()
    # Whoever wrote the record may have been killed before it was synced, and the run goes on from it now.
    Journal(tmp_path / "journal", records(tmp_path / "journal")[1]).close()
    assert steps == ["sync"]


def test_a_tail_torn_at_any_byte_is_left_out_and_cut_by_the_next_writer(path: Path) -> None:
    data, last = path.read_bytes(), starts(path)[-1]
    for length in range(last, len(data)):
        path.write_bytes(data[:length])
        found, end = records(path)
        assert (len(found), end.num_bytes, end.torn_bytes) == (4, last, length - last)
        writer = Journal(path, end)
        assert path.stat().st_size == last
        writer.append("next", {})
        writer.close()
        assert [record.kind for record in records(path)[0]] == ["step"] * 4 + ["next"]


def test_a_tail_whose_bytes_never_reached_the_disk_is_torn(path: Path) -> None:
    data, last = path.read_bytes(), starts(path)[-1]
    for kept in range(last, len(data)):
        path.write_bytes(data[:kept] + bytes(len(data) - kept))
        assert records(path)[1].torn_bytes == len(data) - last


def test_a_reader_leaves_a_torn_tail_alone(path: Path) -> None:
    data = path.read_bytes()[:-3]
    path.write_bytes(data)
    records(path)
    assert path.read_bytes() == data


@pytest.mark.guarantee("G18")
def test_no_flipped_bit_is_ever_read_as_a_record(path: Path, cases: Callable[[int], None]) -> None:
    data, offsets = path.read_bytes(), starts(path)
    whole, _ = records(path)
    for position in range(len(data)):
        number = sum(start <= position for start in offsets) - 1
        # Every bit of lengths and checksums; of the JSON, in which all bits are alike, one of each byte.
        for bit in range(8) if position - offsets[number] < FRONT.size else [position % 8]:
            path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            cases(1)
            if number < 4:
                with pytest.raises(StoreError, match=rf"journal, record {number}: expected .*; the journal is damaged"):
                    records(path)
                continue
            found = list[Record]()
            with suppress(StoreError):  # either is right: to refuse the record, or to take it for a torn one
                read(path, found.append)
            assert found == whole[:4]


def test_a_damaged_length_does_not_cut_the_records_behind_it(path: Path) -> None:
    data, second = bytearray(path.read_bytes()), starts(path)[1]
    length, checksum = FRONT.unpack_from(data, second)
    FRONT.pack_into(data, second, length + 4096, checksum)  # reaches beyond the end, as a torn record's does
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"record 1: expected \d+ bytes; got a record that ends earlier"):
        records(path)


def rewritten(data: bytes, offset: int, changes: dict[str, Any]) -> bytes:
    """Return the journal with one record changed by somebody who knows how to make a checksum."""
    length, _ = FRONT.unpack_from(data, offset)
    front, rest = data[:offset], data[offset + FRONT.size + length :]
    fields = json.loads(data[offset + FRONT.size : offset + FRONT.size + length]) | changes
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    return front + FRONT.pack(len(text), crc32(text)) + text + rest


@pytest.mark.guarantee("G18")
@pytest.mark.parametrize("number", range(4))
def test_an_edited_record_breaks_the_chain(path: Path, number: int) -> None:
    path.write_bytes(rewritten(path.read_bytes(), starts(path)[number], {"number": 9}))
    with pytest.raises(StoreError, match=rf"record {number + 1}: expected number {number + 1} after the record"):
        records(path)


@pytest.mark.guarantee("G18")
def test_a_record_left_out_or_put_in_breaks_the_chain(path: Path, cases: Callable[[int], None]) -> None:
    data, offsets = path.read_bytes(), starts(path)
    for changed in (
        data[: offsets[1]] + data[offsets[2] :],
        data[: offsets[2]] + data[offsets[1] :],
        data[offsets[1] :],
    ):
        path.write_bytes(changed)
        with pytest.raises(StoreError, match=r"record \d: expected number \d after the record"):
            records(path)
        cases(1)


def test_an_epoch_never_falls(path: Path) -> None:
    path.write_bytes(rewritten(path.read_bytes(), starts(path)[4], {"epoch": 0}))
    with pytest.raises(StoreError, match="record 4: expected a kind, and an epoch from 1; got 'last', 0"):
        records(path)


def test_random_bytes_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    rng = random.Random(0)
    for length in range(1, 200):
        (tmp_path / "journal").write_bytes(data := rng.randbytes(length))
        if length >= FRONT.size and FRONT.unpack_from(data)[0] > MAX_RECORD_BYTES:
            with pytest.raises(StoreError, match=f"expected a record of 1 to {MAX_RECORD_BYTES} bytes"):
                records(tmp_path / "journal")
        else:
            assert records(tmp_path / "journal")[1].torn_bytes == length


@pytest.mark.parametrize("text", [b"[]", b"{}", b'{"n":0}', b"no", b"\xff\xff"])
def test_a_whole_record_of_another_making_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "journal").write_bytes(FRONT.pack(len(text), crc32(text)) + text)
    with pytest.raises(StoreError, match="record 0: expected an object with epoch, kind, n, prev, unix_ms"):
        records(tmp_path / "journal")


@pytest.mark.parametrize("value", [0.5, True, None, {1: "a"}, [b"x"]])
def test_only_integers_and_strings_are_written(path: Path, value: object) -> None:
    writer = Journal(path, records(path)[1])
    with pytest.raises(StoreError, match=r"record\.a: expected integers, strings"):
        writer.append("step", {"a": value})
    writer.append("step", {"a": [{"b": ["c", 1]}]})
    writer.close()
    assert records(path)[1].count == 6


def test_a_record_that_is_too_large_is_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_RECORD_BYTES", 400)
    writer, size = Journal(path, records(path)[1]), path.stat().st_size
    with pytest.raises(StoreError, match=r"expected a record of at most 400 bytes; got \d+ \(open\)"):
        writer.append("open", {"cohort": "x" * 400})
    writer.close()
    assert path.stat().st_size == size


def test_a_record_that_does_not_fit_is_taken_back_and_nothing_is_written_after_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, before = Journal(path, records(path)[1]), path.read_bytes()

    def full(descriptor: int, data: bytes) -> None:
        os.write(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        with pytest.raises(StoreError, match=r"No space left on device; free some space .*--resume"):
            writer.append("step", {})
    assert path.read_bytes() == before
    with pytest.raises(StoreError, match="an earlier write failed"):
        writer.append("step", {})
    writer.close()
    assert path.read_bytes() == before


def test_a_failed_sync_is_not_tried_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, tries = Journal(path, records(path)[1]), list[int]()

    def failed(descriptor: int) -> None:
        tries.append(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "sync", failed)
    for message in ("Input/output error", "an earlier write failed", "an earlier write failed"):
        assert writer.usable == (message == "Input/output error")
        with pytest.raises(StoreError, match=message):
            writer.append("step", {})
    writer.close()
    assert len(tries) == 1


def test_an_interrupted_write_leaves_no_half_record_in_front_of_another(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Journal(path, records(path)[1])

    def interrupted(descriptor: int, data: bytes) -> None:
        os.write(descriptor, data[:5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.append("step", {})
    assert not writer.usable
    with pytest.raises(StoreError, match="an earlier write failed"):
        writer.append("step", {})
    writer.close()
    assert records(path)[1].torn_bytes == 5


@pytest.mark.guarantee("G20")
def test_a_writer_stops_when_another_one_has_written(path: Path) -> None:
    end = records(path)[1]
    old, new = Journal(path, end), Journal(path, end)
    new.append("step", {})
    with pytest.raises(StoreError, match="another one has written"):
        old.append("step", {})
    new.append("step", {})
    old.close()
    new.close()
    assert records(path)[1].count == 7


def test_what_each_record_is_handed_to_may_refuse_it(path: Path) -> None:
    def refuse(record: Record) -> None:
        raise StoreError("no")

    with pytest.raises(StoreError, match="no"):
        read(path, refuse)


def test_several_records_are_synced_once_and_are_all_there_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    sync = files.sync

    def counted(descriptor: int) -> None:
        synced.append(descriptor)
        sync(descriptor)

    one = Journal(tmp_path / "journal", End())
    monkeypatch.setattr(files, "sync", counted)
    one.extend([("step", {"number": number}) for number in range(5)])
    assert len(synced) == 1
    with pytest.raises(StoreError):
        one.extend([("step", {"number": 5}), ("step", {"number": 0.5})])
    one.append("step", {"number": 5})
    one.close()
    found, end = records(tmp_path / "journal")
    assert [record.fields["number"] for record in found] == [0, 1, 2, 3, 4, 5]
    assert end.count == 6
