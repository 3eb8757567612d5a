"""What the settings of a recipe must satisfy together, beyond each one's own range."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from fedtune.config.recipe import Override
from fedtune.config.words import listed, nearest, shown
from fedtune.errors import Fault
from fedtune.methods import METHODS

Check: TypeAlias = tuple[tuple[str, ...], Callable[..., Iterator[Fault]]]
"""The dotted keys a check reads, and the check over their values."""

SPLIT_KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # kind -> what it needs, what it may have
    "key": (("by",), ("clients",)),
    "iid": (("clients",), ()),
    "dirichlet": (("by", "clients", "alpha"), ()),
    "sizes": (("sizes",), ()),
    "files": ((), ("clients",)),
}

TEMPLATES = ("alpaca", "chat", "plain")


def check(values: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield the faults of all checks whose keys were bound.

    Args:
        values: the bound values by dotted key, defaults included; a key that is itself at fault is missing, and
            checks that read it are left out.
    """
    for keys, rule in CHECKS:
        if all(key in values for key in keys):
            yield from rule(*(values[key] for key in keys))


def steps_or_epochs(steps: int | None, epochs: float | None) -> Iterator[Fault]:
    if (steps is None) == (epochs is None):
        got = "neither" if steps is None else f"steps = {steps} and epochs = {epochs}"
        yield Fault("client", "exactly one of steps and epochs", got, 'write, say, "steps = 20"')


def momentum_of(optimizer: str, momentum: float) -> Iterator[Fault]:
    if optimizer != "sgd" and momentum > 0:
        yield Fault("client.momentum", f"0 with optimizer {optimizer!r}", str(momentum), 'or set optimizer = "sgd"')


def split_keys(kind: str, by: object, clients: object, alpha: object, sizes: object) -> Iterator[Fault]:
    given = {"by": by, "clients": clients, "alpha": alpha, "sizes": sizes}
    needed, allowed = SPLIT_KEYS[kind]
    for key, value in given.items():
        if value is None and key in needed:
            yield Fault(f"data.split.{key}", f"a value, as split kind {kind!r} needs one", "nothing")
        if value is not None and key not in needed + allowed:
            yield Fault(f"data.split.{key}", f"no value with split kind {kind!r}", shown(value), "leave it out")


def cohort_size(cohort: int | float | None, least: int) -> Iterator[Fault]:
    if isinstance(cohort, float) and cohort > 1:
        yield Fault(
            "rounds.cohort", "a whole number of clients or a share of at most 1", str(cohort), "1.0 takes all clients"
        )
    if isinstance(cohort, int) and least > cohort:
        yield Fault("rounds.min_clients", f"at most rounds.cohort = {cohort}", str(least))


def fleet_size(
    kind: str, clients: int | None, sizes: Sequence[int] | None, cohort: int | float | None, least: int
) -> Iterator[Fault]:
    fleet = len(sizes) if kind == "sizes" and sizes else clients if kind in ("iid", "dirichlet") else None
    if fleet is None:
        return  # key and files: known only when the data are read
    if isinstance(cohort, int) and cohort > fleet:
        yield Fault("rounds.cohort", f"at most the {fleet} clients of data.split", str(cohort))
    elif least > fleet:
        yield Fault("rounds.min_clients", f"at most the {fleet} clients of data.split", str(least))


def one_rank(method: str, rank: int, overrides: Sequence[Override]) -> Iterator[Fault]:
    if METHODS[method].ranks != "equal":
        return
    ranks = {rank}
    for override in overrides:
        if override.rank is not None:
            ranks = {override.rank} if "*" in override.clients else ranks | {override.rank}
    if len(ranks) > 1:
        mixed = sorted(name for name, other in METHODS.items() if other.ranks != "equal")
        hint = f"use {listed(mixed, joint='or')}, or one rank" if mixed else "give all clients one rank"
        yield Fault(
            "method", f"one rank, as method {method!r} needs", f"overrides that ask for {listed(sorted(ranks))}", hint
        )


def causal_only(task: str, packing: bool, generate: int) -> Iterator[Fault]:
    if task == "causal":
        return
    if packing:
        yield Fault("data.packing", f"false with model.task = {task!r}", "true", "only causal models read packed rows")
    if generate:
        yield Fault("evaluate.generate", f"0 with model.task = {task!r}", str(generate), "only causal models write")


def parts_of(task: str, fields: Mapping[str, str]) -> Iterator[Fault]:
    if task == "classification" and "output" in fields and "label" not in fields:
        yield Fault(
            "data.fields.label",
            "the column of the class, with model.task = 'classification'",
            "nothing",
            f"write label = {fields['output']!r} in place of output",
        )
    if task == "causal" and "label" in fields:
        yield Fault(
            "data.fields.label",
            "no entry with model.task = 'causal'",
            shown(fields["label"]),
            'map output, or set model.task = "classification"',
        )


def some_source(source: str | Sequence[str]) -> Iterator[Fault]:
    if not source or "" in ((source,) if isinstance(source, str) else source):
        yield Fault("data.source", "at least one file, folder or hub name, none of them empty", shown(source))


def template_text(template: str) -> Iterator[Fault]:
    if template not in TEMPLATES and not template.endswith("{output}"):
        meant = nearest(template, TEMPLATES)
        yield Fault(
            "data.template",
            f"{listed(TEMPLATES, joint='or')}, or a text that ends in {{output}}",
            shown(template),
            f"did you mean {meant!r}?" if meant else "",
        )


def device_name(device: str) -> Iterator[Fault]:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        yield Fault("model.device", "auto, cpu, cuda, cuda:<number> or mps", shown(device))


def in_full_or_adapted(targets: Sequence[str], in_full: Sequence[str]) -> Iterator[Fault]:
    if not targets:
        yield Fault("adapter.targets", "at least one module", "an empty list", 'targets = ["all-linear"] takes all')
    for module in sorted(set(targets) & set(in_full)):
        yield Fault(
            "adapter.modules_to_save", "modules that are not targets as well", shown(module), "keep it in one list"
        )


CHECKS: Sequence[Check] = (
    (("client.steps", "client.epochs"), steps_or_epochs),
    (("client.optimizer", "client.momentum"), momentum_of),
    (("data.split.kind", "data.split.by", "data.split.clients", "data.split.alpha", "data.split.sizes"), split_keys),
    (("rounds.cohort", "rounds.min_clients"), cohort_size),
    (
        ("data.split.kind", "data.split.clients", "data.split.sizes", "rounds.cohort", "rounds.min_clients"),
        fleet_size,
    ),
    (("method.name", "adapter.rank", "override"), one_rank),
    (("model.task", "data.packing", "evaluate.generate"), causal_only),
    (("model.task", "data.fields"), parts_of),
    (("data.source",), some_source),
    (("data.template",), template_text),
    (("model.device",), device_name),
    (("adapter.targets", "adapter.modules_to_save"), in_full_or_adapted),
)
