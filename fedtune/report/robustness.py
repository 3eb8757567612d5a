"""Robustness: how a recipe stands up to clients that fail, and how it serves the clients that it serves worst."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.report.curves import evaluations, training_rounds
from fedtune.report.differences import SILENT, Group, leaves
from fedtune.report.reader import Run, finite
from fedtune.report.spread import Spread, mean_and_spread
from fedtune.rounds import worst_tenth as worst_tenths

CONDITIONS = ("fleet.", "device")
"""Settings that say on which devices a recipe runs, and change nothing else about it."""


@dataclass(frozen=True)
class Robustness:
    """How one recipe stands up to clients that fail, and how it serves those it serves worst."""

    lost_updates: Spread
    """Share of the updates that clients were asked for and that were not used: failed, refused or late."""
    worst_tenth: Spread
    """Mean loss of the tenth of clients (at least one) with the highest losses on their held-out rows, after."""
    calm: str
    """The earlier recipe that differs from this one in its devices alone; empty if none does."""
    gain_kept: Spread
    """Of what that one improved on the base, the share that this one improved, paired by seed."""


def robustness_of(groups: Sequence[Group], index: int) -> Robustness:
    group = groups[index]
    calm = next((other for other in groups[:index] if differ_in_devices_alone(other[0], group[0])), None)
    shares = [
        gain(run) / gain(other) if gain(other) > 0 else math.nan
        for run in group
        for other in calm or ()
        if run.seed == other.seed
    ]
    return Robustness(
        lost_updates=mean_and_spread([lost_updates(run) for run in group]),
        worst_tenth=mean_and_spread([worst_tenth(run) for run in group]),
        calm=calm[0].name if calm else "",
        gain_kept=mean_and_spread(shares),
    )


def lost_updates(run: Run) -> float:
    """Return the share of the updates that clients were asked for and that were not used; NaN without any."""
    asked = [
        client.status
        for record in training_rounds(run)
        for client in record.clients.values()
        if client.status != "unfit"  # those had no assignment
    ]
    return sum(status != "ok" for status in asked) / len(asked) if asked else math.nan


def worst_tenth(run: Run) -> float:
    """Return the mean loss of the tenth of clients with the highest losses after the run; NaN for fewer than two."""
    tenth = worst_tenths.worst_tenth({n: {"loss": own.loss} for n, own in evaluations(run)[1].held_out.items()})
    return math.nan if tenth is None else tenth.mean


def gain(run: Run) -> float:
    """Return by how much the loss on the test data, or else the clients' mean, fell; NaN where it was not measured."""
    before, after = evaluations(run)
    for old, new in ((before.test, after.test), (before.mean, after.mean)):
        if old and new:
            return finite(old.loss) - finite(new.loss)
    return math.nan


def differ_in_devices_alone(first: Run, other: Run) -> bool:
    """Return whether two recipes are the same but for the devices that their clients are taken to be."""
    tables = [dict(leaves(tomllib.loads(run.recipe))) for run in (first, other)]
    differing = {
        key
        for key in tables[0].keys() | tables[1].keys()
        if tables[0].get(key) != tables[1].get(key) and not key.startswith(SILENT)
    }
    return bool(differing) and all(key.startswith(CONDITIONS) for key in differing)
