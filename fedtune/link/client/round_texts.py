"""What a site's log says of its own rounds: scores, training, and what became of the update."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.wire.v1 import link_pb2 as pb

SHOWN = ("loss", "accuracy", "macro_f1")
"""Metrics that are shown, of those that a client has."""
VERDICTS: Mapping[int, str] = {
    pb.ACCEPTED: "used",
    pb.LATE: "too late, not used",
    pb.NOTED: "asked for more",
    pb.REFUSED: "refused",
}


def format_scores(scores: Mapping[str, float]) -> str:
    """Return the scores that people look at first, and on how many rows they are."""
    shown = [f"{name} {scores[name]:.3f}" for name in SHOWN if name in scores]
    return f"{', '.join(shown)} on {scores.get('examples', 0):.0f} held-out rows"


def format_work(measured: Mapping[str, float], rank: int | None) -> str:
    """Return what one training did: the loss on the site's own rows, the rank, the time."""
    parts = []
    if "loss_before" in measured and "loss_after" in measured:
        parts.append(f"own loss {measured['loss_before']:.3f} to {measured['loss_after']:.3f}")
    parts.append(f"rank {rank}" if rank is not None else "scalars along seeds")
    return ", ".join([*parts, f"{measured.get('seconds', 0.0):.1f} s"])


def verdict_text(verdict: int) -> str:
    """Return what became of an update in words; of a verdict that only a later release knows, its number."""
    return VERDICTS.get(verdict, f"verdict {verdict}")
