"""What the engines cost beside the clients' work, held against the targets: time of a round, start-up, memory.

    python benchmarks/engines.py [--parts rounds start memory] [--engines inprocess processes grid ray]

Prints the machine, then one JSON line per case. `rounds`: clients answer at once with an update made beforehand, so
what is left is the framework; `grid` is Flower's transport over a grid in this process. `start`: from nothing to
clients that can be asked, and to the first update of a real one. `memory`: the proportional set size (shared pages
counted once) of all processes of a run, at its peak, while clients train over a base of about 500 MB that is made on
the spot; once for the engine's own processes, and once with the main process, which holds a base to score with.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from fedtune.config import Recipe, bind
from fedtune.messages import (
    Assignment,
    Blueprint,
    Client,
    ClientScores,
    ClientUpdate,
    LoraResult,
    ScoreRequest,
    Training,
    TrainLora,
)
from fedtune.methods import METHODS
from fedtune.model.settings import ModelSettings
from fedtune.planning.fixed import Fixed
from fedtune.rounds.context import RoundContext
from fedtune.rounds.loop import run
from fedtune.rounds.schedule import Schedule
from fedtune.rounds.transport import Transport, Work
from fedtune.seeds import generator
from fedtune.simulation.fork_client import ForkServer
from fedtune.simulation.fork_server import Prepared, serve
from fedtune.simulation.inprocess import InProcess
from fedtune.simulation.process_pool import ProcessPool
from fedtune.tensors import cast
from fedtune.wire.profile import ClientProfile, ModelSpec

if TYPE_CHECKING:
    # Imported where it is used: this file is also what the nursery runs, and what Flower imports starts threads.
    from flwr.app import Message, UserConfig
    from flwr.clientapp import ClientApp

SIZE, RANK = 64, 4
LAYERS = {f"layers.{i}": (SIZE, SIZE) for i in range(4)}
CORES = len(os.sched_getaffinity(0))
# A rate by which the planned steps can reach what the clients answer, which is not trained.
TRAINING = Training(batch=1, learning_rate=1e3, steps=2)
CLIENTS = (8, 32, 100)

ROUND_MS = {("inprocess", 100): 50.0, ("processes", 100): 100.0}
"""Targets, by engine and clients."""
START_S = {"processes": 4.0}
MEMORY_RATIO = {"processes": 1.3}
"""Of the most workers to the fewest."""

Engine: TypeAlias = Callable[[Sequence[Client]], AbstractContextManager[Transport]]
Result = TypeVar("Result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument(
        "--parts", nargs="+", choices=["rounds", "start", "memory"], default=["rounds", "start", "memory"]
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[name for name, each in METHODS.items() if each.task is TrainLora],
        default=["fedit", "flora"],
        help="for rounds",
    )
    parser.add_argument("--rounds", type=int, default=12, help="a quarter of them on ray")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4], help="for memory")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64], help="of an example, for memory")
    args = parser.parse_args()
    tell(
        "machine",
        cores=CORES,
        processor=platform.machine(),
        python=platform.python_version(),
        torch=version("torch"),
        numpy=np.__version__,
    )
    engines = [name for name in args.engines if name != "ray" or find_spec("ray")]
    if "rounds" in args.parts:
        for engine in engines:
            for clients in CLIENTS:
                count = max(1, args.rounds // 4) if engine == "ray" else args.rounds
                for method, times in seconds(ENGINES[engine], args.methods, clients=clients, rounds=count).items():
                    found = 1000 * median(times)
                    tell(
                        "framework time of a round",
                        engine=engine,
                        method=method,
                        clients=clients,
                        median_ms=round(found, 1),
                        best_ms=round(1000 * min(times), 1),
                        **held(found, ROUND_MS.get((engine, clients)), "ms"),
                    )
    with tempfile.TemporaryDirectory() as folder:
        if "start" in args.parts:
            for engine in engines:
                if engine != "grid":  # which is nothing to start
                    begun = fresh(start, engine, Path(folder))
                    tell("start", engine=engine, **begun, **held(begun["ready_s"], START_S.get(engine), "s"))
        if "memory" in args.parts:
            fresh(build, Path(folder))
            for engine in engines:
                if engine in ("processes", "ray"):
                    for tokens in args.tokens:
                        tell_memory(engine, Path(folder), sorted(set(args.workers)), tokens)


def tell(case: str, **facts: Any) -> None:
    print(json.dumps({"case": case, **facts}), flush=True)


def held(found: float, target: float | None, unit: str) -> Mapping[str, Any]:
    """Return what a measured number is held against; nothing without a target."""
    return {} if target is None else {f"target_{unit}": target, "met": found <= target}


def tell_memory(engine: str, folder: Path, workers: Sequence[int], tokens: int) -> None:
    found = {count: fresh(memory, engine, folder, count, tokens) for count in workers}
    for count, sizes in found.items():
        tell("memory", engine=engine, workers=count, tokens=tokens, **sizes)
    few, many = workers[0], workers[-1]
    for counted, key in (("the engine's own processes", "engine_mb"), ("the main process as well", "all_mb")):
        ratio = found[many][key] / found[few][key]
        target = held(ratio, MEMORY_RATIO.get(engine) if (few, many) == (1, 4) else None, "ratio")
        tell("memory", engine=engine, workers=[few, many], tokens=tokens, of=counted, ratio=round(ratio, 3), **target)


def fresh(measure: Callable[..., Result], *arguments: Any) -> Result:
    """Return what a function returns in a process of its own, which carries nothing of an earlier case."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(measure, *arguments).result()


