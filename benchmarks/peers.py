"""One job in fedtune's engines, in a bare PyTorch and peft loop, and in Flower's simulation, in turn, in one run.

    python benchmarks/peers.py [--base FOLDER] [--cases bare inprocess processes ...] [--repeat 3]

The job: 10 clients, 5 rounds of 8 local steps of AdamW on LoRA factors of rank 8, one thread for each client's work.
`bare` is what one would write by hand in one process: one resident peft model, the same steps, a mean of the factors.
`flower` and `flower resident` are a ClientApp and a ServerApp with FedAvg as Flower's examples have them, on Ray, where
that is installed: the first loads base and adapter for each message, as FlowerTune does, the second once in a worker.
Each case runs in a process of its own. What is compared is processor time, of the process and of all that it starts:
until clients can be asked, and of a round (the first is left out); and memory, as the proportional set size of them
all, shared pages counted once, at its peak in the rounds. Losses before and after training, which fedtune measures on
four rows of each client, are in its rounds; scores of the global model are in none. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from flwr.app import Context, Message

CLIENTS, ROUNDS, STEPS, BATCH, RANK, RATE = 10, 5, 8, 8, 8, 1e-3
ROWS = 48
"""Of each client."""
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260k-hf"
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
SAMPLE_S = 0.25

ROUND_RATIO = {"processes": 1.10, "flora reinit": 1.05, "flora continue": 1.05}
"""Targets: processor time of a round over that of the bare loop."""
START_S = 5.0
"""Target: processor seconds until `processes` can be asked, beyond those of `inprocess`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", default=str(STORIES) if STORIES.is_dir() else "embedded", help="of a causal model")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    cases = [case for case in args.cases if not case.startswith("flower") or find_spec("ray")]
    with tempfile.TemporaryDirectory() as folder:
        write_job(Path(folder), args.base)
        results: dict[str, list[Mapping[str, float]]] = {case: [] for case in cases}
        for _ in range(args.repeat):
            for case in cases:
                results[case].append(measured(case, Path(folder)))
                print(json.dumps({"case": case, "base": args.base, **results[case][-1]}), flush=True)
    for case, runs in results.items():
        print(json.dumps({"summary": case, **compared(case, runs, results)}), flush=True)


def write_job(folder: Path, base: str) -> None:
    """Write texts of many lengths, a file for each client, and the settings that all cases have in common."""
    rng = np.random.Generator(np.random.Philox(key=0))
    words = [
        "the",
        "old",
        "king",
        "small",
        "dog",
        "gave",
        "his",
        "red",
        "ball",
        "and",
        "slept",
        "under",
        "tree",
        "river",
    ]
    data = folder / "data"
    data.mkdir()
    for client in range(CLIENTS):
        texts = [" ".join(rng.choice(words, int(rng.integers(12, 48)))) for _ in range(ROWS)]
        (data / f"{client}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "job.json").write_text(json.dumps({"base": base, "data": str(data / "*.jsonl")}))
    subprocess.run([*child("tokens"), str(folder)], check=True, env=environment())


def child(case: str) -> Sequence[str]:
    # As a module: what Ray's workers are to run must have a name that they can import.
    return [sys.executable, "-c", f"import peers, sys; peers.CASES.get({case!r}, peers.write_tokens)(sys.argv[1])"]


def environment() -> Mapping[str, str]:
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "RAY_DEDUP_LOGS": "0",
    }


