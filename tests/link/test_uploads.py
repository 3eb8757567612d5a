from __future__ import annotations

import itertools
import os
from hashlib import sha256
from pathlib import Path

import pytest

from fedtune.errors import StoreError
from fedtune.link import uploads
from fedtune.link.rejections import RejectionError
from fedtune.wire.v1 import link_pb2 as pb

DATA = bytes(range(256)) * 40
PART = pb.Part(key="update", digest=sha256(DATA).digest(), num_bytes=len(DATA))


def reason(error: pytest.ExceptionInfo[RejectionError]) -> str:
    return pb.Reason.Name(error.value.refusal.reason)


def test_a_part_that_was_cut_goes_on_where_its_file_ends(tmp_path: Path) -> None:
    path = uploads.part_path(tmp_path, "anna", PART.digest)
    assert uploads.stored_bytes(path) == 0
    first = uploads.IncomingUpload(path, PART, 0)
    first.append(DATA[:1000])
    assert not first.finish()
    first.close()
    assert uploads.stored_bytes(path) == 1000
    second = uploads.IncomingUpload(path, PART, 1000)
    second.append(DATA[1000:])
    assert second.finish()
    second.close()
    assert bytes(uploads.map_file(path)) == DATA


@pytest.mark.parametrize("offset", [0, 999, 1001])
def test_a_sender_that_starts_elsewhere_learns_where(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "part"
    path.write_bytes(DATA[:1000])
    with pytest.raises(RejectionError) as caught:
        uploads.IncomingUpload(path, PART, offset)
    assert reason(caught) == "OFFSET"
    assert caught.value.refusal.expected == "1000"


def test_no_byte_beyond_the_part_is_written(tmp_path: Path) -> None:
    incoming = uploads.IncomingUpload(tmp_path / "part", PART, 0)
    incoming.append(DATA)
    with pytest.raises(RejectionError) as caught:
        incoming.append(b"x")
    assert reason(caught) == "LENGTH"
    incoming.close()
    assert uploads.stored_bytes(tmp_path / "part") == len(DATA)


def test_wrong_bytes_are_removed_and_may_come_anew(tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(b"\0" * 10)  # as a power cut may leave it
    incoming = uploads.IncomingUpload(path, PART, 10)
    incoming.append(DATA[10:])
    with pytest.raises(RejectionError) as caught:
        incoming.finish()
    assert reason(caught) == "DIGEST"
    incoming.close()
    assert not path.exists()


def test_a_view_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(DATA)
    view = uploads.map_file(path)
    path.unlink()
    assert bytes(view) == DATA
    path.write_bytes(b"")
    assert bytes(uploads.map_file(path)) == b""


def test_parts_without_new_bytes_are_removed(tmp_path: Path) -> None:
    for name, age_s in (("old", 100.0), ("new", 0.0)):
        (tmp_path / name).write_bytes(b"x")
        at = (tmp_path / name).stat().st_mtime - age_s
        os.utime(tmp_path / name, (at, at))
    uploads.remove_stale_parts(tmp_path, older_s=50.0)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert uploads.free_bytes(tmp_path) > 0


def test_what_lay_there_counts_towards_the_digest_however_long_it_is(tmp_path: Path) -> None:
    data = bytes(range(251)) * 13_000  # three blocks and a bit
    part = pb.Part(key="update", digest=sha256(data).digest(), num_bytes=len(data))
    path = uploads.part_path(tmp_path, "anna", part.digest)
    cuts = [0, 1, 2**20, 2**20 + 1, 3 * 2**20, len(data)]
    for start, end in itertools.pairwise(cuts):
        incoming = uploads.IncomingUpload(path, part, start)
        incoming.append(data[start:end])
        assert incoming.received_bytes == uploads.stored_bytes(path) == end
        assert incoming.finish() == (end == len(data))
        incoming.close()
    again = uploads.IncomingUpload(path, part, len(data))  # whole, but not announced as whole yet
    assert again.finish()
    again.close()


def test_an_empty_part_is_whole_at_once(tmp_path: Path) -> None:
    incoming = uploads.IncomingUpload(tmp_path / "part", pb.Part(key="", digest=sha256(b"").digest()), 0)
    assert incoming.finish()
    incoming.close()
    assert bytes(uploads.map_file(tmp_path / "part")) == b""


def test_a_view_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(DATA)
    assert uploads.map_file(tmp_path / "part").readonly


def test_a_part_that_cannot_be_opened_is_a_fault_of_the_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        uploads.map_file(tmp_path / "none")
    with pytest.raises(StoreError):
        uploads.IncomingUpload(tmp_path / "no folder" / "part", PART, 0)


def test_two_clients_parts_of_the_same_bytes_lie_apart(tmp_path: Path) -> None:
    assert uploads.part_path(tmp_path, "anna", PART.digest) != uploads.part_path(tmp_path, "bob", PART.digest)
