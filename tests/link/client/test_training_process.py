from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from fedtune.errors import ClientError, ConfigError, TemporaryError, may_pass
from fedtune.link.client.training_process import ProcessTrainer, WorkProgress

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
requests, replies, life = map(int, sys.argv[-3:])
with os.fdopen(requests) as lines, os.fdopen(replies, "w") as answers:
    for line in lines:
        request = json.loads(line)
        into = Path(request["into"])
        if into.name == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if into.name == "leave":
            sys.exit(3)
        if into.name == "hang":
            into.with_name("hanging").touch()
            signal.pause()
        if into.name == "grow":
            taken = [bytes([place + 1]) * 2**20 for place in range(200)]
            signal.pause()
        if into.name == "steps":
            for step in (1, 2):
                answers.write(json.dumps({"at": [step, 2, 1000 * step]}) + chr(10))
            answers.write(json.dumps({"at": [2, 2, 2000], "waits": "not on mains power"}) + chr(10))
        said = {"failed": "expected a base; got none"} if into.name == "fail" else {"done": True}
        if into.name == "full":
            said = {"failed": "expected space on this site's disk; got none", "passing": True}
        if "done" in said:
            into.write_text(f"{os.getpid()} {request['do']}")
        answers.write(json.dumps(said) + chr(10))
        answers.flush()
"""


@pytest.fixture
def died() -> list[str]:
    return []


@pytest.fixture
def trainer(died: list[str]) -> ProcessTrainer:
    return ProcessTrainer([sys.executable, "-c", SCRIPT], on_exit=died.append)


def test_one_process_does_everything_until_it_is_closed(
    trainer: ProcessTrainer, tmp_path: Path, died: list[str]
) -> None:
    trainer.profile(tmp_path / "a")
    trainer.perform(tmp_path, ["x"], tmp_path / "b")
    (first, _), (second, done) = ((tmp_path / name).read_text().split() for name in ("a", "b"))
    assert (first, done) == (second, "perform")
    trainer.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)
    assert not died
    trainer.close()  # again changes nothing


def test_a_process_without_work_gives_its_memory_back_and_starts_again_with_the_next(
    tmp_path: Path, died: list[str]
) -> None:
    trainer = ProcessTrainer([sys.executable, "-c", SCRIPT], on_exit=died.append, idle_s=0.01)
    trainer.perform(tmp_path, [], tmp_path / "a")
    first, timer = int((tmp_path / "a").read_text().split()[0]), trainer._idle
    assert timer is not None
    timer.join()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    trainer.perform(tmp_path, [], tmp_path / "b")
    assert int((tmp_path / "b").read_text().split()[0]) != first
    assert not died  # it is no news
    trainer.close()


def test_a_process_with_work_is_not_idle(tmp_path: Path) -> None:
    trainer = ProcessTrainer([sys.executable, "-c", SCRIPT], idle_s=1000.0)
    trainer.perform(tmp_path, [], tmp_path / "a")
    first = trainer._idle
    trainer.perform(tmp_path, [], tmp_path / "b")
    assert (tmp_path / "a").read_text().split()[0] == (tmp_path / "b").read_text().split()[0]
    assert first is not None
    assert first.finished.is_set()  # cancelled
    assert trainer._idle is not first
    with trainer._lock:  # as while a request is under way
        trainer._end_idle()
    assert trainer._process is not None
    trainer.close()
    assert trainer._process is None


def test_what_it_cannot_do_is_its_reason(trainer: ProcessTrainer, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="expected a base; got none"):
        trainer.perform(tmp_path, [], tmp_path / "fail")
    with pytest.raises(ConfigError, match="expected a base; got none") as caught:
        trainer.profile(tmp_path / "fail")
    assert not may_pass(caught.value)
    with pytest.raises(TemporaryError, match="expected space on this site's disk; got none"):
        trainer.profile(tmp_path / "full")
    trainer.close()


@pytest.mark.parametrize(("name", "how"), [("die", "killed by SIGKILL"), ("leave", "status 3")])
def test_a_process_that_ends_costs_one_task_and_is_started_anew(
    trainer: ProcessTrainer, tmp_path: Path, died: list[str], name: str, how: str
) -> None:
    with pytest.raises(ClientError, match=how):
        trainer.perform(tmp_path, [], tmp_path / name)
    assert died == [f"the training process ended ({how})"]
    trainer.perform(tmp_path, [], tmp_path / "b")
    assert (tmp_path / "b").exists()
    with pytest.raises(ConfigError, match=how):
        trainer.profile(tmp_path / name)
    trainer.close()


def test_what_is_being_done_can_be_ended_at_once(trainer: ProcessTrainer, tmp_path: Path, died: list[str]) -> None:
    failures: list[str] = []

    def perform() -> None:
        try:
            trainer.perform(tmp_path, [], tmp_path / "hang")
        except ClientError as error:
            failures.append(str(error))

    thread = threading.Thread(target=perform)
    thread.start()
    while not (tmp_path / "hanging").exists():
        thread.join(0.01)
    trainer.kill()
    thread.join()
    assert signal.SIGKILL.name in failures[0]
    assert not died
    trainer.kill()  # nothing is there to kill
    trainer.close()


def test_its_lines_say_how_far_it_is(trainer: ProcessTrainer, tmp_path: Path) -> None:
    assert trainer.progress() == WorkProgress()
    trainer.perform(tmp_path, [], tmp_path / "steps")
    assert trainer.progress() == WorkProgress(done=2, total=2, cpu_ms=2000, obstacle="not on mains power")
    trainer.perform(tmp_path, [], tmp_path / "b")
    trainer.close()


def test_a_process_that_takes_more_memory_than_it_may_is_ended(tmp_path: Path, died: list[str]) -> None:
    trainer = ProcessTrainer([sys.executable, "-c", SCRIPT], max_bytes=128 * 2**20, on_exit=died.append)
    trainer.perform(tmp_path, [], tmp_path / "small")
    with pytest.raises(ClientError, match=r"memory ran out: .* took more than policy.max_memory_gib = 0.125"):
        trainer.perform(tmp_path, [], tmp_path / "grow")
    assert died == ["memory ran out: the training process took more than policy.max_memory_gib = 0.125"]
    trainer.perform(tmp_path, [], tmp_path / "again")
    trainer.close()
