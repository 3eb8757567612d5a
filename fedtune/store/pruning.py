"""`pruning.json`: the structure of a pruned model, and the ranking of heads and channels that it follows from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedtune.errors import ConfigError, Fault, ShapeError
from fedtune.pruning.least_squares import check_moments
from fedtune.pruning.ranking import PruningSettings, split_by_block
from fedtune.pruning.structure import BlockLayout, BlockStructure, ModelStructure, check, sparsity
from fedtune.store import manifest
from fedtune.store.files import write_bytes, write_text
from fedtune.tensors import Tensors

NAME = "pruning.json"
MOMENTS = "moments.safetensors"
FORMAT = 1


def write(
    folder: Path,
    structure: ModelStructure,
    layout: BlockLayout,
    *,
    ratio: float,
    settings: PruningSettings,
    ranking: Tensors,
    base: Mapping[str, str],
    moments: Tensors | None = None,
) -> None:
    """Write which heads and channels stay, as runs of [start, length], with their ranking and the base's digest.

    Moments, by which the layers are repaired, lie beside it in `moments.safetensors`.

    Raises:
        StoreError: if it cannot be written.
    """
    blocks = [
        {"prefix": block.prefix, "q": list(part.q), "kv": list(part.kv), "ff": runs(part.ff)}
        for block, part in zip(layout.blocks, structure.blocks, strict=True)
    ]
    content = {
        "format": FORMAT,
        "base": dict(base),
        "family": layout.family,
        "head_dim": layout.blocks[0].head_dim,
        "ratio": ratio,
        "sparsity": sparsity(structure, layout),
        "digest": structure.digest.hex(),
        "settings": asdict(settings),
        "blocks": blocks,
        # Nine significant digits bring every float32 back exactly.
        "order": {name: [float(f"{value:.9g}") for value in array.tolist()] for name, array in ranking.items()},
    }
    if moments:
        # The digest of the numbers as clients are sent them: this file is of these moments and no others.
        body = save(dict(moments))
        content["moments"] = hashlib.sha256(body).hexdigest()
        write_bytes(folder / MOMENTS, body)
    write_text(folder / NAME, json.dumps(content, indent=1) + "\n")


def read_moments(name: str | Path, root: Path, settings: PruningSettings, layout: BlockLayout, base: str) -> Tensors:
    """Return the moments that lie beside a `pruning.json`, checked against the base; none where nothing is repaired.

    Args:
        name: of the `pruning.json`.
        root: folder that a relative path is relative to.
        settings: by which layers are repaired.
        layout: of the base.
        base: its digest.

    Raises:
        ConfigError: if there are none, or they are damaged, of another base, of other shapes or not finite.
    """
    if settings.repair == "none":
        return {}
    path = root / Path(name).expanduser()
    content = _read_file(path)
    _check_base(content, path, layout, base)
    place, digest = path.with_name(MOMENTS), content.get("moments")
    if digest is None:
        hint = 'set pruning.repair = "none", or export a run with that repair'
        raise ConfigError(Fault("pruning.repair", f"{path} to name moments for {settings.repair!r}", "none", hint))
    try:
        body = place.read_bytes()
        if hashlib.sha256(body).hexdigest() != digest:
            raise ValueError(f"others than {path.name} names")
        return check_moments(load(body), settings, layout)
    except (OSError, ValueError, ShapeError, SafetensorError) as error:
        raise _fault(place, "moments of this base's layers", str(error)) from error


def settings_of(path: Path, layout: BlockLayout, base: str) -> PruningSettings:
    """Return the settings that a `pruning.json` was written with; of those that a release added their defaults.

    Raises:
        ConfigError: if the file is missing, malformed or of another base.
    """
    content = _read_file(path)
    _check_base(content, path, layout, base)
    known = {field.name for field in fields(PruningSettings)}
    try:
        values: dict[str, Any] = {key: value for key, value in content["settings"].items() if key in known}
        for key in [key for key, value in values.items() if isinstance(value, list)]:
            values[key] = tuple(values[key])
        return PruningSettings(**values)
    except (KeyError, TypeError, AttributeError) as error:
        raise _fault(path, "the settings of its run", str(error)) from error


def read(path: Path, layout: BlockLayout, base: str) -> ModelStructure:
    """Return the structure in a `pruning.json`, checked against the base that is loaded.

    Args:
        path: of the file.
        layout: heads and channels of the base.
        base: its digest.

    Raises:
        ConfigError: if the file is missing or malformed, of another base, or its lists do not fit the base's blocks.
    """
    content = _read_file(path)
    _check_base(content, path, layout, base)
    try:
        blocks = tuple(
            BlockStructure(tuple(block["q"]), tuple(block["kv"]), expand_runs(block["ff"]))
            for block in content["blocks"]
        )
        structure, digest = check(ModelStructure(blocks), layout), str(content["digest"])
    except (KeyError, TypeError, ValueError, ShapeError) as error:
        raise _fault(path, "heads and channels of this base", str(error)) from error
    if structure.digest.hex() != digest:
        raise _fault(path, f"lists of the digest {digest[:12]}", structure.digest.hex()[:12])
    return structure


def read_ranking(name: str, root: Path, layout: BlockLayout | None, base: str) -> Tensors:
    """Return the ranking of heads and channels in the file that a recipe's `pruning.ranking` names.

    Raises:
        ConfigError: if the file is missing or malformed, or of another base.
    """
    path = root / Path(name).expanduser()
    content = _read_file(path)
    if layout is None:
        raise _fault(path, "a base whose blocks can be pruned", "another")
    _check_base(content, path, layout, base)
    try:
        ranking = {key: np.asarray(content["order"][key], np.float32) for key in ("heads", "channels")}
        split_by_block(ranking, layout)
    except (KeyError, TypeError, ValueError, ShapeError) as error:
        raise _fault(path, "a ranking of this base's heads and channels", str(error)) from error
    if not all(np.isfinite(part).all() for part in ranking.values()):
        raise _fault(path, "finite numbers in its ranking", "others")
    return ranking


def _read_file(path: Path) -> Mapping[str, Any]:
    # As export writes it, it lies beside a manifest; a copy of the file alone does not.
    is_listed = (path.parent / manifest.NAME).is_file()
    try:
        data = manifest.open_folder(path.parent).read(path.name) if is_listed else path.read_bytes()
        content = json.loads(data.decode("utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"format {content.get('format') if isinstance(content, dict) else None!r}")
    # RecursionError: brackets within brackets, thousands deep.
    except (OSError, ValueError, RecursionError) as error:
        raise _fault(path, f"a {NAME} of format {FORMAT}, as fedtune export --deploy writes it", str(error)) from error
    return content


def _check_base(content: Mapping[str, Any], path: Path, layout: BlockLayout, base: str) -> None:
    digest = str(origin.get("digest")) if isinstance(origin := content.get("base"), dict) else "none"
    if digest != base or content.get("family") != layout.family:
        raise _fault(path, f"the base {base[:12]} ({layout.family})", f"{digest[:12]} ({content.get('family')})")


def _fault(path: Path, expected: str, got: str) -> ConfigError:
    return ConfigError(Fault("pruning", f"{path} to hold {expected}", got[:200], "export it again from its run"))


def runs(numbers: Sequence[int]) -> list[list[int]]:
    """Return rising numbers as runs of [start, length].

    >>> runs([3, 4, 5, 9])
    [[3, 3], [9, 1]]
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == sum(parts[-1]):
            parts[-1][1] += 1
        else:
            parts.append([number, 1])
    return parts


def expand_runs(parts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the numbers of runs; an unsorted or overlapping list stays so, for the check to name it.

    Raises:
        ValueError: if a run is longer than any model is wide.
    """
    # A limit before memory is taken: the file may come from anywhere. No model has a layer of 2**20 channels.
    if any(length < 1 or length > 1 << 20 for _, length in parts):
        raise ValueError(f"expected runs of [start, length]; got {list(parts)[:3]}")
    return tuple(number for start, length in parts for number in range(start, start + length))
