from __future__ import annotations

import ast
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from fedtune.errors import StoreError
from fedtune.store import files
from fedtune.store.files import append_line, create_beside, new_folder, sweep, write_text


def full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_text_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "old")
    write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.json", "old")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(StoreError, match=r"a\.json: .*No space left on device; free some space"):
        write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_line(tmp_path / "rounds.jsonl", "one")
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", full)
        with pytest.raises(StoreError, match="No space left"):
            append_line(tmp_path / "rounds.jsonl", "two")
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


def noted(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """Carry out these steps as ever, and return the list of those that were taken."""
    taken = list[str]()

    def standing_in(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: object) -> Any:
            taken.append(name)
            return real(*args)

        return step

    for name in names:
        monkeypatch.setattr(files, name, standing_in(name, getattr(files, name)))
    return taken


def test_bytes_last_before_their_name_and_the_name_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = noted(monkeypatch, "write", "sync", "rename", "sync_folder")
    write_text(tmp_path / "a.json", "x")
    assert taken == ["write", "sync", "rename", "sync_folder"]
    taken.clear()
    append_line(tmp_path / "b.jsonl", "one")
    append_line(tmp_path / "b.jsonl", "two")
    assert taken == ["sync_folder", "write", "sync", "write", "sync"]
    taken.clear()
    with new_folder(tmp_path / "adapter") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("1")
    assert taken == ["sync_folder", "sync", "sync_folder", "rename", "sync_folder"]


def test_the_disk_is_asked_to_keep_a_file_before_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = list[str](), os.fsync

    def note(descriptor: int) -> None:
        synced.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_text(tmp_path / "a.json", "new")
    assert synced == ["file", "folder"]


def test_a_write_that_the_system_takes_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    write_text(tmp_path / "a.json", "0123456789")
    assert (tmp_path / "a.json").read_text() == "0123456789"


def test_a_sweep_removes_what_is_not_in_its_place_yet_and_nothing_else(tmp_path: Path) -> None:
    for name in ("summary.json", "notes.partial", ".gitignore"):
        (tmp_path / name).write_text("kept")
    os.close(create_beside(tmp_path / "summary.json")[0])
    for name in (".adapter.abc.partial", ".old.adapter.abc.partial"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "a").write_text("stale")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".gitignore", "notes.partial", "summary.json"]
    sweep(tmp_path / "missing")


def test_every_durable_write_of_a_run_is_made_of_the_steps_of_this_module() -> None:
    steps = {"fsync", "ftruncate", "truncate", "replace", "rename", "unlink", "rmdir", "mkdir", "write_bytes", "rmtree"}
    found = [
        (path.name, node.func.attr)
        for path in Path(files.__file__).parent.glob("*.py")
        if path.name != "files.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in steps
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "files")
    ]
    assert found == [("run_directory.py", "mkdir")]  # `check_vacant`, before there is a run


def test_bytes_take_the_mode_that_is_asked_for(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "key", b"secret", mode=0o600)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    files.write_bytes(tmp_path / "key", memoryview(b"public"))
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "key").read_bytes() == b"public"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
