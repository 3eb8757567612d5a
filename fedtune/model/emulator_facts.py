"""`emulator.json`: which blocks of a true base an emulator holds, and what ties the file to the weights beside it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fedtune.errors import ConfigError, Fault
from fedtune.model.settings import FloatFormat

NAME, FORMAT = "emulator.json", 1
ENDS = "ends"
"""The word of `adapter.layers` for the first and last blocks of an emulator, those that its true base has too."""
MAX_BYTES = 2**20
Kind = Literal["drop", "prune", "quantise"]
Select = Literal["round", "floor"]
KINDS: Sequence[Kind] = get_args(Kind)
SELECTIONS: Sequence[Select] = get_args(Select)


@dataclass(frozen=True)
class EmulatorFacts:
    """An emulator: the ends of a true base around a middle that was made smaller."""

    base: str
    """Name of the true base, without the folder that it lay in."""
    base_digest: str
    """SHA-256 (hex) of the true base in float32, as `Base.digest` gives it."""
    base_blocks: int
    """Blocks of the true base."""
    blocks: str
    """Full name of the list of blocks, the same in both models, e.g. `model.layers`."""
    front: int
    """First blocks that are the true base's own."""
    back: int
    """Last blocks that are the true base's own."""
    layers: Sequence[int]
    """By block of the emulator, the number of the true base's block that it is or was made from."""
    kind: Kind
    ratio: float
    """Share of the middle that was dropped or pruned; 0 of a quantised one."""
    select: Select
    codes: str | None
    """Number format of a quantised middle's codes, whose values are stored: nf4 or int8."""
    dtype: str
    """Number format of the stored weights."""
    seed: int
    distilled: Mapping[str, Any] | None
    """Settings and errors of the distillation; None without one."""
    digests: Mapping[str, str]
    """SHA-256 (hex) of the emulator by the number format that it is loaded in."""

    @property
    def kept(self) -> int:
        """Blocks of the middle."""
        return len(self.layers) - self.front - self.back

    @property
    def ends(self) -> Sequence[int]:
        """Numbers of the emulator's blocks that are the true base's own."""
        return [*range(self.front), *range(self.front + self.kept, len(self.layers))]


def middle_layers(blocks: int, front: int, back: int, drop: float, select: Select) -> Sequence[int]:
    """Return the numbers of the blocks of a base's middle that an emulator keeps.

    Of m blocks k = round(m (1 - drop)) stay, at the places i (m - 1) / (k - 1), rounded as offsite tuning has it (Xiao
    et al., arXiv 2302.04870) or cut off as FederatedScope-LLM has it; a single one is the first.

    Raises:
        ConfigError: if the ends leave no middle, or the share leaves none of it.

    >>> middle_layers(6, 1, 1, 0.5, "round")
    [1, 4]
    """
    middle = blocks - front - back
    faults = [
        Fault(name, f"0 or more, and fewer than {blocks} blocks in both ends together", f"{front} + {back}", hint)
        for name, count, hint in (
            ("front", front, "leave at least one block between the ends"),
            ("back", back, "leave at least one block between the ends"),
        )
        if count < 0 or (middle < 1 and name == "front")
    ]
    if front == back == 0:
        faults.append(Fault("front", "at least one block in front or back, which clients tune", "none", "give --front"))
    if not 0 <= drop < 1:
        faults.append(Fault("drop", "a share from 0 to below 1 of the middle", f"{drop:g}", "e.g. 0.5"))
    if faults:
        raise ConfigError(faults)
    k = round(middle * (1 - drop))
    if k < 1:
        expected = f"a share that leaves at least one of the {middle} blocks of the middle"
        raise ConfigError(Fault("drop", expected, f"{drop:g}", f"e.g. {(middle - 1) / middle:.2g}"))
    # At least 1 apart: no block twice, whichever way they are rounded.
    places = [round(i * (middle - 1) / max(1, k - 1)) for i in range(k)]
    if select == "floor":
        places = [i * (middle - 1) // max(1, k - 1) for i in range(k)]
    return [front + place for place in places]


def encode(facts: EmulatorFacts) -> bytes:
    """Return the bytes of the file."""
    return (json.dumps({"format": FORMAT, **asdict(facts)}, indent=1) + "\n").encode()


def read(folder: Path) -> EmulatorFacts:
    """Return the facts of an emulator's folder.

    Raises:
        ConfigError: if there are none, or they describe no emulator.
    """
    file = folder / NAME
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        expected = f"the folder of an emulator, with {NAME}, as fedtune export BASE --form emulator writes it"
        got = f"none in {folder}" if not file.exists() else f"{file}: {error.strerror}"
        raise ConfigError(
            Fault("model.base", expected, got, "give that folder, or name the layers by number")
        ) from error
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        content = json.loads(data.decode("utf-8"))
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"no object of format {FORMAT}")
        facts = EmulatorFacts(**content)
        check(facts)
    # RecursionError: brackets within brackets, thousands deep.
    except (ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:160]
        hint = "put back a copy of the folder, or export it again"
        raise ConfigError(Fault(str(file), "the facts of an emulator", reason, hint)) from error
    return facts


