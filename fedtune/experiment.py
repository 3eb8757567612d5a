"""A recipe made real on this machine: data and base loaded, clients bound to them, rounds run, everything recorded."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedtune.adapter import Adapter
from fedtune.client import perform
from fedtune.config import Recipe, digest, planned
from fedtune.data.federation import Federation, federate
from fedtune.errors import ConfigError, Fault, FedtuneError, StoreError
from fedtune.methods import METHODS
from fedtune.model import evaluate as scoring
from fedtune.model.base import Base, load, load_tokenizer
from fedtune.model.libraries import threads
from fedtune.planning.fixed import Fixed
from fedtune.round import Client
from fedtune.rounds import Note, RoundFinished, RoundResult, Watch
from fedtune.rounds import run as run_rounds
from fedtune.simulation.inprocess import InProcess
from fedtune.store import peft, records
from fedtune.store.run import append_round, write_summary
from fedtune.tensors import Tensors


@dataclass(frozen=True)
class Experiment:
    """Everything loaded that a recipe names."""

    recipe: Recipe
    federation: Federation
    base: Base
    planner: Fixed

    @property
    def fleet(self) -> Mapping[str, int]:
        """Training examples by client, sorted by name."""
        return {name: len(shard.train) for name, shard in sorted(self.federation.clients.items())}

    @property
    def target(self) -> peft.Target:
        """What an adapter of this experiment says of its base."""
        return peft.Target(
            base=self.base.path,
            revision=self.recipe.model.revision,
            task=self.base.task,
            fan_in_fan_out=self.base.transposed,
            saved_modules=self.base.saved_modules,
        )


def prepare(recipe: Recipe) -> Experiment:
    """Load data and base, and check what can only be checked against them.

    Raises:
        ConfigError: if a file, column, module or client that the recipe names does not exist, or a rank does not fit.
    """
    tokenizer = load_tokenizer(recipe.model, recipe.root)
    federation = federate(recipe.data, tokenizer=tokenizer, task=recipe.model.task, seed=recipe.seed, root=recipe.root)
    plans = {name: planned(recipe, name) for name in federation.clients}
    faults = [
        Fault(
            path="override.clients",
            expected=f"names or patterns of clients ({', '.join(sorted(plans)[:8])}{', ...' * (len(plans) > 8)})",
            got=f"{list(override.clients)}, which match none",
        )
        for override in recipe.override
        if not any(override.covers(name) for name in plans)
    ]
    if faults:
        raise ConfigError(faults)
    base = load(
        recipe.model,
        recipe.adapter,
        tokenizer=tokenizer,
        root=recipe.root,
        seed=recipe.seed,
        labels=federation.labels,
    )
    check_lengths(federation, base)
    check_ranks({name: rank for name, (rank, _) in plans.items()}, base)
    planner = Fixed(
        ranks={name: rank for name, (rank, _) in plans.items()},
        alpha=recipe.adapter.alpha,
        rslora=recipe.adapter.rslora,
        training={name: training for name, (_, training) in plans.items()},
    )
    return Experiment(recipe=recipe, federation=federation, base=base, planner=planner)


def check_lengths(federation: Federation, base: Base) -> None:
    """Refuse examples that are longer than the base has positions.

    Raises:
        ConfigError: with the longest one.
    """
    shards = federation.clients.values()
    every = [*federation.test, *(example for shard in shards for example in (*shard.train, *shard.held_out))]
    longest = max(len(example.input_ids) for example in every)
    if longest > base.positions:
        raise ConfigError(
            Fault(
                path="data.max_tokens",
                expected=f"examples of at most {base.positions} tokens, the positions that {base.name} has",
                got=f"one of {longest}",
                hint=f"set data.max_tokens = {base.positions}",
            )
        )


def check_ranks(ranks: Mapping[str, int], base: Base) -> None:
    """Refuse a rank above the smaller side of a layer: more columns than that add parameters and nothing else.

    Raises:
        ConfigError: naming the smallest layer and a client that asks too much.
    """
    module, shape = min(base.modules.items(), key=lambda item: min(item[1]))
    client, rank = max(ranks.items(), key=lambda item: item[1])
    if rank > min(shape):
        raise ConfigError(
            Fault(
                path="adapter.rank",
                expected=f"at most {min(shape)}, the smaller side of {module} {shape}",
                got=f"{rank} for {client}",
                hint="lower the rank, or leave that layer out of adapter.targets",
            )
        )


@dataclass(frozen=True)
class Scored:
    """Scores of one global model."""

    test: Mapping[str, float] | None
    held_out: Mapping[str, Mapping[str, float]]


def score(experiment: Experiment, adapter: Adapter, saved: Tensors, *, test: bool, clients: bool) -> Scored:
    """Score the base with an adapter on the test data, on each client's held-out rows, or on both."""
    settings, federation = experiment.recipe.evaluate, experiment.federation
    measure = partial(scoring.evaluate, experiment.base, adapter, saved, batch=settings.batch)
    on_test = measure(
        {"test": federation.test[: settings.examples]} if test else {},
        generate=settings.generate,
        new_tokens=settings.new_tokens,
    )
    shards = sorted(federation.clients.items()) if clients and settings.clients else []
    held_out = measure({name: shard.held_out[: settings.client_examples] for name, shard in shards})
    return Scored(test=on_test.get("test"), held_out=held_out)


