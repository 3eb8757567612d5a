from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedtune.errors import StoreError
from fedtune.link.pki import enrollment, queue_files
from fedtune.link.pki.queue_files import Answer


def request(folder: Path, name: str = "anna") -> bytes:
    return enrollment.make_request(folder / "keys" / name, name=name, org="a", role="client")


def put(queue: Path, data: bytes) -> bool:
    return queue_files.put(queue, data, enrollment.read_request(data))


def test_requests_are_listed_with_their_fingerprint_and_whether_they_are_answered(tmp_path: Path) -> None:
    queue, first = tmp_path / "queue", request(tmp_path)
    assert put(queue, first)
    assert put(queue, request(tmp_path, "bob"))
    queue_files.write_answer(queue, "anna", Answer(queue_files.digest(first), b"bundle"))
    waiting, problems = queue_files.load(queue)
    assert not problems
    assert {one.request.name: one.answered for one in waiting} == {"anna": True, "bob": False}
    assert waiting[0].fingerprint.count(" ") == 7


def test_a_later_request_of_a_name_takes_the_place_of_the_one_before_and_of_its_answer(tmp_path: Path) -> None:
    queue, first = tmp_path / "queue", request(tmp_path)
    put(queue, first)
    queue_files.write_answer(queue, "anna", Answer(queue_files.digest(first), b"bundle"))
    put(queue, request(tmp_path))
    (one,) = queue_files.load(queue)[0]
    assert not one.answered
    assert queue_files.count(queue) == 1


def test_a_full_queue_takes_no_further_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_files, "MAX_WAITING", 1)
    queue, first = tmp_path / "queue", request(tmp_path)
    assert put(queue, first)
    assert put(queue, first)
    assert put(queue, request(tmp_path))
    assert not put(queue, request(tmp_path, "bob"))
    (queue / "bob.request.json").write_bytes(request(tmp_path, "bob"))
    waiting, problems = queue_files.load(queue)
    assert [one.request.name for one in waiting] == ["anna"]
    assert "at most 1 requests; got 2" in problems[0]


def test_links_pipes_folders_and_huge_files_are_not_read(tmp_path: Path) -> None:
    queue = tmp_path / "queue"
    queue.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(request(tmp_path))
    (queue / "anna.request.json").symlink_to(secret)
    os.mkfifo(queue / "bob.request.json")
    (queue / "carl.request.json").mkdir()
    (queue / "dora.request.json").write_bytes(b"{" * (queue_files.MAX_REQUEST_BYTES + 1))
    waiting, problems = queue_files.load(queue)
    assert not waiting
    assert len(problems) == 4
    assert all("left out: expected a regular file of at most 16384 bytes" in text for text in problems)


def test_a_request_under_another_name_or_changed_is_left_out_and_the_others_stay(tmp_path: Path) -> None:
    queue = tmp_path / "queue"
    put(queue, request(tmp_path))
    (queue / "bob.request.json").write_bytes(request(tmp_path, "carl"))
    (queue / "dora.request.json").write_bytes(request(tmp_path, "dora").replace(b"payload", b"paylaod"))
    waiting, problems = queue_files.load(queue)
    assert [one.request.name for one in waiting] == ["anna"]
    assert "expected the request of 'bob'; got that of 'carl'" in problems[0]
    assert problems[1].startswith("dora.request.json: left out: ")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"bundle":1,"reason":"","request":""}'])
def test_an_answer_that_is_damaged_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "anna.answer.json").write_text(text)
    assert queue_files.read_answer(tmp_path, "anna") is None
    assert queue_files.read_answer(tmp_path, "bob") is None


def test_an_answer_replaces_a_link_and_does_not_follow_it(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "anna.answer.json").symlink_to(target)
    queue_files.write_answer(tmp_path, "anna", Answer("ab", b"", "no"))
    assert target.read_text() == "mine"
    assert queue_files.read_answer(tmp_path, "anna") == Answer("ab", b"", "no")


def test_a_folder_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="none"):
        queue_files.load(tmp_path / "none")
    assert queue_files.count(tmp_path / "none") == 0
