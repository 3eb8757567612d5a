"""How recipes differ: by paired differences of losses with their intervals, in their settings, and in their data."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from fedtune.errors import StoreError
from fedtune.report.curves import evaluations
from fedtune.report.reader import Run, finite
from fedtune.report.time_to_target import T_975
from fedtune.store.run_journal import RunJournal

MEASURES: Mapping[str, str] = {"test": "test loss", "clients": "held-out loss"}
"""Of what a difference may be, the better measure first."""
SILENT = ("name", "seed", "engine.", "report.")
"""Settings that change no result, or that distinguish the runs of one recipe."""


@dataclass(frozen=True)
class Interval:
    """The mean of paired differences with its 95 % interval by Student's t."""

    mean: float
    low: float
    """NaN for fewer than two pairs, as is `high`."""
    high: float
    pairs: int


@dataclass(frozen=True)
class Difference:
    """By how much one recipe's loss is above the first recipe's; below zero is better."""

    recipe: str
    measure: str
    """test loss | held-out loss"""
    paired_by: str
    """seed | client: what the two losses of a pair share."""
    interval: Interval


Group = Sequence[Run]
"""The runs of one recipe, one per seed."""


def differences(groups: Sequence[Group]) -> Sequence[Difference]:
    """Return each later recipe's difference to the first one, where they share what can be paired.

    With two shared seeds or more the losses on the test data are paired by seed. With one, those of the clients'
    held-out rows are paired by client: their spread says how equal clients are, not how seeds vary.
    """
    return [difference for other in groups[1:] if (difference := difference_of(groups[0], other)) is not None]


def difference_of(first: Group, other: Group) -> Difference | None:
    """Return one recipe's difference to the first; None if nothing of them can be paired."""
    pairs = [(left, right) for left in first for right in other if left.seed == right.seed]
    name = other[0].name
    tested = [test_loss(right) - test_loss(left) for left, right in pairs]
    tested = [gap for gap in tested if not math.isnan(gap)]
    clients = client_gaps(*pairs[0]) if len(pairs) == 1 else []
    if len(tested) == 1 and len(clients) > 1:
        return Difference(name, MEASURES["clients"], "client", interval(clients))
    if tested:
        return Difference(name, MEASURES["test"], "seed", interval(tested))
    return Difference(name, MEASURES["clients"], "client", interval(clients)) if clients else None


def test_loss(run: Run) -> float:
    scores = evaluations(run)[1].test
    return finite(scores.loss) if scores else math.nan


def client_gaps(left: Run, right: Run) -> Sequence[float]:
    """Return the difference of the losses of every client that two runs scored."""
    before, after = (evaluations(run)[1].held_out for run in (left, right))
    gaps = [finite(after[name].loss) - finite(before[name].loss) for name in sorted(before.keys() & after.keys())]
    return [gap for gap in gaps if not math.isnan(gap)]


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of differences with its 95 % interval.

    >>> interval([1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0, pairs=2)
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    half = T_975[min(count - 1, len(T_975)) - 1] * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def settings_table(groups: Sequence[Group]) -> Mapping[str, Sequence[str]]:
    """Return each setting that is not the same in all recipes, with its value in each; a dash where it is not there."""
    tables = [dict(leaves(tomllib.loads(group[0].recipe))) for group in groups]
    keys = sorted({key for table in tables for key in table})
    values = {key: [table.get(key, "-") for table in tables] for key in keys if not key.startswith(SILENT)}
    return {key: texts for key, texts in values.items() if len(set(texts)) > 1}


def leaves(table: Mapping[str, object], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the settings of nested tables by dotted key, their values as text."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield (
                f"{path}{key}",
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str),
            )


def warnings(groups: Sequence[Group]) -> Sequence[str]:
    """Return why losses of the recipes cannot be set against each other, one sentence for each recipe and reason."""
    first = groups[0]
    differing = [fault for other in groups[1:] for fault in faults(first, other)]
    unfinished = [
        f"{run.name}, seed {run.seed}, did not finish" for group in groups for run in group if run.state != "finished"
    ]
    return [*differing, *unfinished]


def faults(first: Group, other: Group) -> Iterator[str]:
    """Yield in what a recipe's base, test data and rows are not the first one's."""
    names = f"{first[0].name} and {other[0].name}"
    bases = [base_digest(group[0]) for group in (first, other)]
    if all(bases) and bases[0] != bases[1]:
        yield f"{names} have other bases (digests {bases[0][:12]} and {bases[1][:12]}): losses do not compare"
        return
    for left in first:
        for right in other:
            if left.seed != right.seed:
                continue
            if not same_test(left, right):
                yield f"{names}, seed {left.seed}: the test data differ: test losses do not compare"
                return
            data = [data_digest(run) for run in (left, right)]
            if all(data) and data[0] != data[1]:
                yield f"{names}, seed {left.seed}: the clients hold other rows"
                return


def base_digest(run: Run) -> str:
    return run.summary.base.digest if run.summary else ""


def same_test(left: Run, right: Run) -> bool:
    """Return whether two runs over the same base were scored on the same test data, as far as they recorded it.

    The loss of the base, before any training, is a fingerprint of its examples.
    """
    ours, theirs = (evaluations(run)[0].test for run in (left, right))
    if ours is None or theirs is None:
        return True
    if (ours.examples, ours.tokens) != (theirs.examples, theirs.tokens):
        return False
    losses = finite(ours.loss), finite(theirs.loss)
    return any(map(math.isnan, losses)) or math.isclose(*losses, rel_tol=1e-3)


def data_digest(run: Run) -> str:
    """Return the digest of all rows of a run; empty where its journal does not say."""
    with suppress(StoreError):
        return str(RunJournal.inputs(run.path).get("data", ""))
    return ""
