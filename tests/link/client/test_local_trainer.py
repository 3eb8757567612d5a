from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedtune.client import site_process
from fedtune.errors import ClientError, ConfigError, Fault
from fedtune.link.client.local_trainer import LocalTrainer
from fedtune.messages import Assignment, ClientUpdate, LoraResult
from fedtune.probing.steps import OnStep
from fedtune.wire.codec import decode_update, encode_assignment
from tests.link.client.test_training_server import assignment, site

__all__ = ["site"]
# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@dataclass
class ThreeSteps:
    """A site whose work takes three steps, in the second of which the server withdraws it."""

    on_step: OnStep
    withdraw: Callable[[], None]
    client: str = "client-0"
    scores: str = "send"
    steps: list[int] = field(default_factory=list)

    def in_run(self, folder: Path) -> ThreeSteps:
        return self

    def perform(self, order: Assignment) -> ClientUpdate:
        for step in (1, 2, 3):
            if step == 2:
                self.withdraw()
            self.on_step(step, 3)
            self.steps.append(step)
        return ClientUpdate(self.client, order.round, 1, LoraResult({}))


@contextmanager
def asked(trainer: LocalTrainer, ask: Callable[[], None]) -> Iterator[list[BaseException]]:
    """Ask in a thread of its own, as the link does, while the test's own thread works until that is done."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            ask()
        except (ClientError, ConfigError) as error:
            errors.append(error)
        finally:
            trainer.close()

    thread = threading.Thread(target=run)
    thread.start()
    yield errors
    thread.join()


def task(folder: Path) -> list[str]:
    """Write an assignment as the link does, and return the names of its bodies."""
    encoded = encode_assignment(assignment())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "front").write_bytes(encoded.header)
    for name, body in encoded.blobs.items():
        (folder / name).write_bytes(body)
    return list(encoded.blobs)


def test_work_is_done_in_the_thread_that_works_and_the_update_is_in_its_file(site: Path, tmp_path: Path) -> None:
    threads: list[int] = []

    def load(on_step: OnStep) -> Any:
        threads.append(threading.get_ident())
        return site_process.load(str(site), on_step)

    trainer = LocalTrainer(load)
    bodies = task(tmp_path / "task")
    measured: list[Any] = []

    def ask() -> None:
        trainer.profile(tmp_path / "profile")
        measured.append(trainer.perform(tmp_path / "task", bodies, tmp_path / "update"))

    with asked(trainer, ask) as errors:
        trainer.work()
    assert not errors
    assert threads == [threading.get_ident()]
    assert (tmp_path / "profile" / "front").is_file()
    update = decode_update((tmp_path / "update").read_bytes(), client="client-0", limit_bytes=10**7)
    assert update.round == assignment().round
    assert measured[0]["seconds"] > 0
    assert trainer.progress().done == 1


def test_an_error_of_the_site_is_the_reply_and_the_next_request_is_done(tmp_path: Path) -> None:
    def load(on_step: OnStep) -> Any:
        raise ConfigError(Fault("data", "rows", "none"))

    trainer = LocalTrainer(load)
    with asked(trainer, lambda: trainer.profile(tmp_path / "profile")) as errors:
        trainer.work()
    [error] = errors
    assert "data: expected rows; got none" in str(error)


@pytest.mark.parametrize("interrupts", [True, False])
def test_withdrawn_work_ends_at_its_next_step_unless_other_processes_wait(interrupts: bool, tmp_path: Path) -> None:
    made: list[ThreeSteps] = []

    def load(on_step: OnStep) -> Any:
        made.append(ThreeSteps(on_step, lambda: trainer.kill()))
        return made[0]

    trainer = LocalTrainer(load, interrupts=interrupts)
    bodies = task(tmp_path / "task")
    with asked(trainer, lambda: trainer.perform(tmp_path / "task", bodies, tmp_path / "update")) as errors:  # type: ignore[arg-type]
        trainer.work()
    assert made[0].steps == ([1] if interrupts else [1, 2, 3])
    assert len(errors) == (1 if interrupts else 0)
    assert trainer.is_withdrawn


def test_an_interrupt_reaches_the_thread_that_works(tmp_path: Path) -> None:
    def load(on_step: OnStep) -> Any:
        raise KeyboardInterrupt

    trainer = LocalTrainer(load)
    with (
        asked(trainer, lambda: trainer.profile(tmp_path / "profile")) as errors,
        pytest.raises(KeyboardInterrupt),
    ):
        trainer.work()
    assert "this site was stopped" in str(errors[0])
