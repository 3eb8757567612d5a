from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.client.perform import perform
from fedtune.client.share_process import result_digest
from fedtune.client.shared_work import SharedWork, start
from fedtune.client.worker_process import payload
from fedtune.data.encode import Example
from fedtune.errors import ClientError
from fedtune.messages import Assignment, ClientUpdate, LoraResult, Plan, Training, TrainLora
from fedtune.model.base import Base, digest
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.model.shares import ALONE, Shares
from fedtune.tensors import Tensors

TRAINING = Training(batch=3, learning_rate=0.01, steps=3, accumulation=2, clip_norm=0.05)
ADAPTER = AdapterSettings(rank=4, targets=("q_proj", "v_proj"))

COMPANION = """
import json, os, sys, threading
from multiprocessing.connection import Connection
place, size, device, store, payload, messages, life = sys.argv[-7:]
threading.Thread(target=lambda: (os.read(int(life), 1), os._exit(0)), daemon=True).start()
connection = Connection(int(messages))
connection.send_bytes(b"{}")
connection.send_bytes(json.dumps({"base": BASE}).encode())
while True:
    head = json.loads(connection.recv_bytes())
    connection.recv_bytes()
    bodies = [connection.recv_bytes() for _ in head["bodies"]]
    ANSWER
"""
"""A process that speaks as `share_process` does, and loads no library."""


def order(base: str = "base", training: Training = TRAINING, **task: Any) -> Assignment:
    return Assignment("flora", 1, 7, Plan("ann", 4, 2.0, training), TrainLora(a_key=5, wire_dtype="fp32", **task), base)


