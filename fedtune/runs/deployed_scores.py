"""What a deployed model scores and costs, measured on the exported files as a device loads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.runs.trained_run import TrainedRun

if TYPE_CHECKING:
    from fedtune.model.base import Base

# torch and transformers take seconds to import, so `model` is imported where it is needed.


def exported_scores(trained: TrainedRun, folder: Path, *, dtype: Any) -> Mapping[str, Any]:
    """Return what the model of a folder scores and costs, in a number format; see `model_scores`."""
    from fedtune.model.deployed import load

    base = trained.experiment.base
    return model_scores(trained, replace(base, model=load(folder, dtype=dtype, device=base.device), dtype=dtype))


def whole_scores(trained: TrainedRun) -> Mapping[str, Any]:
    """Return the same of the whole model, for comparison."""
    return model_scores(trained, trained.experiment.base, adapted=True)


def model_scores(trained: TrainedRun, base: Base, *, adapted: bool = False) -> Mapping[str, Any]:
    """Return a model's test scores, its size, and the time that it takes here.

    Args:
        trained: the run.
        base: the model to score.
        adapted: the run's change is not in its weights yet.

    Returns:
        `scores` on the run's test data, as `fedtune.evaluate` gives them; none without test data. `parameters` and
        `megabytes` of the weights; and what `latency.latency` measures.
    """
    from fedtune.model.evaluate import evaluate
    from fedtune.model.latency import latency
    from fedtune.model.libraries import threads

    experiment, settings = trained.experiment, trained.experiment.recipe.evaluate
    adapter, saved = (trained.tuned.adapter, trained.tuned.saved) if adapted else ({}, {})
    test = experiment.federation.test[: settings.examples]
    first = (test or next(iter(experiment.federation.clients.values())).train)[0]
    # By their places in memory: shared weights, such as tied embeddings, are there once.
    sizes = {p.data_ptr(): (p.numel(), p.element_size()) for p in base.model.parameters()}.values()
    preference = experiment.recipe.client.preference
    with threads(experiment.recipe.model.threads):
        scores = evaluate(base, adapter, saved, {"test": test}, batch=settings.batch, preference=preference)
        return {
            "scores": dict(scores.get("test", {})),
            "parameters": sum(count for count, _ in sizes),
            "megabytes": round(sum(count * size for count, size in sizes) / 1e6, 3),
            **latency(base, adapter, saved, first.input_ids),
        }
