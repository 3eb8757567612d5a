"""Worker processes of a simulation: the base and the clients' examples are loaded once, then `client.perform` runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fedtune.client.named_trainer import own_trainer
from fedtune.client.perform import perform
from fedtune.client.personal_state import client_folder
from fedtune.data import transfer
from fedtune.data.encode import Example
from fedtune.data.loss_rows import MOST, at_most
from fedtune.errors import ConfigError, Fault
from fedtune.messages import Assignment, ClientUpdate
from fedtune.model.base import Base, load, load_tokenizer
from fedtune.model.device import choose_device
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.probing.replica import Replicas
from fedtune.simulation.fork_server import PerformBytes, Prepared, serve

TRAIN, HELD_OUT = "train/", "held_out/"
"""What precedes a client's name in the names of a payload's parts."""


def payload(
    model: ModelSettings,
    adapter: AdapterSettings,
    examples: Mapping[str, Sequence[Example]],
    *,
    root: Path,
    seed: int,
    labels: Sequence[str] = (),
    base: str = "",
    held_out: Mapping[str, Sequence[Example]] | None = None,
    personal: Path | None = None,
    trainers: Mapping[str, str] | None = None,
    trainer_folder: Path | None = None,
) -> tuple[Mapping[str, Any], Mapping[str, bytes]]:
    """Return (settings, examples by client), the arguments of `prepare` as JSON and bytes.

    Args:
        model: the recipe's table `model`.
        adapter: the recipe's table `adapter`.
        examples: training examples by client.
        root: folder that relative paths are relative to.
        seed: the run's seed.
        labels: names of the classes, for classification.
        base: digest that the base must have; empty accepts any, and that of each assignment is checked all the same.
        held_out: held-out examples by client; only as many of them are sent as losses are measured on.
        personal: folder of the clients' own models; None where none can be stored.
        trainers: by client, the name of the function that trains it in place of fedtune.
        trainer_folder: in which these may store something; None where nothing can be stored.
    """
    spec = {
        "model": asdict(model),
        "adapter": asdict(adapter),
        "root": str(root.resolve()),
        "seed": seed,
        "labels": list(labels),
        "base": base,
        "personal": str(personal.resolve()) if personal else "",
        "trainers": dict(trainers or {}),
        "trainer_folder": str(trainer_folder.resolve()) if trainer_folder else "",
    }
    parts = {f"{TRAIN}{name}": rows for name, rows in examples.items()}
    # The same rows as without worker processes, where all are at hand: drawn from no more than these, they are these.
    parts |= {f"{HELD_OUT}{name}": at_most(rows, MOST, name) for name, rows in (held_out or {}).items() if rows}
    return spec, {name: transfer.encode(rows) for name, rows in parts.items()}


def prepare(spec: Mapping[str, Any], parts: Mapping[str, memoryview]) -> Prepared:
    """Load the base on the CPU, where all worker processes share it, and the examples of every client.

    Raises:
        ConfigError: if the base cannot be loaded, or is another one.
    """
    model, adapter, root = ModelSettings(**spec["model"]), AdapterSettings(**spec["adapter"]), Path(spec["root"])
    base = load(
        # Forks share the pages of memory, but not those of a GPU.
        replace(model, device="cpu"),
        adapter,
        tokenizer=load_tokenizer(model, root),
        root=root,
        seed=spec["seed"],
        labels=spec["labels"],
    )
    if spec["base"] not in ("", base.digest):
        expected, got = f"the base of digest {spec['base'][:12]}", f"{base.digest[:12]} ({base.name})"
        raise ConfigError(Fault("model.base", expected, got, "leave the files alone while a run starts"))
    # Before the forks too, so that a fleet's examples are in memory once.
    examples = {name: transfer.decode(part) for name, part in parts.items()}
    devices = devices_of(choose_device(model.device))

    def make_worker(place: int) -> PerformBytes:
        resident, replicas = base_on_device(base, torch.device(devices[place % len(devices)])), Replicas()
        trainers, folder = spec["trainers"], spec["trainer_folder"]

        def work(assignment: Assignment, threads: int) -> ClientUpdate:
            name = assignment.plan.client
            own, held_out = examples[f"{TRAIN}{name}"], examples.get(f"{HELD_OUT}{name}", ())
            return perform(
                resident,
                own,
                assignment,
                threads=threads,
                replicas=replicas,
                held_out=held_out,
                personal=client_folder(Path(spec["personal"]), name) if spec["personal"] else None,
                own=own_trainer(
                    trainers.get(name),
                    folder=client_folder(Path(folder), name).path if folder else None,
                    quotes=True,
                ),
            )

        return work

    return Prepared(make_worker, devices)


def devices_of(chosen: torch.device) -> tuple[str, ...]:
    """Return the devices of the workers: every GPU in turn, unless the recipe names one of them."""
    if chosen.type == "cuda" and chosen.index is None:
        return tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    return (str(chosen),)


def base_on_device(base: Base, device: torch.device) -> Base:
    """Return the base on a device: on the CPU the shared one, elsewhere a copy of this worker's own."""
    return base if device.type == "cpu" else replace(base, model=base.model.to(device), device=device)


def begin(descriptor: int) -> None:
    """Be the process that loads and forks, on its end of the control socket."""
    # Makes torch ask NVIDIA's management library for the GPUs: after a call to CUDA itself, the forks could not use it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    # Before any fork: threads of a pool do not survive it, and the child would wait for them. OpenBLAS is at one thread
    # already, by the environment or since the fork, where setting a number would start threads.
    torch.set_num_threads(1)
    serve(descriptor, prepare)


if __name__ == "__main__":
    begin(int(sys.argv[-1]))
