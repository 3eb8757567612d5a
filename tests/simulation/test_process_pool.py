from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.errors import RoundError
from fedtune.messages import (
    Assignment,
    Client,
    ClientUpdate,
    Failure,
    LoraResult,
    Plan,
    Training,
    TrainLora,
)
from fedtune.rounds.transport import Answer, Reply, Rule
from fedtune.simulation.fork_client import ForkServer, Worker
from fedtune.simulation.inprocess import InProcess
from fedtune.simulation.process_pool import ProcessPool, send_assignment
from fedtune.simulation.resources import Resources
from fedtune.wire.codec import EncodedAssignment, blob_encoder, encode_assignment

COMMAND = (sys.executable, str(Path(__file__).with_name("scripted.py")))
NAMES = ("ann", "bob", "cyd", "dan")
FLEET = [Client(name, 5) for name in NAMES]
RULE = Rule(quorum=1)


def orders(*names: str, size: int = 6, own: bool = False) -> Mapping[str, EncodedAssignment]:
    """Return one order each, over a tensor that all share, and one of its own for each where that is wanted."""
    encode, shared = blob_encoder(), {"x.a": np.ones(size, np.float32)}
    found = {}
    for number, name in enumerate(names):
        plan = Plan(name, 2, 2.0, Training(batch=1, learning_rate=0.1, steps=1))
        blobs = {"global": shared} | ({"local": {"y.a": np.full(2, number, np.float32)}} if own else {})
        found[name] = encode_assignment(
            Assignment("flora", 1, 3, plan, TrainLora(a_key=4, blobs=blobs), base="base"), encode=encode
        )
    return found


def loaded(fork_server: ForkServer, **spec: Any) -> ForkServer:
    fork_server.load(spec, {"data": b"shared"})
    return fork_server


def pool(fork_server: ForkServer, **settings: Any) -> ProcessPool:
    return ProcessPool(fork_server, FLEET, **{"workers": 2, "cores": 2, **settings})


def pids(processes: ProcessPool) -> Mapping[str, int]:
    """Return the process ids of the workers that are busy, by client."""
    return {running.client: running.worker.pid for running in processes._running.values()}


def by_name(answers: Sequence[Answer]) -> Mapping[str, Answer]:
    assert len({answer.client for answer in answers}) == len(answers)
    return {answer.client: answer for answer in answers}


def told(answer: Answer) -> Any:
    """Return what a client of the act `tell` says about its process."""
    assert isinstance(answer, Failure), answer
    return json.loads(answer.reason)


def wait_until_gone(*pids: int) -> None:
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        assert select.select([descriptor], [], [], 60)[0], f"process {pid} lives on"
        os.close(descriptor)


@pytest.fixture(scope="module")
def echoing() -> Iterator[ForkServer]:
    """A server of workers that send back what they get, for tests that leave it as it was."""
    with loaded(ForkServer(COMMAND)) as server:
        yield server


@pytest.fixture(scope="module")
def telling() -> Iterator[ForkServer]:
    """A server of workers that say where and how they run, for tests that leave it as it was."""
    with loaded(ForkServer(COMMAND), acts=dict.fromkeys(NAMES, "tell")) as server:
        yield server


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_every_client_answers_what_it_answers_in_process(workers: int, echoing: ForkServer) -> None:
    def echo(received: Assignment) -> ClientUpdate:
        tensors = {name: np.array(tensor) for blob in received.lora.blobs.values() for name, tensor in blob.items()}
        return ClientUpdate(received.plan.client, received.round, 5, LoraResult(tensors, base=received.base))

    inprocess = InProcess(FLEET, dict.fromkeys(NAMES, echo))
    processes = pool(echoing, workers=workers, cores=4)
    assert processes.clients() == FLEET
    for _ in range(2):
        sent = orders(*NAMES, own=True)
        assert by_name(list(processes.exchange(sent, RULE))) == by_name(list(inprocess.exchange(sent, RULE)))