def update_of(assignment: Assignment, value: float = 1.0) -> ClientUpdate:
    return ClientUpdate("ann", 1, 3, LoraResult({"x.a": np.full((2, 3), value, np.float32)}, base=assignment.base))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Start processes that answer in one way; this process adds nothing up with them."""
    monkeypatch.setattr("fedtune.client.shared_work.connect", lambda store, place, size: ALONE)

    @contextmanager
    def started(answer: str, *, base: str = "base", devices: Sequence[str] = ("cpu", "cpu")) -> Iterator[SharedWork]:
        script = COMPANION.replace("ANSWER", answer).replace("BASE", repr(base))
        with SharedWork({}, {}, devices, base="base", command=(sys.executable, "-S", "-c", script)) as shared:
            yield shared

    return started


def send_text(text: str) -> str:
    return f"connection.send_bytes(json.dumps({text}).encode())"


def test_processes_stay_from_one_assignment_to_the_next(scripted: Callable[..., Any]) -> None:
    same = send_text(repr({"result": result_digest(update_of(order()))}))
    with scripted(same, devices=("cpu",) * 3) as shared:
        pids = []
        for _ in range(2):
            assert (
                shared.perform(order(blobs={"global": BLOB}), lambda s: update_of(order()), threads=1).client == "ann"
            )
            pids.append([companion.process.pid for companion in shared._companions])
    assert pids[0] == pids[1]
    assert len(pids[0]) == 2
    assert not shared._companions


BLOB: Tensors = {"x.a": np.ones((1, 2), np.float32), "x.b": np.ones((2, 1), np.float32)}


@pytest.mark.parametrize(
    ("answer", "base", "reason"),
    [
        ("os._exit(3)", "base", "expected every process to work; got process 1, which ended with status 3"),
        (
            "os.kill(os.getpid(), 9)",
            "base",
            r"expected every process to work; got process 1, which was killed by signal 9 \(SIGKILL",
        ),
        (send_text("{'failed': 'memory ran out'}"), "base", "process 1: memory ran out"),
        (send_text("{'result': 'another'}"), "base", "expected the same adapter of every process; got others"),
        ("pass", "another", "expected base base in every process; got another in 1"),
    ],
)
def test_a_process_that_fails_is_the_clients_failure_and_is_replaced(
    answer: str, base: str, reason: str, scripted: Callable[..., Any]
) -> None:
    with scripted(answer, base=base) as shared:
        with pytest.raises(ClientError, match=f"^ann: {reason}"):
            shared.perform(order(), lambda shares: update_of(order()), threads=1)
        assert not shared._companions


def test_where_this_process_waits_in_vain_the_error_is_that_of_the_other(scripted: Callable[..., Any]) -> None:
    def wait(shares: Shares) -> ClientUpdate:
        raise RuntimeError("connection closed by peer")  # as gloo says it

    with (
        scripted(f"{send_text(repr({'failed': 'bob'}))}; os._exit(1)") as shared,
        pytest.raises(ClientError, match=r"^ann: process 1: bob$"),
    ):
        shared.perform(order(), wait, threads=1)


@pytest.mark.parametrize("error", [ClientError("ann: a fault of its own"), ValueError("two"), KeyboardInterrupt()])
def test_an_error_of_ones_own_stays_what_it_is_and_ends_the_others(
    error: BaseException, scripted: Callable[..., Any]
) -> None:
    def fail(shares: Shares) -> ClientUpdate:
        raise error

    with scripted("pass") as shared:
        with pytest.raises(type(error)) as raised:
            shared.perform(order(), fail, threads=1)
        assert raised.value is error
        assert not shared._companions


def test_a_process_ends_when_the_first_one_is_gone() -> None:
    read, life = os.pipe()
    script = COMPANION.replace("ANSWER", "pass").replace("BASE", "'base'")
    companion = start(
        (sys.executable, "-S", "-c", script), 1, ["cpu", "cpu"], Path("store"), os.memfd_create("x"), read
    )
    os.close(read)
    assert companion.receive() == {}
    os.close(life)  # as the system does for a process that is killed
    assert companion.process.wait(60) == 0
    companion.connection.close()


@pytest.mark.slow
def test_no_process_outlives_one_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "first.py"
    companion = COMPANION.replace("ANSWER", "pass").replace("BASE", "'base'")
    script.write_text(
        textwrap.dedent(
            f"""
            import os, signal, sys
            from pathlib import Path
            from fedtune.client.shared_work import start
            read, life = os.pipe()
            command = (sys.executable, "-S", "-c", {companion!r})
            companion = start(command, 1, ["cpu", "cpu"], Path("store"), os.memfd_create("x"), read)
            os.close(read)
            print(companion.receive(), companion.receive(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
            """
        )
    )
    # It returns when nobody can write to its errors any more, which the other process could as long as it lives.
    ended = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, "{} {'base': 'base'}\n")


@pytest.fixture
def base(checkpoints: dict[str, Path]) -> Base:
    from fedtune.model.base import load, load_tokenizer

    settings = ModelSettings(base=str(checkpoints["llama"]), dtype="float32", device="cpu", processes=2)
    return load(settings, ADAPTER, tokenizer=load_tokenizer(settings, Path()), root=Path(), seed=0)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_and_a_dead_one_is_replaced(base: Base) -> None:
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 200, size=5 + 3 * (place % 4)).astype(np.int64) for place in range(7)]
    rows = [Example(row, row, characters=9, prompt="", reference="", prompt_tokens=0) for row in ids]
    settings = ModelSettings(base=base.path, dtype="float32", device="cpu", processes=2)
    spec = payload(settings, ADAPTER, {"ann": rows}, root=Path(), seed=0, held_out={"ann": rows[:2]})
    assignment = order(base.digest)
    work = partial(perform, base, rows, assignment, threads=1, held_out=rows[:2])
    alone = work()

    with SharedWork(*spec, ["cpu", "cpu"], base=base.digest) as shared:
        for _ in range(2):
            together = shared.perform(assignment, lambda shares: work(shares=shares), threads=1)
            for name, theirs in alone.lora.tensors.items():
                np.testing.assert_allclose(together.lora.tensors[name], theirs, atol=1e-5, rtol=0)
                assert np.abs(theirs).max() > 1e-2
        assert together.measured.tokens == alone.measured.tokens

        def dying(shares: Shares) -> ClientUpdate:
            shared._companions[0].process.kill()
            return work(shares=shares)

        with pytest.raises(ClientError, match="ann: expected every process to work; got process 1, which was killed"):
            shared.perform(assignment, dying, threads=1)
        # The other process is asked for another base than it has; this one waits for its sums.
        with pytest.raises(ClientError, match="ann: process 1: ann: expected base another"):
            shared.perform(replace(assignment, base="another"), lambda shares: work(shares=shares), threads=1)
        again = shared.perform(assignment, lambda shares: work(shares=shares), threads=1)
    assert result_digest(again) == result_digest(together)
    assert digest(base.model) == base.digest
