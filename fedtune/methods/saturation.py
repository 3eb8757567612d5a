"""What an exact state of `flora` grows to: the round in which each kind of layer is full, with bytes and seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil

from fedtune.lora.dense import NARROW, OVERSAMPLING, PASSES

FLOPS_PER_SECOND = 1e10
"""What one core is taken to do: a laptop's, in float32 and float64 alike; a server's does two to four times as much."""
SLOW_S = 60.0
"""Seconds of a round at the server above which a recipe is warned about."""


def forecast(
    modules: Mapping[str, tuple[int, int]], *, grows_by: int, largest: int, rounds: int, number_bytes: float
) -> Iterator[str]:
    """Yield what users should know of an exact state before round 1; nothing where no layer fills up.

    Args:
        modules: (out, in) of every module.
        grows_by: sum of the ranks of one round's clients.
        largest: the largest planned rank.
        rounds: of the run.
        number_bytes: of one number on the way down.
    """
    kinds: dict[tuple[str, tuple[int, int]], int] = {}
    for name, shape in modules.items():
        kind = (name.rpartition(".")[2], shape)
        kinds[kind] = kinds.get(kind, 0) + 1
    full = {kind: ceil(min(kind[1]) / grows_by) for kind in kinds}
    if all(number > rounds for number in full.values()):
        return
    megabytes, seconds = 0.0, 0.0
    for (name, (m, n)), count in kinds.items():
        if (number := full[name, (m, n)]) <= rounds:
            megabytes += count * m * n * number_bytes / 1e6
            seconds += count * round_flops(m, n, grows_by=grows_by, largest=largest) / FLOPS_PER_SECOND
            yield f"the exact state of {count} {name} ({m} x {n}) is full in round {number} of {rounds}"
    slow = f", more than {SLOW_S:.0f}" if seconds > SLOW_S else ""
    yield (
        f"from then on a client downloads {megabytes:.3g} MB a round for these layers, and the server works about "
        f'{seconds:.2g} s a round on one core{slow}; method.state_max_rank = "auto" keeps rank {2 * largest} at most'
    )


def round_flops(m: int, n: int, *, grows_by: int, largest: int) -> float:
    """Return the operations of one full layer's sum: of a narrow layer a decomposition, of others a few products."""
    # From differences a client's part has twice its rank.
    product = 4.0 * m * n * grows_by
    if min(m, n) <= NARROW:
        return product + 22.0 * m * n * min(m, n)
    return product + 4.0 * PASSES * m * n * (largest + OVERSAMPLING)