def test_nobody_asked_is_nobody_answered(echoing: ForkServer) -> None:
    assert list(pool(echoing).exchange({}, RULE)) == []


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("die", "bob: expected an update; got none: its process was killed by signal 9 (SIGKILL; the system sends it"),
        ("leave", "bob: expected an update; got none: its process ended with status 3;"),
        ("break", "bob: expected an update; got RuntimeError: a kernel is missing"),
        ("fail", "bob: expected a loss; got none"),
        ("hang", "bob: expected an update; got none within 1 s; its process was killed; raise engine.timeout_s"),
        ("kill the server", "bob: expected an update; got none: its process was killed by signal 9 (SIGKILL"),
    ],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_one_clients_end_costs_its_own_update_of_one_round(
    act: str, reason: str, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with loaded(ForkServer(COMMAND), acts={"bob": act}) as fork_server:
        # One core: with several at work, those beside a fork server that is killed would die with it.
        processes = pool(fork_server, workers=workers, cores=1, timeout_s=1.0 if act == "hang" else None)
        for _ in range(1 if act == "hang" else 2):
            answers = by_name(list(processes.exchange(orders(*NAMES), RULE)))
            assert answers.keys() == set(NAMES)
            lost = answers["bob"]
            assert isinstance(lost, Failure)
            assert lost.reason.startswith(reason)
            assert all(isinstance(answers[name], Reply) for name in NAMES if name != "bob")
    assert capfd.readouterr() == ("", "")


def test_a_traceback_is_shown_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDTUNE_DEBUG", "1")
    with loaded(ForkServer(COMMAND), acts={"bob": "break"}) as fork_server:
        list(pool(fork_server).exchange(orders("bob"), RULE))
    assert "RuntimeError: a kernel\nis missing" in capfd.readouterr().err


def test_everybody_at_work_is_lost_with_the_fork_server_and_nobody_else() -> None:
    with loaded(ForkServer(COMMAND), acts={"ann": "hang", "bob": "kill the server"}) as fork_server:
        answers = by_name(list(pool(fork_server, workers=2).exchange(orders(*NAMES), RULE)))
        assert [isinstance(answers[name], Reply) for name in NAMES] == [False, False, True, True]


def test_a_fork_server_that_cannot_start_again_ends_the_round(tmp_path: Path) -> None:
    with loaded(ForkServer(COMMAND), acts={"bob": "kill the server"}, once=str(tmp_path / "started")) as fork_server:
        answers = pool(fork_server, workers=1).exchange(orders(*NAMES), RULE)
        assert [next(answers).client, next(answers).client] == ["ann", "bob"]
        with pytest.raises(RoundError, match="expected to restart the fork server of the worker processes; got model"):
            next(answers)


def test_a_worker_that_stops_reading_is_given_up() -> None:
    with loaded(ForkServer(COMMAND), acts={"ann": "tell"}) as fork_server:
        processes = pool(fork_server, workers=1, timeout_s=1.0)
        (answer,) = processes.exchange(orders("ann"), RULE)
        os.kill(told(answer)["pid"], signal.SIGSTOP)
        answers = by_name(list(processes.exchange(orders("bob", "cyd", size=1_000_000), RULE)))
        lost = answers["bob"]
        assert isinstance(lost, Failure)
        assert "none within 1 s" in lost.reason
        assert isinstance(answers["cyd"], Reply)


def test_a_worker_that_dies_idle_costs_nobody_anything() -> None:
    with loaded(ForkServer(COMMAND), acts={"ann": "tell"}) as fork_server:
        processes = pool(fork_server, workers=1)
        (answer,) = processes.exchange(orders("ann"), RULE)
        os.kill(told(answer)["pid"], signal.SIGKILL)
        wait_until_gone(told(answer)["pid"])
        assert all(isinstance(reply, Reply) for reply in processes.exchange(orders("bob", "cyd"), RULE))


def test_with_fewer_processes_than_wanted_the_round_goes_on() -> None:
    with loaded(ForkServer(COMMAND), forks=1) as fork_server:
        assert all(isinstance(answer, Reply) for answer in pool(fork_server, workers=2).exchange(orders(*NAMES), RULE))


def test_a_worker_that_cannot_be_replaced_leaves_its_clients_to_the_others() -> None:
    with loaded(ForkServer(COMMAND), forks=2, acts={"ann": "die"}) as fork_server:
        answers = by_name(list(pool(fork_server, workers=2).exchange(orders(*NAMES), RULE)))
        assert [isinstance(answers[name], Reply) for name in NAMES] == [False, True, True, True]


def test_with_no_process_at_all_the_round_ends() -> None:
    text = "expected another worker process; got no process left; lower engine.workers"
    with loaded(ForkServer(COMMAND), forks=0) as fork_server, pytest.raises(RoundError, match=text):
        list(pool(fork_server).exchange(orders(*NAMES), RULE))


def test_each_clients_threads_reach_its_work(telling: ForkServer) -> None:
    processes = pool(telling, resources={"bob": Resources(threads=3)})
    answers = by_name(list(processes.exchange(orders(*NAMES), RULE)))
    assert {name: told(answer)["threads"] for name, answer in answers.items()} == dict.fromkeys(NAMES, 1) | {"bob": 3}


def test_a_worker_holds_the_payload_its_connection_and_nothing_else(telling: ForkServer) -> None:
    with open(os.devnull, "rb") as file:
        os.set_inheritable(file.fileno(), True)
        facts = told(next(iter(pool(telling).exchange(orders("ann"), RULE))))
    assert facts["parts"] == {"data": "shared"}
    assert facts["descriptors"] == ["/memfd", "socket"]


def test_ctrl_c_reaches_this_process_alone(telling: ForkServer) -> None:
    facts = told(next(iter(pool(telling).exchange(orders("ann"), RULE))))
    assert facts["sigint"]
    assert facts["session"] != os.getsid(0)


def test_where_memory_runs_out_a_worker_goes_first(telling: ForkServer) -> None:
    facts = told(next(iter(pool(telling).exchange(orders("ann"), RULE))))
    assert facts["oom_score_adj"] == 500
    for pid in (facts["parent"], os.getpid()):
        assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) < 500


