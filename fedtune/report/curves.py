"""The numbers behind plots and tables, computed from a run's records: losses, traffic and time by round."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtune.report.reader import ClientScores, Evaluation, Run, Scores, finite, loss_of, scores_of
from fedtune.report.units import number_text
from fedtune.rounds.record import RoundRecord

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LossCurve:
    """Every array is (rounds,); a loss that was not measured is NaN."""

    rounds: Floats
    bytes: Floats
    """Up and down, all clients, from the start until the end of the round."""
    seconds: Floats
    """From the start until the end of the round."""
    clock: Floats
    """Simulated or measured seconds of the fleet until the end of the round."""
    test: Floats
    deployed: Floats
    """Test loss of the model as it is deployed, where that is a smaller one."""
    mean: Floats
    """Plain mean of the clients' held-out losses."""
    best: Floats
    worst: Floats
    training: Floats
    """Mean over the cohort of the clients' losses after their local steps."""


def loss_curve(run: Run) -> LossCurve:
    held_out = [[loss_of(metrics) for metrics in record.held_out.values()] for record in run.rounds]
    known = [[loss for loss in losses if not math.isnan(loss)] for losses in held_out]
    return LossCurve(
        rounds=np.array([record.round for record in run.rounds], dtype=np.float64),
        bytes=np.cumsum([float(record.bytes_up + record.bytes_down) for record in run.rounds]),
        seconds=np.cumsum([record.seconds for record in run.rounds]),
        clock=np.array([record.clock_s for record in run.rounds]),
        deployed=np.array([loss_of(record.deployed) for record in run.rounds]),
        test=np.array([loss_of(record.test) for record in run.rounds]),
        mean=np.array([float(np.mean(losses)) if losses else math.nan for losses in known]),
        best=np.array([min(losses, default=math.nan) for losses in known]),
        worst=np.array([max(losses, default=math.nan) for losses in known]),
        training=np.array([finite(record.loss_after) for record in run.rounds]),
    )


def last(losses: Floats) -> float:
    """Return the last loss that was measured; NaN for none."""
    known = losses[~np.isnan(losses)]
    return float(known[-1]) if known.size else math.nan


LONG_AGO = 0.3
"""Share of a run's evaluations after its best one from which the model counts as no longer improving."""


def stall_text(run: Run) -> str:
    """Return a sentence where the whole model's loss has long been above its best; empty where it has not.

    With pruning this is easily missed: the model that is deployed may go on improving.
    """
    curve = loss_curve(run)
    losses = curve.test if not np.isnan(curve.test).all() else curve.mean
    known = np.flatnonzero(~np.isnan(losses))
    if len(known) < 4:
        return ""
    best = known[int(np.argmin(losses[known]))]
    later = known[known > best]
    if len(later) < max(2, LONG_AGO * len(known)):
        return ""
    text = (
        f"The whole model has not improved since round {curve.rounds[best]:.0f}: its loss was "
        f"{number_text(float(losses[best]))} there, and is {number_text(float(losses[known[-1]]))} after round "
        f"{curve.rounds[known[-1]]:.0f}."
    )
    deployed = curve.deployed[~np.isnan(curve.deployed)]
    if len(deployed) > 1 and deployed[-1] < deployed[0]:
        text += (
            f" What was learned since serves the pruned model alone ({number_text(float(deployed[0]))} to "
            f"{number_text(float(deployed[-1]))})."
        )
    return text


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a sorting key under which client-2 is before client-10."""
    parts = re.split(r"([0-9]+)", name)
    return tuple((0, int(part)) if index % 2 else (1, part) for index, part in enumerate(parts))


def client_names(run: Run) -> list[str]:
    """Return every client that the run mentions, in natural order."""
    names: set[str] = set(run.summary.clients) if run.summary else set()
    for record in run.rounds:
        names.update(record.clients, record.cohort, record.held_out)
    return sorted(names, key=natural)


def training_rounds(run: Run) -> list[RoundRecord]:
    return [record for record in run.rounds if record.round > 0]


def gains(run: Run, names: list[str]) -> Floats:
    """Return (clients, training rounds): how much each client's loss on the same rows fell; NaN without an update."""
    rounds = training_rounds(run)
    table = np.full((len(names), len(rounds)), math.nan)
    row = {name: index for index, name in enumerate(names)}
    for column, record in enumerate(rounds):
        for name, client in record.clients.items():
            if client.status == "ok":
                table[row[name], column] = finite(client.loss_before) - finite(client.loss_after)
    return table


def evaluations(run: Run) -> tuple[Evaluation, Evaluation]:
    """Return the global model before and after: the summary's, or the first and last round that was evaluated."""
    if run.summary:
        return run.summary.before, run.summary.after
    evaluated = [record for record in run.rounds if record.test or record.held_out]
    return (_evaluation(evaluated[0]), _evaluation(evaluated[-1])) if evaluated else (Evaluation(), Evaluation())


def loss_unit(runs: Iterable[Run]) -> str:
    """Return what the losses of runs are of: nats per token, or per pair of answers where all of them compare such."""
    pairs = [any(scores.reward_accuracy is not None for scores in _all_scores(run)) for run in runs]
    return "nats per pair" if pairs and all(pairs) else "nats per token"


def _all_scores(run: Run) -> Iterator[Scores]:
    for evaluation in evaluations(run):
        yield from (scores for scores in (evaluation.test, *evaluation.held_out.values()) if scores)


def _evaluation(record: RoundRecord) -> Evaluation:
    test = scores_of(record.test) if record.test else None
    scores = {name: scores_of(metrics) for name, metrics in record.held_out.items()}
    losses = {name: loss_of(metrics) for name, metrics in record.held_out.items()}
    losses = {name: loss for name, loss in losses.items() if not math.isnan(loss)}
    if not losses:
        return Evaluation(test=test, held_out=scores)
    # Sorted first, so that of equal losses the same client is named in every report.
    worst = max(sorted(losses, key=natural), key=lambda name: losses[name])
    return Evaluation(
        test=test,
        held_out=scores,
        mean=Scores(loss=float(np.mean(list(losses.values())))),
        worst=ClientScores(loss=losses[worst], client=worst),
    )


def paired_losses(run: Run) -> list[tuple[str, float, float]]:
    """Return (client, held-out loss before, after), highest loss after first, of clients measured both times."""
    before, after = evaluations(run)
    names = sorted(before.held_out.keys() & after.held_out.keys(), key=natural)
    pairs = [(name, finite(before.held_out[name].loss), finite(after.held_out[name].loss)) for name in names]
    return sorted((pair for pair in pairs if not math.isnan(pair[1] + pair[2])), key=lambda pair: -pair[2])


def kinds(modules: Iterable[str]) -> Mapping[str, list[str]]:
    """Return the modules by the last part of their name (q_proj, v_proj, ...), each list in natural order."""
    groups: dict[str, list[str]] = {}
    for name in sorted(set(modules), key=natural):
        groups.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    return groups
