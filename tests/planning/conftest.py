"""Candidates of few arms, told by their seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from fedtune.planning.policy import Arm, Candidate, Observed

Make = Callable[..., Candidate]
ARMS = (Arm(0.0, 16), Arm(0.25, 8), Arm(0.5, 4))


def candidate(
    name: str,
    seconds: Sequence[float],
    *,
    weight: float = 0.5,
    feasible: Sequence[bool] | None = None,
    rate: float = 1.0,
) -> Candidate:
    """A client whose arms take so many seconds of compute, and next to nothing of transfer."""
    return Candidate(
        client=name,
        weight=weight,
        feasible=tuple(feasible or [True] * len(seconds)),
        tflop=tuple(each / rate for each in seconds),
        megabytes=(1e-9,) * len(seconds),
        memory_gb=tuple(float(len(seconds) - i) for i in range(len(seconds))),
        s_per_tflop=rate,
        s_per_mb=1e-9,
    )


def seen(
    name: str, arm: Arm, *, gain: float | None = 1.0, seconds: float | None = 1.0, late_s: float | None = None
) -> Observed:
    return Observed(
        client=name,
        arm=arm,
        tflop=1.0,
        megabytes=1.0,
        compute_s=seconds if late_s is None else None,
        transfer_s=None if seconds is None or late_s is not None else 0.0,
        used=late_s is None,
        late_s=late_s,
        loss_before=None if gain is None else 2.0 + gain,
        loss_after=None if gain is None else 2.0,
    )


@pytest.fixture
def arms() -> tuple[Arm, ...]:
    return ARMS