# Rounds of trivial clients


def seconds(engine: Engine, methods: Sequence[str], *, clients: int, rounds: int) -> Mapping[str, Sequence[float]]:
    """Return by method the time of each round but the first two, in which caches fill."""
    names = [f"client-{i:03d}" for i in range(clients)]
    with engine([Client(name, 10) for name in names]) as transport:
        found = {}
        for method in methods:
            results = run(
                RoundContext(
                    method=METHODS[method],
                    settings=METHODS[method].settings(wire_dtype="bf16"),
                    planner=Fixed(lambda name: (RANK, TRAINING), alpha="2r", rslora=False),
                    transport=transport,
                    schedule=Schedule(count=rounds + 2, min_clients=clients),
                    blueprint=Blueprint(LAYERS, {}, max_rank=RANK, seed=0),
                    base="",
                )
            )
            found[method] = [result.seconds for result in results][2:]
        return found


def answering() -> Work:
    """Return a client that has its update ready."""
    rng = generator(0)
    shapes = {"a": (RANK, SIZE), "b": (SIZE, RANK)}
    factors = {f"{name}.{s}": rng.standard_normal(shapes[s]).astype(np.float32) for name in LAYERS for s in "ab"}
    ready = cast(factors, "bf16")

    def answer(assignment: Assignment) -> ClientUpdate:
        return ClientUpdate(assignment.plan.client, assignment.round, 10, LoraResult(ready, base=assignment.base))

    return answer


def inprocess(fleet: Sequence[Client]) -> AbstractContextManager[Transport]:
    return nullcontext(InProcess(fleet, {client.name: answering() for client in fleet}))


@contextmanager
def processes(fleet: Sequence[Client]) -> Iterator[Transport]:
    with ForkServer([sys.executable, __file__, "--nursery"]) as nursery:
        nursery.load({}, {})
        yield ProcessPool(nursery, fleet, workers=CORES)


def prepare(spec: Mapping[str, Any], parts: Mapping[str, memoryview]) -> Prepared:
    """Load nothing: what the nursery of `processes` runs."""
    answer = answering()
    return Prepared(lambda place: lambda assignment, threads: answer(assignment))


