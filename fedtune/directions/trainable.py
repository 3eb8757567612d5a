"""Which tensors of a base the directions move: every one, or those that a recipe's patterns name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fedtune.directions.manifest import Entry, Manifest
from fedtune.errors import ConfigError, Fault

SET = "kron moves linear layers alone unless method.vectors or method.embeddings is true"


@dataclass(frozen=True)
class Reach:
    """What of a model a bank of directions moves; the same on the server and on every client."""

    bank: str
    patterns: Sequence[str] = ()
    """Globs over the names of tensors; none takes all that the bank allows."""
    vectors: bool = False
    """kron: tensors of one dimension as well, which take the directions of the hadamard bank."""
    embeddings: bool = False
    """kron: every matrix, not those of the linear layers alone."""


def trainable(manifest: Manifest, reach: Reach, layers: Collection[str]) -> tuple[int, ...]:
    """Return the ordinals of the tensors that are moved, in rising order.

    Args:
        manifest: of the base.
        reach: what is asked for.
        layers: names of the matrices of linear layers, heads included.

    Raises:
        ConfigError: if a pattern names nothing, nothing is left, or the bank has no directions for a tensor.
    """
    names = [entry.name for entry in manifest.entries]
    faults = [
        Fault("method.trainable", f"patterns of tensors of the base, e.g. {names[0]!r}", f"{glob!r}, which names none")
        for glob in reach.patterns
        if not any(fnmatchcase(name, glob) for name in names)
    ]
    wanted = [entry for entry in manifest.entries if is_covered(entry, reach)]
    if reach.bank == "kron":
        faults += [
            Fault(
                "method.bank",
                "tensors of at most two dimensions for 'kron'",
                f"{entry.name} of shape {entry.shape}",
                'use bank = "hadamard", or leave it out of method.trainable',
            )
            for entry in wanted
            if len(entry.shape) > 2
        ]
        wanted = [entry for entry in wanted if is_injected(entry, reach, layers)]
    if faults:
        raise ConfigError(faults)
    if not wanted:
        raise ConfigError(Fault("method.trainable", "at least one tensor that the bank moves", "none", SET))
    return tuple(manifest.ordinals[entry.name] for entry in wanted)


def is_covered(entry: Entry, reach: Reach) -> bool:
    return not reach.patterns or any(fnmatchcase(entry.name, glob) for glob in reach.patterns)


def is_injected(entry: Entry, reach: Reach, layers: Collection[str]) -> bool:
    """Return whether the kron bank moves a tensor."""
    if len(entry.shape) < 2:
        return reach.vectors
    return reach.embeddings or entry.name in layers