def conduct(experiment: Experiment, run: Path, watch: Watch) -> Mapping[str, Any]:
    """Run the rounds, record each of them in the run directory, and return the summary.

    When a round cannot be completed, or on Ctrl-C, the rounds that were completed stay: their lines, the last
    adapter, and a summary that says so; then the exception goes on.
    """
    for note in experiment.federation.notes:
        watch(Note(note))
    began, lines = time.perf_counter(), list[Mapping[str, Any]]()

    def close(reason: str) -> Mapping[str, Any]:
        with threads(experiment.recipe.model.threads):
            result = summary(experiment, run, lines, reason=reason, seconds=time.perf_counter() - began)
        write_summary(run, result)
        return result

    try:
        with threads(experiment.recipe.model.threads):
            lines.append(record_base(experiment, run))
            watch(RoundFinished(lines[-1]))
            for result in rounds(experiment, watch):
                lines.append(record_round(experiment, run, result, lines))
                watch(RoundFinished(lines[-1]))
    except (KeyboardInterrupt, FedtuneError) as stop:
        reason = "Ctrl-C" if isinstance(stop, KeyboardInterrupt) else str(stop)
        if lines:
            with suppress(StoreError):  # a full disk: what stopped the run is told, not what came of it
                close(reason)
            watch(Note(f"stopped after round {lines[-1]['round']}; {run} holds everything up to there"))
        raise
    return close("")


def rounds(experiment: Experiment, watch: Watch) -> Iterator[RoundResult]:
    """Run the recipe's rounds in this process."""
    recipe, base, shards = experiment.recipe, experiment.base, experiment.federation.clients
    fleet = experiment.fleet
    transport = InProcess(
        fleet=[Client(name=name, num_examples=count) for name, count in fleet.items()],
        work={name: partial(perform, base, shards[name].train) for name in fleet},
    )
    return run_rounds(
        method=METHODS[recipe.method.name],
        settings=recipe.method,
        planner=experiment.planner,
        transport=transport,
        schedule=recipe.rounds,
        blueprint=base.blueprint(max_rank=max(experiment.planner.ranks.values()), seed=recipe.seed),
        base=base.digest,
        watch=watch,
    )


def record_base(experiment: Experiment, run: Path) -> Mapping[str, Any]:
    """Score the base before any training; the line of round 0."""
    began = time.perf_counter()
    scored = score(experiment, {}, experiment.base.saved_tensors(), test=True, clients=True)
    record = records.base_record(scored.test, scored.held_out, time.perf_counter() - began)
    append_round(run, record)
    return record