@contextmanager
def grid(fleet: Sequence[Client]) -> Iterator[Transport]:
    from fedtune.flower import shim
    from fedtune.flower.grid_transport import GridTransport

    memory: Any = MemoryGrid(app(fleet), len(fleet))
    shim.enter_task()
    try:
        yield GridTransport(memory, expected=len(fleet), closed=True)
    finally:
        shim.leave_task()


@contextmanager
def ray(fleet: Sequence[Client]) -> Iterator[Transport]:
    from fedtune.flower.engine import Share, ray_transport

    with ray_transport(app(fleet), clients=len(fleet), workers=CORES, share=Share()) as transport:
        yield transport


ENGINES: Mapping[str, Engine] = {"inprocess": inprocess, "processes": processes, "grid": grid, "ray": ray}
"""By name: a context manager over a transport whose clients do `answering()`."""


@dataclass(frozen=True)
class Trivial:
    """A client without model and data, as a Flower app knows it."""

    client: Client
    work: Work

    def profile(self) -> ClientProfile:
        return ClientProfile(self.client.name, self.client.num_examples, ModelSpec(base="", modules=LAYERS))

    def perform(self, assignment: Assignment) -> ClientUpdate:
        return self.work(assignment)

    def with_labels(self, labels: Sequence[str]) -> Trivial:
        return self

    def score(self, request: ScoreRequest) -> ClientScores:
        return ClientScores(request.client, request.round, request.base, {})


def app(fleet: Sequence[Client]) -> ClientApp:
    from fedtune.flower.client_app import client_app

    return client_app(partial(trivial, fleet, answering()))


def trivial(
    fleet: Sequence[Client], work: Work, node_config: Mapping[str, Any], run_config: Mapping[str, Any]
) -> Trivial:
    return Trivial(fleet[int(node_config["partition-id"])], work)


@dataclass
class MemoryGrid:
    """What a `GridTransport` asks of a Grid; nodes work when somebody looks for their reply, and all goes as bytes."""

    app: ClientApp
    nodes: int
    sent: dict[str, Message] = field(default_factory=dict)
    count: int = 0

    def get_nodes(self) -> Sequence[Any]:
        from fedtune.flower import shim

        return [shim.NodeInfo(node_id=1 + place) for place in range(self.nodes)]

    def push_messages(self, messages: Iterable[Message]) -> Sequence[str]:
        from fedtune.flower import shim

        pushed = []
        for message in messages:
            self.count += 1
            shim.stamp(message, f"message-{self.count}")
            self.sent[f"message-{self.count}"] = carried(message)
            pushed.append(f"message-{self.count}")
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        return [carried(self.replied(self.sent.pop(name))) for name in message_ids if name in self.sent]

    def replied(self, message: Message) -> Message:
        from flwr.app import Context, RecordDict

        node = message.metadata.dst_node_id
        config: UserConfig = {"partition-id": node - 1}
        return self.app(message, Context(run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config={}))


