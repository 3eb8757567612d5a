from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from fedtune.errors import StoreError
from fedtune.store.files import append_line, new_folder, write_text


def test_a_text_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "old")
    write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.json", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"a\.json: .*No space left on device; free some space"):
        write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_line(tmp_path / "rounds.jsonl", "one")
    sync = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        append_line(tmp_path / "rounds.jsonl", "two")
    monkeypatch.setattr(os, "fsync", sync)
    append_line(tmp_path / "rounds.jsonl", "three")
    assert (tmp_path / "rounds.jsonl").read_text() == "one\nthree\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_error() -> None:
    with pytest.raises(StoreError, match=r"/dev/full: .*No space left on device; free some space"):
        append_line(Path("/dev/full"), "x")


def spoil(folder: Path) -> None:
    (folder / "a").write_text("2")
    raise KeyError


def test_a_folder_appears_only_when_it_is_filled(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with new_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with pytest.raises(KeyError), new_folder(target) as folder:
        spoil(folder)
    assert (target / "a").read_text() == "1"
    with new_folder(target) as folder:
        (folder / "b").write_text("3")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_safetensors_says_of_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(StoreError, match=r"adapter: .*No space left on device"), new_folder(tmp_path / "adapter"):
        raise error
    assert not list(tmp_path.iterdir())


def test_everyone_may_read_what_is_in_a_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "adapter") as folder:
        (folder / "deeper").mkdir()
        for path in (folder / "a", folder / "deeper" / "b"):
            path.touch(mode=0o600)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").rglob("[ab]")} == {0o644}


def test_a_path_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="expected to read or write it"):
        write_text(tmp_path / "file" / "a.json", "x")
