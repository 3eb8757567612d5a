"""HumanEval: completions by the model, each run with its tests in a process of its own, and pass@k."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from fedtune.errors import ConfigError, Fault
from fedtune.evaluation import humaneval, intervals
from fedtune.evaluation.items import Problem
from fedtune.evaluation.sandbox import Limits, Outcome, check_confinement, run_program
from fedtune.seeds import derive

if TYPE_CHECKING:
    from fedtune.model.base import Base

# torch and transformers take seconds to import, so `model` is imported where it is needed.


@dataclass(frozen=True)
class CodeSettings:
    """How generated programs are sampled and run."""

    allowed: bool = False
    """Whether the user lets programs run that the model has written."""
    samples: int = 1
    """Completions of each problem."""
    temperature: float | None = None
    """Of sampling; None is greedy for one sample, and 0.8 for more (the paper's for pass@100)."""
    limits: Limits = field(default_factory=Limits)

    @property
    def heat(self) -> float:
        """The temperature that is used."""
        return (0.8 if self.samples > 1 else 0.0) if self.temperature is None else self.temperature


def check_code(settings: CodeSettings, names: Sequence[str]) -> None:
    """Refuse to run programs that the user has not allowed, or that cannot be confined here.

    Raises:
        ConfigError: before any model is loaded.
    """
    if "humaneval" not in names:
        if settings != CodeSettings():
            expected = "--tasks humaneval beside the options of generated programs"
            raise ConfigError(Fault("--tasks", expected, ", ".join(names)))
        return
    if not settings.allowed:
        hint = "they run in a process of their own, with limits and without a network"
        expected = "--allow-code-execution, because it runs programs that the model writes"
        raise ConfigError(Fault("--tasks humaneval", expected, "none", hint))
    if settings.samples > 1 and settings.heat == 0:
        raise ConfigError(Fault("--temperature", "above 0 for several samples: greedy ones are all alike", "0"))
    check_confinement(settings.limits)


def run_tests(
    net: Any,
    base: Base,
    items: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    settings: CodeSettings,
    *,
    new_tokens: int,
    batch: int,
    progress: Callable[[int], None],
) -> Sequence[Sequence[Outcome]]:
    """Return for each problem what became of the completions of one model."""
    from fedtune.model.answers import continuations

    outcomes: list[list[Outcome]] = [[] for _ in items]
    for sample in range(settings.samples):
        texts = continuations(
            net,
            base,
            prompts,
            new_tokens=new_tokens,
            stop=humaneval.STOP,
            batch=batch,
            temperature=settings.heat,
            seed=derive(0, "evaluate.samples", sample),
        )
        programs = [humaneval.program(item, text) for item, text in zip(items, texts, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            results = workers.map(partial(run_program, limits=settings.limits), programs)
            for own, outcome in zip(outcomes, results, strict=True):
                own.append(outcome)
        progress((sample + 1) * len(items) // settings.samples)
    return outcomes


def code_result(views: Mapping[str, Sequence[Sequence[Outcome]]], settings: CodeSettings) -> Mapping[str, Any]:
    """Return pass@k for 1, 10 and 100 as far as there are samples, and how many programs ran out of what.

    A program that ran out of memory says nothing about its answer: it is counted, and is no sample. A problem that has
    fewer than k samples left in any of the views is left out of all, so that they have the same items.
    """
    counts = {view: [(num_scored(own), own.count("passed")) for own in outcomes] for view, outcomes in views.items()}
    measures = {}
    for k in (k for k in (1, 10, 100) if k <= settings.samples):
        places = [
            place
            for place in range(len(next(iter(counts.values()))))
            if all(own[place][0] >= k for own in counts.values())
        ]
        if not places:
            continue
        values = {view: [humaneval.pass_at_k(*own[place], k) for place in places] for view, own in counts.items()}
        binary = settings.samples == 1
        estimates = {view: asdict((intervals.share if binary else intervals.mean)(own)) for view, own in values.items()}
        if len(values) == 2:
            estimates["difference"] = asdict(intervals.difference(*values.values()))
        measures[f"pass@{k}"] = estimates
    return {
        "samples": settings.samples,
        "temperature": settings.heat,
        "limits": asdict(settings.limits),
        "out_of_memory": {view: total(own, "memory") for view, own in views.items()},
        "timeouts": {view: total(own, "timeout") for view, own in views.items()},
        "measures": measures,
    }


def num_scored(outcomes: Sequence[Outcome]) -> int:
    return len(outcomes) - outcomes.count("memory")


def total(outcomes: Sequence[Sequence[Outcome]], outcome: Outcome) -> int:
    return sum(own.count(outcome) for own in outcomes)