def check(facts: EmulatorFacts) -> None:
    """Raise ValueError or TypeError where facts describe no emulator: ends of the base around a part of its middle."""
    for name in ("base", "base_digest", "blocks", "kind", "select", "dtype"):
        if not isinstance(getattr(facts, name), str):
            raise TypeError(f"{name} is no text")
    numbers = [facts.base_blocks, facts.front, facts.back, facts.seed, *checked_list(facts.layers)]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise TypeError("base_blocks, front, back, seed and layers are whole numbers from 0")
    if facts.kind not in KINDS or facts.select not in SELECTIONS or facts.dtype not in get_args(FloatFormat):
        raise ValueError(f"kind {facts.kind!r}, select {facts.select!r}, dtype {facts.dtype!r}")
    n, a, b, layers = facts.base_blocks, facts.front, facts.back, list(facts.layers)
    middle = layers[a : len(layers) - b]
    # First that both ends are part of a list that fits into the file: no list of their length is made before.
    if not 0 < a + b < len(layers) or layers[:a] != [*range(a)] or layers[len(layers) - b :] != [*range(n - b, n)]:
        raise ValueError(f"layers {layers[:8]} are not the first {a} and the last {b} of {n} around others")
    if middle != sorted(set(middle)) or middle[0] < a or middle[-1] >= n - b:
        raise ValueError(f"the middle {middle[:8]} is no part of blocks {a} to {n - b - 1}, in order")
    if not isinstance(facts.digests, dict) or not all(isinstance(value, str) for value in facts.digests.values()):
        raise TypeError("digests are no texts by number format")


def checked_list(layers: object) -> Sequence[Any]:
    if not isinstance(layers, list):
        raise TypeError("layers is no list")
    return layers


def resolve_layers(
    layers: str | None, path: str | Path, *, blocks: Sequence[int] = (), dtype: str = "", digest: str = ""
) -> str | None:
    """Return a recipe's `adapter.layers` as numbers: `ends` by the emulator.json beside the weights.

    Args:
        layers: as in the recipe; anything but `ends` stays as it is.
        path: folder of the base.
        blocks: numbers of the blocks that the loaded base has.
        dtype: number format that it was loaded in.
        digest: of what was loaded; without it only the number of blocks is checked.

    Raises:
        ConfigError: if the folder is of no emulator, or emulator.json is that of another one.
    """
    if layers != ENDS:
        return layers
    folder = Path(path)
    facts = read(folder)
    if len(blocks) != len(facts.layers):
        expected, got = f"{len(facts.layers)} blocks, as in {NAME}", f"{len(blocks)} in {folder}"
        raise ConfigError(Fault(str(folder / NAME), expected, got, "put back a copy of the folder"))
    if digest and facts.digests.get(dtype) != digest:
        expected = f"the weights that {NAME} is of (digest {str(facts.digests.get(dtype))[:12]} in {dtype})"
        got = f"others beside it (digest {digest[:12]})"
        raise ConfigError(Fault(str(folder / NAME), expected, got, "put back a copy of the folder"))
    return ", ".join(map(str, facts.ends))


def middle_notes(path: str | Path, modules: Collection[str]) -> Sequence[str]:
    """Return what a user should know of adapters in an emulator's middle; nothing of any other base.

    Args:
        path: folder of the base.
        modules: full names of the layers that are trained.
    """
    folder = Path(path)
    if not (folder / NAME).is_file():
        return ()
    facts = read(folder)
    inside = [name for name in modules if middle_block(name, facts)]
    if not inside:
        return ()
    return [
        f"an emulator of {facts.base}: {len(inside)} adapted layers lie in its middle, such as {inside[0]}; what they "
        f'learn cannot be put back into the true base; set adapter.layers = "{ENDS}"'
    ]


def middle_block(name: str, facts: EmulatorFacts) -> bool:
    """Return whether a module or tensor lies in a block of an emulator that is none of its ends."""
    number = name.removeprefix(f"{facts.blocks}.").partition(".")[0]
    return name.startswith(f"{facts.blocks}.") and not (number.isdecimal() and int(number) in facts.ends)


def true_name(name: str, facts: EmulatorFacts) -> str:
    """Return the true base's name of a module or tensor of an emulator; outside of the blocks it is the same.

    Raises:
        ConfigError: if it lies in the middle, which is not the true base's.
    """
    if middle_block(name, facts):
        expected = f"changes of the ends alone (blocks {', '.join(map(str, facts.ends))} of the emulator)"
        hint = f'train with adapter.layers = "{ENDS}": a change of the middle fits no layer of the true base'
        raise ConfigError(Fault(name, expected, "one of its middle", hint))
    if not name.startswith(f"{facts.blocks}."):
        return name
    number, _, rest = name.removeprefix(f"{facts.blocks}.").partition(".")
    return f"{facts.blocks}.{facts.layers[int(number)]}" + (f".{rest}" if rest else "")
