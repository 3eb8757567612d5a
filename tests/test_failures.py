"""Whatever goes wrong with one client's work is that client's failure, in the same words on every engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from fedtune.errors import RoundError
from fedtune.flower import shim
from fedtune.flower.client_app import Site, client_app
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    Client,
    ClientScores,
    ClientUpdate,
    Failure,
    Outcome,
    ScoreRequest,
    Training,
)
from fedtune.methods import METHODS
from fedtune.planning.fixed import Fixed
from fedtune.rounds.context import RoundContext
from fedtune.rounds.loop import run
from fedtune.rounds.schedule import Schedule
from fedtune.rounds.transport import Transport
from fedtune.simulation.fork_client import ForkServer
from fedtune.simulation.inprocess import InProcess
from fedtune.simulation.process_pool import ProcessPool
from fedtune.wire.profile import ClientProfile
from tests.flower.conftest import FOUNDATION, MODULES, NODE, Clock, MemoryGrid, over, running
from tests.simulation.scripted import FAULTS, faulty

NAMES = (*FAULTS, "well")
COMMAND = (sys.executable, str(Path(__file__).parent / "simulation" / "scripted.py"))
TRAINING = Training(batch=1, learning_rate=0.1, steps=1)

WORDS = {
    "index": "failed: index: expected an update; got IndexError: index out of range in self",
    "torch": "failed: torch: expected an update; got RuntimeError: mat1 and mat2 shapes cannot be multiplied",
    "key": "failed: key: expected an update; got KeyError: 'no such column'",
    "assertion": "failed: assertion: expected an update; got AssertionError",
    "memory": "failed: memory: expected its work to fit; memory ran out; lower client.batch",
    "recursion": "failed: recursion: expected an update; got RecursionError: maximum recursion",
    "exit": "failed: exit: expected an update; got SystemExit: 0",
    "text": "failed: text: expected an update; got ValueError: two lines and a [31mcolour; got 'one'; expected less",
    "file": "failed: file: expected an update; got FileNotFoundError: [Errno 2] No such file or directory",
    "own error": "failed: own error: expected a finite loss; got nan",
    "own lines": "failed: x.toml: 2 faults a: expected 1; got 2 b: expected 3; got 4; do it",
    "full device": "failed: full device: expected its batch of 4 to fit; memory ran out; lower client.batch",
    "shape": "failed: x: expected (2, 3) as in the base; got (3, 3)",
    "wire": "failed: accumulators: expected sums; got none",
    "not finite": "refused: ",
    "other shape": "refused: ",
    "other base": "refused: expected base digest",
    "loss": "refused: expected a finite loss_before",
    "other round": "refused: expected round 1; got 9",
}
"""How the failure of each of `FAULTS` begins."""


@contextmanager
def in_process() -> Iterator[Transport]:
    yield InProcess([Client(name, 5) for name in NAMES], dict.fromkeys(NAMES, faulty))


@contextmanager
def processes() -> Iterator[Transport]:
    with ForkServer(COMMAND) as server:
        server.load({"faults": True}, {})
        yield ProcessPool(server, [Client(name, 5) for name in NAMES], workers=2, cores=2)


class FaultySite:
    """A client of Flower's simulation engine."""

    def __init__(self, name: str) -> None:
        self.name = name

    def profile(self) -> ClientProfile:
        return ClientProfile(self.name, 5, FOUNDATION, methods=("flora",))

    def perform(self, assignment: Assignment) -> ClientUpdate:
        return faulty(assignment)

    def with_labels(self, labels: Sequence[str]) -> FaultySite:
        return self

    def score(self, request: ScoreRequest) -> ClientScores:
        raise AssertionError("is not asked here")


@contextmanager
def grid() -> Iterator[Transport]:
    def site_of(node_config: Mapping[str, object], run_config: Mapping[str, object]) -> Site:
        return FaultySite(str(node_config["name"]))

    app = client_app(site_of)
    nodes = {NODE + place: running(app, node_config={"name": name}) for place, name in enumerate(NAMES)}
    shim.enter_task()
    try:
        yield over(MemoryGrid(nodes), Clock(), expected=len(nodes))
    finally:
        shim.leave_task()


def outcomes(engine: AbstractContextManager[Transport], *, min_clients: int = 1) -> Mapping[str, Outcome]:
    with engine as transport:
        [result] = run(
            RoundContext(
                method=METHODS["flora"],
                settings=METHODS["flora"].settings(wire_dtype="fp32"),
                planner=Fixed(lambda name: (2, TRAINING), alpha="2r", rslora=False),
                transport=transport,
                schedule=Schedule(count=1, min_clients=min_clients),
                blueprint=Blueprint(MODULES, {}, max_rank=2, seed=0),
                base=FOUNDATION.base,
            )
        )
    return result.outcomes


def test_every_fault_costs_its_client_alone_and_is_named() -> None:
    known = dict(outcomes(in_process()))
    assert isinstance(known.pop("well"), AdmittedUpdate)
    assert known.keys() == WORDS.keys() == FAULTS.keys()
    for name, failure in known.items():
        assert isinstance(failure, Failure), name
        assert f"{failure.kind}: {failure.reason}".startswith(WORDS[name])
        assert failure.reason.isprintable()
        assert failure.out_of_memory == (name in ("memory", "full device"))
    assert len({failure.reason for failure in known.values() if isinstance(failure, Failure)}) == len(known)


@pytest.mark.parametrize("engine", [processes, grid])
def test_a_failure_is_the_same_on_every_engine(
    engine: Callable[[], AbstractContextManager[Transport]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.flower.shim.in_simulation", lambda: True)
    known, others = (
        {
            name: (failure.client, failure.kind, failure.code, failure.reason)
            for name, failure in outcomes(each()).items()
            if isinstance(failure, Failure)
        }
        for each in (in_process, engine)
    )
    assert others == known


def test_a_round_in_which_too_many_fail_ends_with_one_error_that_names_them() -> None:
    with pytest.raises(
        RoundError, match=r"expected at least 2 usable updates .*; got 1 of 20: .*IndexError.*and 14 more"
    ):
        outcomes(in_process(), min_clients=2)


def test_ctrl_c_stops_the_run_and_is_no_clients_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(update: ClientUpdate) -> ClientUpdate:
        raise KeyboardInterrupt

    monkeypatch.setitem(FAULTS, "key", stop)
    with pytest.raises(KeyboardInterrupt):
        outcomes(in_process())
