from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedtune.errors import StoreError
from fedtune.store import files
from fedtune.store.blobs import Blobs


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


def everything(blobs: Blobs) -> list[str]:
    return sorted(path.relative_to(blobs.folder).as_posix() for path in blobs.folder.rglob("*") if path.is_file())


def test_parts_are_kept_as_one_file_named_by_its_digest(blobs: Blobs) -> None:
    array = np.arange(5, dtype=np.float32)
    name = blobs.put([b"head", array.data, b""])
    whole = b"head" + array.tobytes()
    assert name == hashlib.sha256(whole).hexdigest()
    assert everything(blobs) == [f"{name[:2]}/{name}"]
    assert blobs.get(name, "the state of round 1") == whole
    assert list(blobs.present()) == [name]


def test_only_the_owner_can_read_an_update(blobs: Blobs) -> None:
    assert blobs.path(blobs.put([b"secret"])).stat().st_mode & 0o777 == 0o600


def noted(step: str, real: Callable[..., None], steps: list[str]) -> Callable[..., None]:
    def call(*args: object) -> None:
        steps.append(step)
        real(*args)

    return call


def test_bytes_last_before_their_name_and_the_name_before_put_returns(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = list[str]()
    for step in ("write", "sync", "rename", "sync_folder", "make_folder"):
        monkeypatch.setattr(files, step, noted(step, getattr(files, step), steps))
    blobs.put([b"a", b"b"])
    folders = ["make_folder", "sync_folder"]
    assert steps == [*folders, "write", "write", "sync", *folders, "rename", "sync_folder"]
    steps.clear()
    blobs.put([b"a", b"b"])
    assert steps == ["write", "write", "sync", "rename", "sync_folder"]


def test_every_flipped_bit_is_found(blobs: Blobs) -> None:
    name = blobs.put([b"state"])
    for bit in range(8 * 5):
        data = bytearray(b"state")
        data[bit // 8] ^= 1 << bit % 8
        blobs.path(name).write_bytes(data)
        with pytest.raises(StoreError, match=rf"{name}: expected the state of round 3, of digest {name[:12]}; got"):
            blobs.get(name, "the state of round 3")


def test_a_missing_or_a_shortened_blob_is_named_by_what_it_is(blobs: Blobs) -> None:
    name = blobs.put([b"update"])
    blobs.path(name).write_bytes(b"updat")
    with pytest.raises(StoreError, match="expected the update of client-2 in round 4, of digest"):
        blobs.get(name, "the update of client-2 in round 4")
    blobs.path(name).unlink()
    with pytest.raises(StoreError, match=r"expected the update of client-2 in round 4; it is missing; put back a copy"):
        blobs.get(name, "the update of client-2 in round 4")


def test_a_damaged_blob_is_replaced_when_it_is_put_again(blobs: Blobs) -> None:
    name = blobs.put([b"state"])
    blobs.path(name).write_bytes(b"stale")
    assert blobs.put([b"state"]) == name
    assert blobs.get(name, "") == b"state"


def test_released_blobs_are_gone_and_may_be_gone_already(blobs: Blobs) -> None:
    one, two = blobs.put([b"1"]), blobs.put([b"2"])
    blobs.release([one])
    blobs.release([one])
    assert list(blobs.present()) == [two]


def test_a_sweep_leaves_what_is_needed_and_nothing_that_was_half_written(blobs: Blobs) -> None:
    kept, _ = blobs.put([b"kept"]), blobs.put([b"stray"])
    descriptor, _ = files.create_beside(blobs.folder / "blob")
    os.write(descriptor, b"half")
    os.close(descriptor)
    (blobs.folder / "notes.txt").write_text("mine")
    blobs.sweep([kept, "0" * 64])
    assert everything(blobs) == sorted([f"{kept[:2]}/{kept}", "notes.txt"])


def test_a_sweep_of_nothing_is_no_error(blobs: Blobs) -> None:
    blobs.sweep([])
    assert list(blobs.present()) == []


@pytest.mark.parametrize("step", ["write", "sync", "rename", "sync_folder"])
def test_a_full_disk_leaves_nothing_behind(blobs: Blobs, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    kept = blobs.put([b"kept"])

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, step, full)
        with pytest.raises(StoreError, match=r"blobs: .*No space left on device; free some space"):
            blobs.put([b"new"])
    blobs.sweep([kept])
    assert everything(blobs) == [f"{kept[:2]}/{kept}"]
    blobs.put([b"new"])
