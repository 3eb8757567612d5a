"""Whether a device has the memory that a bundle needs, asked before the bundle is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedtune.data.encode import Example
from fedtune.edge.bundle import Bundle
from fedtune.errors import ConfigError, Fault

MEMINFO = Path("/proc/meminfo")
RUNTIME_BYTES = 64 * 2**20
"""That a runtime takes beside weights, states and activations."""
FLOAT = 4
"""Bytes of a number."""


def available_bytes(meminfo: Path = MEMINFO) -> int | None:
    """Return how much main memory a program may still take; None where the system does not say."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def weight_bytes(bundle: Bundle) -> int:
    """Return the bytes of all files of a bundle, of which the weights are by far the most."""
    return sum(listed.num_bytes for listed in (bundle.folder.listed or {}).values())


def step_bytes(bundle: Bundle, rank: int, rows: Sequence[Example], moves: int) -> int:
    """Return what the largest step takes beside the weights: factors of the directions, and scores of the words.

    Args:
        bundle: the base.
        rank: p of the bank, whose factors are p numbers per row and column of every matrix.
        rows: of the largest batch.
        moves: losses that are computed together.
    """
    factors = sum((module.out + module.width) * rank for module in bundle.facts.modules.values())
    tokens = moves * len(rows) * max((len(row.input_ids) for row in rows), default=0)
    widest = max((max(module.out, module.width) for module in bundle.facts.modules.values()), default=0)
    # Scores of the counted words, their exponentials, and a few layers' worth of activations are alive together.
    return FLOAT * (factors + tokens * (2 * bundle.facts.vocabulary + 8 * widest))


def check_memory(
    bundle: Bundle, max_bytes: int | None, *, loaded: bool = False, more: int = 0, meminfo: Path = MEMINFO
) -> None:
    """Check that a bundle fits into the memory that is free, and into what the owner allows.

    Args:
        bundle: the base.
        max_bytes: what the owner allows the process; None: no limit.
        loaded: whether the weights are in memory already.
        more: bytes beside the weights that are known to be needed.
        meminfo: the system's file.

    Raises:
        ConfigError: with what it needs, what there is, and what to do.
    """
    needed = weight_bytes(bundle) + RUNTIME_BYTES + more
    missing = more if loaded else needed
    hint = "take a smaller bundle (fedtune export --edge DIR --dtype int8), or a device with more"
    expected = f"at least {megabytes(needed)} of memory for {bundle.base_name}"
    if max_bytes is not None and needed > max_bytes:
        got = f"policy.max_memory_gib = {max_bytes / 2**30:g}"
        raise ConfigError(Fault("model.base", expected, got, f"raise it, or {hint}"))
    free = available_bytes(meminfo)
    if free is not None and missing > free:
        expected = f"{megabytes(missing)} of free memory for {bundle.base_name}"
        raise ConfigError(Fault("model.base", expected, megabytes(free), f"end other programs, or {hint}"))


def megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"