def carried(message: Message) -> Message:
    """Return the message as it is after a journey as bytes."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    from fedtune.flower import shim

    contents = {key: one.deflate() for key, one in get_all_nested_objects(message).items()}
    arrived = inflate_object_from_contents(message.object_id, contents, keep_object_contents=False)
    assert isinstance(arrived, type(message))
    shim.stamp(arrived, message.metadata.message_id)
    return arrived


# Real clients


def recipe(folder: Path, *, base: str, engine: str, clients: int, tokens: int) -> Recipe:
    """Write the data of so many clients, two rows each, and return a recipe of one round over them."""
    text = "the quick brown fox jumps over the lazy dog " * tokens
    rows = [{"text": text, "who": f"client-{place}"} for place in range(clients) for _ in range(2)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return bind(
        {
            "name": "engines",
            "model": {"base": base, "device": "cpu", "threads": 1},
            "adapter": {"rank": 8, "targets": ["q_proj", "v_proj"]},
            "method": "fedit",
            "client": {"steps": 2, "batch": 1, "learning_rate": 1e-3},
            "rounds": {"count": 1, "min_clients": clients},
            "data": {
                "source": str(folder / "data.jsonl"),
                "split": {"kind": "key", "by": "who"},
                "max_tokens": tokens,
                "held_out": 0.0,
            },
            "engine": {"name": engine},
        }
    )


def nursery_of(engine: str) -> AbstractContextManager[ForkServer | None]:
    return ForkServer() if engine == "processes" else nullcontext()


def start(engine: str, folder: Path) -> Mapping[str, float]:
    """Return the seconds from nothing to clients that can be asked, and to the first update, with the torch stack."""
    began = time.perf_counter()
    bound = recipe(folder, base="embedded", engine=engine, clients=1, tokens=16)
    with nursery_of(engine) as nursery:
        # Loaded only now, as in a run, while the nursery imports the same: this process needs a base of its own.
        from fedtune.runs.local import prepare, run_context, transport
        from fedtune.runs.runner import run_rounds_of

        experiment = prepare(bound)
        here = time.perf_counter() - began
        with transport(experiment, nursery) as started:
            started.clients()
            ready = time.perf_counter() - began
            list(run_rounds_of(run_context(experiment), started))
            updated = time.perf_counter() - began
    return {name: round(each, 3) for name, each in (("here_s", here), ("ready_s", ready), ("first_update_s", updated))}


def build(folder: Path) -> None:
    """Write a Llama of 129 million float32 parameters, 514 MB, drawn at random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedtune.model.base import load_tokenizer
    from fedtune.model.libraries import quiet

    tokenizer = load_tokenizer(ModelSettings(base="embedded"), Path())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=10,
        num_attention_heads=16,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    with quiet():
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def memory(engine: str, folder: Path, workers: int, tokens: int) -> Mapping[str, Any]:
    """Return the peak megabytes of a run whose four clients train: of the engine's processes, and with this one."""
    from fedtune.runs.local import prepare, run_context, transport
    from fedtune.runs.runner import run_rounds_of

    bound = recipe(folder, base=str(folder), engine=engine, clients=4, tokens=tokens)
    experiment = prepare(replace(bound, engine=replace(bound.engine, workers=workers)))
    with nursery_of(engine) as nursery, transport(experiment, nursery) as started:
        if nursery:  # a core for each worker: on a machine that has fewer, some would never be at work
            started = ProcessPool(nursery, started.clients(), workers=workers, cores=workers)
        with sampled() as samples:
            list(run_rounds_of(run_context(experiment), started))
    peak = max(samples, key=lambda sample: sum(sample.values()))
    here = peak.pop(os.getpid())
    tensors = sum(parameter.numel() * parameter.element_size() for parameter in experiment.base.model.parameters())
    return {
        "base_mb": round(tensors / 1e6),
        "engine_mb": round(sum(peak.values()) / 1e6),
        "all_mb": round((sum(peak.values()) + here) / 1e6),
        "processes_mb": sorted((round(size / 1e6) for size in peak.values()), reverse=True),
    }


@contextmanager
def sampled() -> Iterator[list[dict[int, int]]]:
    """Give what grows during the block: bytes by process, of this one and all that descend from it."""
    samples = list[dict[int, int]]()
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.1):
            sizes = {pid: proportional_bytes(pid) for pid in descendants(os.getpid())}
            samples.append({pid: size for pid, size in sizes.items() if size})

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def descendants(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in read(task).split():
            yield from descendants(int(child))


def proportional_bytes(pid: int) -> int:
    """Return the size of a process, 0 for one that has ended."""
    lines = read(Path(f"/proc/{pid}/smaps_rollup")).splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def read(path: Path) -> str:
    """Return a file of /proc, empty if its process has ended: Ray's come and go."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return path.read_text()
    return ""


if __name__ == "__main__":
    if sys.argv[1:2] == ["--nursery"]:
        serve(int(sys.argv[-1]), prepare)
    main()