def measured(case: str, folder: Path) -> Mapping[str, float]:
    """Return what one run of a case takes: processor seconds until it is ready and of a round, megabytes."""
    marks, sizes = list[float](), list[int]()
    with subprocess.Popen([*child(case), str(folder)], stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        stop = threading.Event()
        sampler = threading.Thread(target=sample, args=(process.pid, marks, sizes, stop))
        sampler.start()
        for line in process.stdout:
            if line.startswith("mark "):
                marks.append(float(line.split()[1]))
        stop.set()
        sampler.join()
    if process.returncode or len(marks) != ROUNDS + 1:
        raise SystemExit(f"{case}: ended with status {process.returncode} after {len(marks)} of {ROUNDS + 1} marks")
    return {
        "start_cpu_s": round(marks[0], 2),
        "round_cpu_s": round((marks[-1] - marks[1]) / (ROUNDS - 1), 3),
        "peak_mb": round(max(sizes, default=0) / 1e6),
    }


def sample(pid: int, marks: Sequence[float], sizes: list[int], stop: threading.Event) -> None:
    """Append the size of a process and its descendants every so often, once it is ready."""
    while not stop.wait(SAMPLE_S):
        if marks:
            sizes.append(sum(proportional_bytes(each) for each in descendants(pid)))


def compared(
    case: str, runs: Sequence[Mapping[str, float]], results: Mapping[str, Sequence[Mapping[str, float]]]
) -> Mapping[str, Any]:
    """Return medians, and the ratios to the other case that ran in the same turn."""
    facts: dict[str, Any] = {key: median(run[key] for run in runs) for key in runs[0]}
    if bare := results.get("bare"):
        ratios = [run["round_cpu_s"] / other["round_cpu_s"] for run, other in zip(runs, bare, strict=True)]
        facts |= {"over_bare": round(median(ratios), 3), "from": round(min(ratios), 3), "to": round(max(ratios), 3)}
        if case in ROUND_RATIO:
            facts |= {"target": ROUND_RATIO[case], "met": median(ratios) <= ROUND_RATIO[case]}
    if case == "processes" and (main := results.get("inprocess")):
        beyond = [run["start_cpu_s"] - other["start_cpu_s"] for run, other in zip(runs, main, strict=True)]
        facts |= {"start_beyond_cpu_s": round(median(beyond), 2), "start_target_s": START_S}
        facts |= {"start_met": median(beyond) <= START_S}
    return facts


def mark() -> None:
    """Print the processor seconds of this process and of all that descend from it, also of those that have ended."""
    print(f"mark {sum(map(cpu_seconds, descendants(os.getpid())))}", flush=True)


def descendants(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in read(task).split():
            yield from descendants(int(child))


def cpu_seconds(pid: int) -> float:
    """Return a process's own seconds and those of its children that have ended; 0 if it has ended itself."""
    # After the name, which may hold spaces and brackets: utime, stime, cutime, cstime are the 12th to 15th from there.
    fields = read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) * TICK_S


def proportional_bytes(pid: int) -> int:
    lines = read(Path(f"/proc/{pid}/smaps_rollup")).splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def read(path: Path) -> str:
    """Return a file of /proc, empty if its process has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return path.read_text()
    return ""


# In fedtune


def job(folder: str) -> Mapping[str, str]:
    content: Mapping[str, str] = json.loads((Path(folder) / "job.json").read_text())
    return content


def recipe(folder: str, *, engine: str, method: Mapping[str, Any]) -> Any:
    from fedtune.config import bind

    return bind(
        {
            "name": "peers",
            "model": {"base": job(folder)["base"], "device": "cpu", "threads": 1},
            "adapter": {"rank": RANK, "targets": TARGETS},
            "method": method,
            "client": {"steps": STEPS, "batch": BATCH, "learning_rate": RATE},
            "rounds": {"count": ROUNDS},
            "data": {
                "source": job(folder)["data"],
                "split": {"kind": "files"},
                "max_tokens": 128,
                "held_out": 0.0,
            },
            "engine": {"name": engine},
        }
    )


def fedtune(folder: str, *, engine: str = "inprocess", **method: Any) -> None:
    """Run the job as `fedtune simulate` does, without a run directory and without scores."""
    from fedtune.api import fork_server_of

    bound = recipe(folder, engine=engine, method=method or {"name": "fedit"})
    with fork_server_of(bound) as server:
        # Loaded only now, as in a run, while the fork server imports the same.
        from fedtune.runs.local import prepare, run_context, transport
        from fedtune.runs.runner import run_rounds_of

        experiment = prepare(bound)
        with transport(experiment, server) as started:
            started.clients()
            mark()
            for _ in run_rounds_of(run_context(experiment), started):
                mark()


def write_tokens(folder: str) -> None:
    """Write the clients' rows as fedtune tokenises them, for the other cases, and where the base is."""
    from fedtune.runs.local import prepare

    experiment = prepare(recipe(folder, engine="inprocess", method={"name": "fedit"}))
    rows = [[row.input_ids.tolist() for row in shard.train] for shard in experiment.federation.clients.values()]
    (Path(folder) / "tokens.json").write_text(
        json.dumps({"path": str(experiment.base.path), "pad": experiment.base.pad_id, "rows": rows})
    )


# Without it


@lru_cache(maxsize=1)
def tokens(folder: str) -> Any:
    return json.loads((Path(folder) / "tokens.json").read_text())


def load_model(folder: str) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(tokens(folder)["path"])
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(base, config).train()


resident_model = lru_cache(maxsize=1)(load_model)


def train(model: Any, folder: str, client: int, key: int) -> None:
    """Take one client's steps of one round."""
    import torch

    rows, pad = tokens(folder)["rows"][client], tokens(folder)["pad"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(len(rows))
    for step in range(STEPS):
        batch = [rows[order[(step * BATCH + place) % len(rows)]] for place in range(BATCH)]
        width = max(map(len, batch))
        ids, labels = torch.full((BATCH, width), pad), torch.full((BATCH, width), -100)
        mask = torch.zeros((BATCH, width), dtype=torch.long)
        for place, row in enumerate(batch):
            ids[place, : len(row)] = labels[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def bare(folder: str) -> None:
    """Run the job in one loop: every client starts from the mean of the factors."""
    import torch

    model = load_model(folder)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    mean = {name: parameter.detach().clone() for name, parameter in trained.items()}
    mark()
    for round in range(ROUNDS):
        total = {name: torch.zeros_like(value) for name, value in mean.items()}
        for client in range(CLIENTS):
            for name, parameter in trained.items():
                parameter.data.copy_(mean[name])
            train(model, folder, client, CLIENTS * round + client)
            for name, parameter in trained.items():
                total[name] += parameter.detach() / CLIENTS
        mean = total
        mark()


def answer_message(folder: str, model_of: Callable[[str], Any], message: Message, context: Context) -> Message:
    """Do what a ClientApp of Flower's examples does with a message."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model, client = model_of(folder), int(context.node_config["partition-id"])
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    train(model, folder, client, client)
    metrics = MetricRecord({"num-examples": len(tokens(folder)["rows"][client])})
    content = RecordDict({"arrays": ArrayRecord(get_peft_model_state_dict(model)), "metrics": metrics})
    return Message(content=content, reply_to=message)


def flower(folder: str, *, resident: bool) -> None:
    """Run the job as a Flower app on Ray, with as many workers as there are cores."""
    import logging

    from flwr.app import ArrayRecord
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from peft import get_peft_model_state_dict

    from fedtune.flower import shim

    client_app, server_app = ClientApp(), ServerApp()
    client_app.train()(partial(answer_message, folder, resident_model if resident else load_model))
    before = set[str]()

    def progress(round: int, arrays: ArrayRecord) -> None:
        """Mark the start, or the end of a round; Flower goes on without a word where no client has answered."""
        if arrays.object_id in before:
            os._exit(3)
        before.add(arrays.object_id)
        mark()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        initial = ArrayRecord(get_peft_model_state_dict(load_model(folder)))
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
        strategy.start(grid, initial, num_rounds=ROUNDS, evaluate_fn=progress)

    logging.getLogger("flwr").setLevel(logging.ERROR)
    backend = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {
            "num_cpus": len(os.sched_getaffinity(0)),
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": logging.CRITICAL,
        },
    }
    shim.simulate(server_app, client_app, clients=CLIENTS, backend=backend)


CASES: Mapping[str, Callable[[str], None]] = {
    "bare": bare,
    "inprocess": fedtune,
    "processes": partial(fedtune, engine="processes"),
    "flora reinit": partial(fedtune, name="flora", mode="reinit"),
    "flora continue": partial(fedtune, name="flora", mode="continue"),
    "flower": partial(flower, resident=False),
    "flower resident": partial(flower, resident=True),
}
"""By name: what runs the job of a folder, and calls `mark` when it is ready and after each round."""


if __name__ == "__main__":
    main()
