"""One recipe comes to the same bits whichever engine runs its clients, and a run may change the engine on its way."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pytest

import fedtune
from fedtune import api
from fedtune.client import perform, site
from fedtune.config import bind, render
from fedtune.flower import shim
from fedtune.flower.client_app import client_app
from fedtune.messages import Assignment, ClientUpdate
from fedtune.rounds.events import ClientFinished, Event, RoundStarted
from fedtune.rounds.transport import Transport
from fedtune.runs import local
from fedtune.runs.local import Experiment, prepare, run_context, transport
from fedtune.runs.runner import run_rounds_of
from fedtune.simulation.fork_client import ForkServer
from fedtune.simulation.process_pool import ProcessPool
from fedtune.simulation.resources import Resources
from fedtune.store import peft
from tests.flower.conftest import NODE, Clock, MemoryGrid, over, running

Tables: TypeAlias = dict[str, Any]
Engine: TypeAlias = Callable[[Experiment], AbstractContextManager[Transport]]

# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
SLOW_RAY = (
    pytest.mark.slow,
    # Ray forgets the processes that it started, once it has ended them.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
)

ROUNDS = 3
METHODS = (
    {"name": "flora", "mode": "continue"},
    {"name": "flexlora"},
    {"name": "zeropad"},
    {"name": "zeropad", "server_optimizer": "fedyogi", "robust": "clip"},
)
SEEDS = ({"bank": "hadamard"}, {"bank": "kron", "sampling": "pro"})
"""Settings of `fedkseed`; the first of its rounds measures the step."""
DESCENTS = (
    {"bank": "hadamard", "verb": "descend", "groups": 4, "scalar_bits": 4},
    {"bank": "kron", "verb": "auto", "groups": "tensor"},
)
"""The same with clients that take first-order steps."""
FEW = (METHODS[0], METHODS[3], SEEDS[1], DESCENTS[0])
"""One that stacks, one that steps by an optimiser, two of seeds: in the fast tier the engines are held to these."""


def with_dropout(tables: Tables) -> Tables:
    """The recipe of mixed ranks, with dropout: what a client draws must depend on no one before it either.

    And with what the server decides by round and client: FedProx's term, and a learning rate that is another each time.
    """
    rounds = {"count": ROUNDS, "min_clients": 3, "schedule": "cosine", "warmup": 1}
    return tables | {"client": tables["client"] | {"dropout": 0.1, "proximal": 0.1}, "rounds": rounds}


@pytest.fixture
def tables(tables: Tables) -> Tables:
    return with_dropout(tables)


def chosen(name: Literal["inprocess", "processes", "ray"], workers: int) -> Engine:
    """Return an engine as a recipe names it."""

    def engine(prepared: Experiment) -> AbstractContextManager[Transport]:
        recipe = prepared.recipe
        wanted = replace(recipe, engine=replace(recipe.engine, name=name, workers=workers))
        return transport(replace(prepared, recipe=wanted))

    return engine


@contextmanager
def in_memory_grid(prepared: Experiment) -> Iterator[Transport]:
    """Give the Flower apps of all clients over a grid that hands out the last reply first."""
    app = client_app(partial(site.simulated_site, render(prepared.recipe)))
    nodes = {NODE + place: running(app, node_config={"partition-id": place}) for place in range(len(prepared.fleet))}
    grid = MemoryGrid(nodes)
    grid.order = lambda replies: replies[::-1]
    shim.enter_task()
    try:
        yield over(grid, Clock(), expected=len(nodes))
    finally:
        shim.leave_task()
        site.cached_recipe.cache_clear()


def played(experiments: Sequence[Experiment], engine: Engine) -> Sequence[Sequence[tuple[str, ...]]]:
    """Return the state's digest after each round of each, and whose updates went into it, in the order of the sum.

    The order stands here because float32 hides most of what another one does to a sum of three in float64. The
    experiments may differ in what their clients have no use for: one engine serves them all.
    """
    with engine(experiments[0]) as started:
        return [
            [(result.digest, *result.outcomes) for result in run_rounds_of(run_context(each), started)]
            for each in experiments
        ]


def pruned(tables: Tables) -> Tables:
    """The same recipe with pruning, a planner that learns, and simulated devices."""
    rest = {key: value for key, value in tables.items() if key != "override"}
    return rest | {
        "adapter": {"rank": 4, "targets": ["all-linear"]},
        "method": "fedspine",
        "pruning": {"target": 0.5, "multiple": 8, "batches": 2, "refresh": 2, "stages": 2, "steps_between": 1},
        "planner": {"name": "deadline", "goal": "deployed", "ratios": [0.0, 0.25, 0.5], "ranks": [2, 4]},
        "fleet": {"name": "fedspine80"},
        "rounds": {"count": 4},
    }


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(chosen("processes", 2), id="processes", marks=pytest.mark.slow),
        pytest.param(in_memory_grid, id="grid"),
    ],
)
def test_pruned_clients_come_to_the_same_bits_and_the_same_choices(engine: Engine, tables: Tables) -> None:
    prepared = prepare(bind(pruned(tables)))

    def choices(engine: Engine) -> list[tuple[Any, ...]]:
        with engine(prepared) as started:
            return [
                (
                    result.digest,
                    result.clock_s,
                    *((n, a.plan.ratio, a.plan.rank) for n, a in result.assignments.items()),
                )
                for result in run_rounds_of(run_context(prepared), started)
            ]

    expected = choices(chosen("inprocess", 1))
    assert choices(engine) == expected
    assert {ratio for _, _, *plans in expected for _, ratio, _ in plans} == {0.0, 0.5}


def compared(tables: Tables, folder: Path) -> Tables:
    """The same recipe over rows with two answers, which its clients compare, by a method that steps from a mean."""
    rows = [json.loads(line) for line in Path(tables["data"]["source"]).read_text().splitlines()]
    pairs = [
        {"chosen": row["text"], "rejected": " ".join(reversed(row["text"].split())), "who": row["who"]} for row in rows
    ]
    source = folder / "pairs.jsonl"
    source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return tables | {
        "method": "fedit",
        "client": tables["client"] | {"objective": "dpo", "dpo_beta": 0.2},
        "data": tables["data"] | {"source": str(source)},
        "override": [],
    }


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(chosen("processes", 2), id="processes"),
        pytest.param(in_memory_grid, id="grid"),
    ],
)
def test_clients_that_compare_answers_come_to_the_same_bits(engine: Engine, tables: Tables, tmp_path: Path) -> None:
    experiments = [prepare(bind(compared(tables, tmp_path)))]
    expected = played(experiments, chosen("inprocess", 1))
    assert played(experiments, engine) == expected


def overlapping(tables: Tables) -> Tables:
    """The same recipe in asynchronous rounds, of devices of which one takes two and a half times as long."""
    slow = {"clients": ["client-1"], "peak_tflops": 0.0013, "memory_gbps": 10.4}
    alike = {"clients": ["*"], "profile": "phone-mid", "net_sigma": 0.0, "overhead_s": 0.0}
    rounds = {**tables["rounds"], "count": 4, "min_clients": 1}
    changes = {"rounds": rounds, "fleet": {"name": "phones", "proxy": "smollm2-135m"}, "device": [alike, slow]}
    return tables | changes | {"asynchronous": {"buffer": 2}}


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(chosen("processes", 2), id="processes", marks=pytest.mark.slow),
        pytest.param(in_memory_grid, id="grid"),
    ],
)
def test_clients_of_asynchronous_rounds_come_to_the_same_bits(engine: Engine, tables: Tables) -> None:
    """On every engine the clock decides who is in which buffer, and not the order in which work is done."""
    experiments = [prepare(bind(overlapping(tables)))]
    expected = played(experiments, chosen("inprocess", 1))
    assert played(experiments, engine) == expected
    assert all(len(names) == 2 for _, *names in expected[0])
    assert len({tuple(names) for _, *names in expected[0]}) > 1


def arms(tables: Tables, mode: str) -> Tables:
    """The same recipe with clients that train the upper block alone, go back through a part of all, are sent little."""
    override = [
        {"clients": ["client-0"], "top": 0.5, "down_rank": 1},
        {"clients": ["client-1"], "rank": 2, "steps": 1, "back": 0.5},
        {"clients": ["client-2"], "rank": 8, "down_rank": 3},
    ]
    return tables | {"method": {"name": "flora", "mode": mode}, "override": override}


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(chosen("processes", 2), id="processes", marks=pytest.mark.slow),
        pytest.param(in_memory_grid, id="grid"),
    ],
)
def test_clients_that_train_some_of_the_modules_come_to_the_same_bits(engine: Engine, tables: Tables) -> None:
    experiments = [prepare(bind(arms(tables, "continue")))]
    expected = played(experiments, chosen("inprocess", 1))
    assert played(experiments, engine) == expected


@pytest.mark.slow
def test_a_run_with_such_clients_is_planned_alike_when_it_is_resumed(tables: Tables, tmp_path: Path) -> None:
    tables = arms(tables, "continue")
    whole, run, heard = fedtune.simulate(tables, out=tmp_path / "whole"), tmp_path / "run", list[Event]()
    with pytest.raises(Killed):
        fedtune.simulate(tables, out=run, watch=killed_in(2, heard))
    fedtune.simulate(tables, resume=run)
    assert states(run) == states(whole.path)
    lines = [json.loads(line)["clients"] for line in (run / "rounds.jsonl").read_text().splitlines()[1:]]
    asked = [{key: line["client-0"].get(key) for key in ("top", "down_rank", "ranks")} for line in lines]
    assert asked == [{"top": 0.5, "down_rank": 1, "ranks": None}] * ROUNDS
    api.verify(run)


def seeded(tables: Tables, **settings: Any) -> Tables:
    """The same recipe with seeds in place of adapters; the table `adapter` says which layers there are."""
    client: Tables = {"steps": 4, "batch": 4, "learning_rate": 0.01}
    descend: Tables = {}
    if settings.get("verb", "probe") != "probe":
        descend = {"descend": {"steps": 3}}
        client = {"batch": 4} if settings["verb"] == "descend" else client
    method = {"name": "fedkseed", "seeds": 64, **settings}
    return tables | {"method": method, "client": client, "override": [], **descend}


@pytest.fixture(scope="module")
def experiments(request: pytest.FixtureRequest, tiny_recipe: Tables) -> Sequence[Experiment]:
    """One of every kind of method that is asked for."""
    tables = with_dropout(tiny_recipe)
    return [
        prepare(bind(tables | {"method": method} if "name" in method else seeded(tables, **method)))
        for method in request.param
    ]


@pytest.fixture(scope="module")
def expected(experiments: Sequence[Experiment]) -> Sequence[Sequence[tuple[str, ...]]]:
    """The digests and outcomes of their rounds in this process."""
    return played(experiments, chosen("inprocess", 1))


ALL = (*METHODS, *SEEDS, *DESCENTS)


@pytest.mark.parametrize(
    ("experiments", "engine"),
    [
        pytest.param(FEW, chosen("processes", 2), id="two processes"),
        pytest.param(FEW, in_memory_grid, id="grid"),
        pytest.param(ALL, chosen("processes", 1), id="all, one process", marks=pytest.mark.slow),
        pytest.param(ALL, chosen("processes", 2), id="all, two processes", marks=pytest.mark.slow),
        pytest.param(ALL, in_memory_grid, id="all, grid", marks=pytest.mark.slow),
        pytest.param(ALL, chosen("ray", 2), id="all, ray", marks=SLOW_RAY),
    ],
    indirect=["experiments"],
)
def test_three_rounds_of_every_kind_of_method_are_those_in_process_bit_for_bit(
    engine: Engine, experiments: Sequence[Experiment], expected: Sequence[Sequence[tuple[str, ...]]]
) -> None:
    assert len({digest for each in expected for digest, *_ in each}) == ROUNDS * len(experiments)
    assert played(experiments, engine) == expected


class Killed(BaseException):
    """What nobody handles, like SIGKILL: nothing is written on the way out."""


def killed_in(round: int, told: list[Event]) -> Callable[[Event], None]:
    """Return a `watch` that ends the run when a second client answers in a round, the first being in the journal."""

    def watch(event: Event) -> None:
        told.append(event)
        if sum(isinstance(each, ClientFinished) and each.round == round for each in told) == 2:
            raise Killed

    return watch


def engines(*names: str) -> Sequence[Sequence[str]]:
    """Return what overrides the engine of each part of a run: `name` or `name/workers`."""
    parts = [name.partition("/") for name in names]
    return [[f"engine.name={name}", *([f"engine.workers={count}"] if count else [])] for name, _, count in parts]


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(
            engines("processes/2", "inprocess", "processes/1"), id="processes and back", marks=pytest.mark.slow
        ),
        pytest.param(engines("inprocess", "ray/2", "inprocess"), id="ray", marks=SLOW_RAY),
    ],
)
def test_a_run_that_is_killed_and_goes_on_elsewhere_ends_as_one_that_never_was(
    parts: Sequence[Sequence[str]], tables: Tables, tmp_path: Path
) -> None:
    whole = fedtune.simulate(tables, out=tmp_path / "whole")
    run, told = tmp_path / "run", list[list[Event]]([[], [], []])
    with pytest.raises(Killed):
        fedtune.simulate(tables, overrides=parts[0], out=run, watch=killed_in(1, told[0]))
    with pytest.raises(Killed):
        fedtune.simulate(tables, overrides=parts[1], resume=run, watch=killed_in(2, told[1]))
    fedtune.simulate(tables, overrides=parts[2], resume=run, watch=told[2].append)
    begun = [[event.round for event in part if isinstance(event, RoundStarted)] for part in told]
    assert begun == [[1], [1, 2], [2, 3]]
    assert states(run) == states(whole.path)
    assert peft.digest(run / "adapter") == peft.digest(whole.path / "adapter")
    api.verify(run)


def test_a_killed_run_of_clients_that_descend_and_others_that_probe_goes_on_to_the_same_bits(
    tables: Tables, tmp_path: Path
) -> None:
    both = seeded(tables, verb="auto", groups=2) | {"override": [{"clients": ["client-0"], "verb": "probe"}]}
    whole, run = fedtune.simulate(both, out=tmp_path / "whole"), tmp_path / "run"
    with pytest.raises(Killed):
        fedtune.simulate(both, out=run, watch=killed_in(2, []))
    fedtune.simulate(both, resume=run)
    assert states(run) == states(whole.path)
    assert len(set(states(run)[1:])) == ROUNDS
    api.verify(run)


def states(run: Path) -> Sequence[str]:
    """Return the digest of the state after each round."""
    return [json.loads(line)["state_digest"] for line in (run / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture
def uneven(tables: Tables) -> Experiment:
    """An experiment of which each client takes another part of the machine."""
    overrides = [{"clients": ["client-1"], "threads": 2}, {"clients": ["client-2"], "threads": 3, "gpu_share": 0.5}]
    return prepare(bind(tables | {"override": overrides, "rounds": {"count": 1}}))


@pytest.mark.parametrize("engine", [chosen("inprocess", 1), in_memory_grid], ids=["inprocess", "grid"])
def test_each_client_works_with_its_own_threads(
    engine: Engine, uneven: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Counter[tuple[str, int]]()

    def counted(base: Any, examples: Any, assignment: Assignment, *, threads: int, **more: Any) -> ClientUpdate:
        found[assignment.plan.client, threads] += 1
        return perform.perform(base, examples, assignment, threads=threads, **more)

    monkeypatch.setattr(local, "perform", counted)
    monkeypatch.setattr(site, "perform", counted)
    played([uneven], engine)
    assert found == {("client-0", 1): 1, ("client-1", 2): 1, ("client-2", 3): 1}


def test_worker_processes_are_told_what_each_client_takes_and_how_long_it_may(uneven: Experiment) -> None:
    settings = replace(uneven.recipe.engine, name="processes", workers=2, timeout_s=60.0)
    with (
        ForkServer() as nursery,
        transport(replace(uneven, recipe=replace(uneven.recipe, engine=settings)), nursery) as it,
    ):
        assert isinstance(it, ProcessPool)
        assert it.resources == {
            "client-0": Resources(threads=1),
            "client-1": Resources(threads=2),
            "client-2": Resources(threads=3, gpu_share=0.5),
        }
        assert it.timeout_s == 60.0