def record_round(
    experiment: Experiment, run: Path, result: RoundResult, lines: list[Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Score the state as the recipe asks, write the round's line and the adapter, and return the line."""
    recipe, method = experiment.recipe, METHODS[experiment.recipe.method.name]
    adapter, saved = method.adapter(result.state), result.state.saved
    last, every = result.round == recipe.rounds.count, recipe.evaluate.every
    scored = score(experiment, adapter, saved, test=last or (every > 0 and result.round % every == 0), clients=last)
    record = records.round_record(
        result,
        adapter,
        energy_kept=method.energy_kept(result.state),
        examples=experiment.fleet,
        test=scored.test,
        held_out=scored.held_out,
    )
    peft.write(run / "adapter", adapter, saved, experiment.target, provenance(experiment, adapter, [*lines, record]))
    append_round(run, record)
    return record


def provenance(experiment: Experiment, adapter: Adapter, lines: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return what travels inside an adapter folder: where it came from, and what it cost."""
    recipe = experiment.recipe
    return {
        "fedtune": version("fedtune"),
        "name": recipe.name,
        "recipe": digest(recipe),
        "method": recipe.method.name,
        "seed": recipe.seed,
        "round": lines[-1]["round"],
        "base": {"name": experiment.base.name, "digest": experiment.base.digest},
        "clients": {
            name: {"examples": total["examples"], "rank": total["rank"]}
            for name, total in records.clients_summary(lines, experiment.fleet).items()
        },
        "modules": {name: factors.rank for name, factors in sorted(adapter.items())},
        "bytes_down": sum(line["bytes_down"] for line in lines),
        "bytes_up": sum(line["bytes_up"] for line in lines),
    }


def summary(
    experiment: Experiment, run: Path, lines: list[Mapping[str, Any]], *, reason: str, seconds: float
) -> Mapping[str, Any]:
    """Return what a run says of itself; a reason says why it stopped before its last round."""
    recipe, base = experiment.recipe, experiment.base
    scored = [line for line in lines if line["test"] is not None]
    after = scored[-1] if scored else lines[-1]
    return {
        "name": recipe.name,
        "method": recipe.method.name,
        "seed": recipe.seed,
        "rounds": lines[-1]["round"],
        "state": "interrupted" if reason else "finished",
        "reason": reason,
        "base": {
            "name": base.name,
            "digest": base.digest,
            "parameters": sum(parameter.numel() for parameter in base.model.parameters()),
        },
        "trainable": max(experiment.planner.ranks.values()) * sum(m + n for m, n in base.modules.values())
        + sum(tensor.size for tensor in base.saved_tensors().values()),
        "before": records.scores(lines[0]["test"], lines[0]["held_out"]),
        "after": records.scores(after["test"], lines[-1]["held_out"]),
        "clients": records.clients_summary(lines, experiment.fleet),
        "bytes_down": sum(line["bytes_down"] for line in lines),
        "bytes_up": sum(line["bytes_up"] for line in lines),
        "seconds": seconds,
        "sample": sample(experiment, run) if not reason else None,
        "failures": records.failures(lines),
        "recipe_digest": digest(recipe),
        "adapter_digest": peft.digest(run / "adapter") if (run / "adapter").exists() else "",
        "versions": {name: version(name) for name in ("fedtune", "torch", "transformers", "peft", "numpy")}
        | {"python": platform.python_version()},
        "machine": {
            "device": str(base.device),
            "threads": recipe.model.threads,
            "platform": platform.platform(),
        },
    }


def sample(experiment: Experiment, run: Path) -> Mapping[str, str] | None:
    """Continue the recipe's prompt with the base and with the adapter of the run; None without a prompt."""
    settings, base = experiment.recipe.evaluate, experiment.base
    if settings.prompt is None:
        return None
    adapter, saved, _ = peft.read(run / "adapter")
    continued = partial(scoring.sample, base, prompt=settings.prompt, new_tokens=settings.new_tokens)
    return {"prompt": settings.prompt, "before": continued({}, {}), "after": continued(adapter, saved)}
