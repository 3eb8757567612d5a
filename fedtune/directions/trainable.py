"""Which tensors of a base the directions move: every tensor, or those that a recipe's patterns name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fedtune.directions.seed_ledger import Manifest, TensorEntry
from fedtune.errors import ConfigError, Fault

KRON_HINT = "kron moves linear layers alone unless method.vectors or method.embeddings is true"


@dataclass(frozen=True)
class TensorSelection:
    """Which tensors of a model a bank of directions moves; the same on the server and on every client."""

    bank: str
    patterns: Sequence[str] = ()
    """Globs over the names of tensors; an empty list takes all that the bank allows."""
    vectors: bool = False
    """kron: tensors of one dimension as well, which take the directions of the hadamard bank."""
    embeddings: bool = False
    """kron: every matrix, not those of the linear layers alone."""


def trainable_ordinals(manifest: Manifest, selection: TensorSelection, layers: Collection[str]) -> tuple[int, ...]:
    """Return the places in the manifest of the tensors that are moved, in rising order.

    Args:
        manifest: of the base.
        selection: what the recipe asks for.
        layers: names of the matrices of linear layers, heads included.

    Raises:
        ConfigError: if a pattern names nothing, nothing is left, or the bank has no directions for a tensor.
    """
    names = [entry.name for entry in manifest.entries]
    faults = [
        Fault("method.trainable", f"patterns of tensors of the base, e.g. {names[0]!r}", f"{glob!r}, which names none")
        for glob in selection.patterns
        if not any(fnmatchcase(name, glob) for name in names)
    ]
    chosen = [entry for entry in manifest.entries if is_covered(entry, selection)]
    if selection.bank == "kron":
        # Before the filter below, so that a pattern that names such a tensor is not passed over in silence.
        faults += [
            Fault(
                "method.bank",
                "tensors of at most two dimensions for 'kron'",
                f"{entry.name} of shape {entry.shape}",
                'use bank = "hadamard", or leave it out of method.trainable',
            )
            for entry in chosen
            if len(entry.shape) > 2
        ]
        chosen = [entry for entry in chosen if is_moved_by_kron(entry, selection, layers)]
    if faults:
        raise ConfigError(faults)
    if not chosen:
        raise ConfigError(Fault("method.trainable", "at least one tensor that the bank moves", "none", KRON_HINT))
    return tuple(manifest.ordinals[entry.name] for entry in chosen)


def is_covered(entry: TensorEntry, selection: TensorSelection) -> bool:
    """Return whether the patterns take a tensor."""
    return not selection.patterns or any(fnmatchcase(entry.name, glob) for glob in selection.patterns)


def is_moved_by_kron(entry: TensorEntry, selection: TensorSelection, layers: Collection[str]) -> bool:
    """Return whether the kron bank moves a tensor that the patterns take."""
    if len(entry.shape) < 2:
        return selection.vectors
    return selection.embeddings or entry.name in layers
