"""`pruning.json`: what a pruned model keeps of its base, and the order of heads and channels that it follows from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.errors import ConfigError, Fault, ShapeError
from fedtune.pruning.ranking import PruningSettings, split_by_block
from fedtune.pruning.structure import BlockLayout, BlockStructure, ModelStructure, check, sparsity
from fedtune.store.files import write_text
from fedtune.tensors import Tensors

NAME = "pruning.json"
FORMAT = 1


def write(
    folder: Path,
    keep: ModelStructure,
    anatomy: BlockLayout,
    *,
    ratio: float,
    settings: PruningSettings,
    order: Tensors,
    base: Mapping[str, str],
) -> None:
    """Write what is kept, as runs of [start, length], with the order it follows from and the base it is of.

    Raises:
        StoreError: if it cannot be written.
    """
    blocks = [
        {"prefix": block.prefix, "q": list(kept.q), "kv": list(kept.kv), "ff": runs(kept.ff)}
        for block, kept in zip(anatomy.blocks, keep.blocks, strict=True)
    ]
    told = {
        "format": FORMAT,
        "base": dict(base),
        "family": anatomy.family,
        "head_dim": anatomy.blocks[0].head_dim,
        "ratio": ratio,
        "sparsity": sparsity(keep, anatomy),
        "digest": keep.digest.hex(),
        "settings": asdict(settings),
        "blocks": blocks,
        "order": {name: [float(f"{value:.9g}") for value in array.tolist()] for name, array in order.items()},
    }
    write_text(folder / NAME, json.dumps(told, indent=1) + "\n")


def read(path: Path, anatomy: BlockLayout, base: str) -> ModelStructure:
    """Return what a `pruning.json` keeps, held against the base that is here.

    Raises:
        ConfigError: if the file is none, or of another base, or what it keeps is no model.
    """
    told = _told(path)
    _of_this_base(told, path, anatomy, base)
    try:
        blocks = tuple(
            BlockStructure(tuple(one["q"]), tuple(one["kv"]), expand_runs(one["ff"])) for one in told["blocks"]
        )
        keep, noted = check(ModelStructure(blocks), anatomy), str(told["digest"])
    except (KeyError, TypeError, ValueError, ShapeError) as error:
        raise _fault(path, "heads and channels of this base", str(error)) from error
    if keep.digest.hex() != noted:
        raise _fault(path, f"lists of the digest {noted[:12]}", keep.digest.hex()[:12])
    return keep


def read_ranking(name: str, root: Path, anatomy: BlockLayout | None, base: str) -> Tensors:
    """Return the order of heads and channels that a recipe's `pruning.ranking` brings along.

    Raises:
        ConfigError: if the file is none, or of another base.
    """
    path = root / Path(name).expanduser()
    told = _told(path)
    if anatomy is None:
        raise _fault(path, "a base that surgery knows", "another")
    _of_this_base(told, path, anatomy, base)
    try:
        order = {key: np.asarray(told["order"][key], np.float32) for key in ("heads", "channels")}
        split_by_block(order, anatomy)
    except (KeyError, TypeError, ValueError, ShapeError) as error:
        raise _fault(path, "an order of this base's heads and channels", str(error)) from error
    if not all(np.isfinite(part).all() for part in order.values()):
        raise _fault(path, "finite numbers in its order", "others")
    return order


def _told(path: Path) -> Mapping[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(told, dict) or told.get("format") != FORMAT:
            raise ValueError(f"format {told.get('format') if isinstance(told, dict) else None!r}")
    except (OSError, ValueError) as error:
        raise _fault(path, f"a {NAME} of format {FORMAT}, as fedtune export --deploy writes it", str(error)) from error
    return told


def _of_this_base(told: Mapping[str, Any], path: Path, anatomy: BlockLayout, base: str) -> None:
    noted = str(found.get("digest")) if isinstance(found := told.get("base"), dict) else "none"
    if noted != base or told.get("family") != anatomy.family:
        raise _fault(path, f"the base {base[:12]} ({anatomy.family})", f"{noted[:12]} ({told.get('family')})")


def _fault(path: Path, expected: str, got: str) -> ConfigError:
    return ConfigError(Fault("pruning", f"{path} to hold {expected}", got[:200], "export it again from its run"))


def runs(numbers: Sequence[int]) -> list[list[int]]:
    """Return rising numbers as runs of [start, length].

    >>> runs([3, 4, 5, 9])
    [[3, 3], [9, 1]]
    """
    found: list[list[int]] = []
    for number in numbers:
        if found and number == sum(found[-1]):
            found[-1][1] += 1
        else:
            found.append([number, 1])
    return found


def expand_runs(parts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the numbers of runs; an unsorted or overlapping list stays so, for the check to name it.

    Raises:
        ValueError: if a run is longer than any model is wide.
    """
    if any(length < 1 or length > 1 << 20 for _, length in parts):
        raise ValueError(f"expected runs of [start, length]; got {list(parts)[:3]}")
    return tuple(number for start, length in parts for number in range(start, start + length))