def test_a_worker_is_left_with_the_bodies_of_its_last_client_only(echoing: ForkServer) -> None:
    sent = orders(*NAMES, own=True)
    processes = pool(echoing, workers=1)
    assert len(list(processes.exchange(sent, RULE))) == 4
    (worker,) = processes._workers.values()
    assert worker.digests == sent["dan"].blobs.keys()


def test_no_process_is_left_when_the_block_ends() -> None:
    with loaded(ForkServer(COMMAND), acts={"ann": "tell", "bob": "hang"}) as fork_server:
        answers = iter(pool(fork_server, workers=2).exchange(orders("ann", "bob"), RULE))
        facts = told(next(answers))
    for pid in (facts["pid"], facts["parent"]):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_exchange_that_is_given_up_leaves_nobody_at_work() -> None:
    with loaded(ForkServer(COMMAND), acts={"bob": "hang"}) as fork_server:
        processes = pool(fork_server, workers=2)
        answers = processes.exchange(orders(*NAMES), RULE)
        assert next(answers).client == "ann"
        hung = pids(processes)["bob"]
        answers.close()
        assert pids(processes) == {}
        wait_until_gone(hung)
        assert all(isinstance(answer, Reply) for answer in processes.exchange(orders("ann", "cyd"), RULE))


def test_an_answer_that_ctrl_c_left_behind_is_not_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(control: object) -> None:
        raise KeyboardInterrupt

    with loaded(ForkServer(COMMAND), acts={"ann": "tell", "bob": "hang"}) as fork_server:
        processes = pool(fork_server, workers=1)
        processes.clients()
        with monkeypatch.context() as patch:
            patch.setattr("fedtune.simulation.fork_client.receive", interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(processes.exchange(orders(*NAMES), RULE))
        answers = processes.exchange(orders("ann", "bob"), RULE)
        # Else the answer to the first request would be taken for the second one's, and another process be killed.
        assert told(next(answers))["pid"] == pids(processes)["bob"]


MAIN = """
    import sys
    sys.path.insert(0, {folder!r})
    from test_process_pool import *
    with loaded(ForkServer(COMMAND), acts={{"ann": "tell", "bob": "hang"}}) as fork_server:
        for answer in pool(fork_server, workers=1).exchange(orders("ann", "bob"), RULE):
            print(answer.reason, flush=True)
"""


def test_no_process_outlives_a_killed_main() -> None:
    code = textwrap.dedent(MAIN).format(folder=str(Path(__file__).parent))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as main:
        assert main.stdout is not None
        facts = json.loads(main.stdout.readline())
        os.kill(facts["pid"], 0)
        main.kill()
    wait_until_gone(facts["pid"], facts["parent"])


class Recorded:
    """A connection that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send_bytes(self, data: bytes) -> None:
        self.sent.append(data)


def test_a_body_travels_to_a_worker_once_and_is_dropped_when_nobody_needs_it() -> None:
    connection: Any = Recorded()
    worker = Worker(1, 0, connection, None)  # type: ignore[arg-type]
    needed, heads = Counter({"all": 3, "ann's": 1, "both": 2, "bob's": 1}), []
    for digests in (["all", "both", "ann's"], ["all", "bob's"], ["all", "both"]):
        connection.sent.clear()
        order = EncodedAssignment(b"header", {digest: digest.encode() for digest in digests})
        needed.subtract(digests)
        send_assignment(worker, order, needed, client="ann", threads=1)
        heads.append(json.loads(connection.sent[0]))
        assert connection.sent[1:] == [b"header", *(digest.encode() for digest in heads[-1]["bodies"])]
    assert [head["bodies"] for head in heads] == [["all", "both", "ann's"], ["bob's"], []]
    assert [head["drop"] for head in heads] == [[], ["ann's"], ["bob's"]]
    assert worker.digests == {"all", "both"}
