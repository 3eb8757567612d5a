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
MAX_TOKENS = 4096
"""Of one pass: more losses than these are computed one after another, so that a step's memory has a bound."""
MAX_LOGITS = 4 * 2**20
"""Numbers of logits at a time, 16 MiB: of 50 000 tokens 85 rows, enough for a product at its full speed."""
ACTIVATIONS = 16
"""Vectors of the widest layer that are alive for each token, measured: freed ones are not all used again at once."""


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
    """Return what the largest step takes beside the weights: factors of the directions, activations, and logits.

    Args:
        bundle: the base.
        rank: p of the bank, whose factors are p numbers per row and column of every matrix.
        rows: of the largest batch.
        moves: losses of a step; of them, as many are computed together as `MAX_TOKENS` allows.
    """
    modules, anatomy = bundle.facts.modules.values(), bundle.facts.anatomy
    factors = sum((module.out + module.width) * rank for module in modules)
    longest = max((len(row.input_ids) for row in rows), default=0)
    once = longest * len(rows)
    tokens = once * max(1, min(moves, MAX_TOKENS // max(1, once)))
    widest = max((max(module.out, module.width) for module in modules), default=0)
    # Of a family whose anatomy is not known: GPT-2, 64 numbers a head and a widest layer of four widths.
    heads = anatomy.blocks[0].heads if anatomy is not None and anatomy.blocks else widest // 256
    # Products of queries and keys, with their mask, and their softmax are alive together.
    activations = tokens * (ACTIVATIONS * widest + 3 * heads * longest)
    logits = 4 * min(tokens * bundle.facts.vocabulary, MAX_LOGITS)
    return FLOAT * (factors + activations + logits)


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
