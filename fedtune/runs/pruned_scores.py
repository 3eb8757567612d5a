"""Scores of a run's model whole, as clients trained it, and as it is deployed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fedtune.errors import ConfigError, Fault
from fedtune.pruning.structure import ModelStructure, cuts, slice_adapter, sparsity
from fedtune.rounds.events import Note, Watch
from fedtune.runs.trained_run import TrainedRun, checked_ratios, deployed_ratios, load_run, trained_ratios

if TYPE_CHECKING:
    from fedtune.model.repair import Repair

# torch and transformers take seconds to import, so `runs.local` and `model` are imported where they are needed.

REPEATS = 5
"""Forward passes whose median time is reported; one more is run first and not counted."""


def views(
    run: Path,
    *,
    ratios: Sequence[float] | None = None,
    examples: int | None = None,
    watch: Watch = lambda event: None,
) -> Mapping[str, Any]:
    """Score a run's model in three structures: whole, as clients trained it, and as it is deployed.

    An adapter that was trained on a pruned model also makes up for the parts that are missing there, so the same
    adapter gives another loss in each structure.

    Args:
        run: the run directory.
        ratios: of the deployed models; without it those of `deployed_ratios`.
        examples: how many test examples to use; all without it.
        watch: called with a note on each model that is scored.

    Returns:
        `whole` and `deployed` (by ratio): test scores, block sparsity, parameters, milliseconds of a forward pass;
        `clients`: by client, scores on its held-out rows in the structure that it trained last.

    Raises:
        StoreError: if the folder holds no run.
        ConfigError: if the run has no ranking to prune by.
    """
    trained = load_run(run)
    recipe = trained.experiment.recipe
    pruning = recipe.pruning
    if pruning is None:
        raise ConfigError(Fault("run", "one with [pruning]", f"{run} without", "fedtune evaluate scores its model"))
    wanted = (
        checked_ratios(ratios) if ratios is not None else sorted(set(deployed_ratios(run, pruning.target).values()))
    )
    scores: dict[str, Any] = {"whole": score_ratio(trained, 0.0, examples), "deployed": {}, "clients": {}}
    for ratio in wanted:
        if ratio > 0:
            watch(Note(f"scoring the model pruned by {ratio:g}"))
            scores["deployed"][f"{ratio:g}"] = score_ratio(trained, ratio, examples)
    shards = trained.experiment.federation.clients
    for name, ratio in sorted(trained_ratios(run).items()):
        held_out = shards[name].held_out[: recipe.evaluate.client_examples] if name in shards else ()
        if held_out:
            metrics = measure_structure(trained, trained.structure(ratio), {name: held_out})[name]
            scores["clients"][name] = {"ratio": ratio, **metrics}
    return scores


def measure_structure(
    trained: TrainedRun, structure: ModelStructure | None, groups: Mapping[str, Any]
) -> Mapping[str, Mapping[str, float]]:
    """Score the global model, pruned to a structure, on groups of examples."""
    from fedtune.model import pruned_training
    from fedtune.model.evaluate import evaluate
    from fedtune.model.libraries import threads

    base, recipe, layout = trained.experiment.base, trained.experiment.recipe, trained.experiment.blueprint.anatomy
    assert layout is not None  # a run without one is not pruned
    adapter = (
        slice_adapter(trained.tuned.at(structure), cuts(structure, layout)) if structure else trained.tuned.adapter
    )
    repair = repair_in(trained)
    with threads(recipe.model.threads), pruned_training.with_pruned_model(base, structure, layout, repair) as small:
        own, preference = recipe.evaluate, recipe.client.preference
        return evaluate(small, adapter, trained.tuned.saved, groups, batch=own.batch, preference=preference)


def repair_in(trained: TrainedRun) -> Repair | None:
    """Return by what the structures of a run's base are repaired, as its clients have repaired them."""
    from fedtune.model.repair import repair_of

    base, settings, layout = (
        trained.experiment.base,
        trained.experiment.recipe.pruning,
        trained.experiment.blueprint.anatomy,
    )
    if settings is None or layout is None:
        return None
    return repair_of(base.model, trained.tuned.moments, settings, layout)


def score_ratio(trained: TrainedRun, ratio: float, examples: int | None) -> Mapping[str, float]:
    """Return test scores of the model at a ratio, and what it costs: parameters, memory, time of a forward pass."""
    from fedtune.model import pruned_training
    from fedtune.model.libraries import threads
    from fedtune.model.lora import with_adapters

    experiment, structure = trained.experiment, trained.structure(ratio)
    base, recipe, layout = experiment.base, experiment.recipe, experiment.blueprint.anatomy
    assert layout is not None  # as above
    test = experiment.federation.test[:examples]
    scores = dict(measure_structure(trained, structure, {"test": test}).get("test", {}))
    scores["sparsity"] = sparsity(structure, layout) if structure else 0.0
    adapter = (
        slice_adapter(trained.tuned.at(structure), cuts(structure, layout)) if structure else trained.tuned.adapter
    )
    repair = repair_in(trained)
    with threads(recipe.model.threads), pruned_training.with_pruned_model(base, structure, layout, repair) as small:
        sizes = [(parameter.numel(), parameter.element_size()) for parameter in small.model.parameters()]
        scores["parameters"] = sum(count for count, _ in sizes)
        scores["megabytes"] = sum(count * size for count, size in sizes) / 1e6
        with with_adapters(small, frozen=adapter, saved=trained.tuned.saved) as model:
            rows = test or next(shard.train for shard in experiment.federation.clients.values() if shard.train)
            timed = rows[: pruned_training.ROWS]
            batches = pruned_training.evaluation_batches(timed, small, batch=pruned_training.ROWS)
            scores["forward_ms"] = forward_ms(partial(pruned_training.evaluation_loss, model, batches, small))
    return scores


def forward_ms(loss: Callable[[], float]) -> float:
    """Return the median milliseconds of a forward pass; its loss is read, so that the device has finished."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        loss()
        times.append(1e3 * (time.perf_counter() - began))
    return median(times[1:])
