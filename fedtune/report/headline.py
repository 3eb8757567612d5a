"""The first sentence of a report: what a run achieved, for whom, at what cost, and what came out."""

from __future__ import annotations

from collections.abc import Iterator

from fedtune.report.curves import evaluations, paired_losses
from fedtune.report.reader import Run, Scores
from fedtune.report.units import bytes_text, number_text, seconds_text


def headline(run: Run) -> str:
    """Return one sentence on a run, of the parts that it has measured."""
    start = f"Stopped after round {run.rounds[-1].round}: " if run.state == "interrupted" else ""
    sentence = start + "; ".join(parts(run))
    return sentence[:1].upper() + sentence[1:] + "."


def parts(run: Run) -> Iterator[str]:
    """Yield the score on the test data, the clients that gained, the cost, and the adapter's rank."""
    before, after = evaluations(run)
    if scores := change("test", before.test, after.test) or change("mean held-out", before.mean, after.mean):
        yield scores
    if pairs := paired_losses(run):
        better = sum(last < first for _, first, last in pairs)
        who = f"all {len(pairs)} clients" if better == len(pairs) > 1 else f"{better} of {len(pairs)} clients"
        yield f"{who} better on held-out rows"
    traffic = sum(record.bytes_up + record.bytes_down for record in run.rounds)
    seconds = run.summary.seconds if run.summary else sum(record.seconds for record in run.rounds)
    yield f"{bytes_text(traffic)} in {seconds_text(seconds)}"
    if rank := adapter_rank(run):
        own = recipe_rank(run)
        yield f"adapter of rank {rank}" + (f" (the recipe's clients train at most {own})" if own and rank > own else "")


def change(where: str, before: Scores | None, after: Scores | None) -> str:
    """Return a score before and after in words; empty where there is none."""
    for name in ("accuracy", "loss"):
        old, new = getattr(before, name, None), getattr(after, name, None)
        if old is not None and new is not None:
            return f"{where} {name} {number_text(old)} to {number_text(new)}"
    return ""


def adapter_rank(run: Run) -> int:
    """Return the largest rank of the global adapter's layers, of the round that is the result; 0 without an adapter."""
    chosen = run.summary.selection.round if run.summary else 0  # 0 where a run of an earlier release does not say
    records = [record for record in run.rounds if record.modules and (not chosen or record.round <= chosen)]
    return max((module.rank for module in records[-1].modules.values()), default=0) if records else 0


def recipe_rank(run: Run) -> int:
    """Return the largest rank that a client was asked for; 0 if none was."""
    ranks = (client.rank for record in run.rounds for client in record.clients.values())
    return max((rank for rank in ranks if rank), default=0)
