"""Which target modules of a base are trained where only its upper blocks are: backward passes stop below them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import floor

from fedtune.pruning.structure import BlockLayout


def block_of(module: str, layout: BlockLayout) -> int | None:
    """Return the number of the block that a module is in, from 0; None: it is in none."""
    ends = (end for end, letter in enumerate(module) if letter == ".")
    return next((place for end in ends if (place := layout.places.get(module[:end])) is not None), None)


def module_ranks(modules: Collection[str], layout: BlockLayout, rank: int, top: float) -> tuple[int, ...]:
    """Return the rank of each module, in sorted order, where only the upper share of the blocks is trained.

    The share is of the blocks that have target modules, rounded to at least one. Modules outside of the blocks are
    trained in any case. Where all are, there is nothing to say: ().

    >>> from fedtune.pruning.structure import Block
    >>> layout = BlockLayout("llama", tuple(Block(f"layers.{i}", 1, 1, 1, 1) for i in range(5)), 1)
    >>> modules = [f"layers.{i}.mlp.up_proj" for i in range(5)]
    >>> module_ranks(modules, layout, 8, 0.4), module_ranks(modules, layout, 8, 1.0)
    ((0, 0, 0, 8, 8), ())
    """
    places = {name: block_of(name, layout) for name in sorted(modules)}
    blocks = sorted({place for place in places.values() if place is not None})
    # Half a block counts as one: of two blocks a share of a quarter trains one.
    trained = blocks[-max(1, floor(top * len(blocks) + 0.5)) :] if blocks else []
    if len(trained) == len(blocks):
        return ()
    return tuple(rank if place is None or place in trained else 0 for place in places.values())


def backward_blocks(modules: Collection[str], layout: BlockLayout, ranks: Sequence[int]) -> int:
    """Return through how many blocks, from the top, a backward pass goes: down to the lowest that is trained.

    Args:
        modules: the targets.
        layout: of the base's blocks.
        ranks: of the modules in sorted order; (): all are trained.
    """
    trained = [name for name, rank in zip(sorted(modules), ranks or [1] * len(modules), strict=True) if rank > 0]
    places: Mapping[str, int | None] = {name: block_of(name, layout) for name in trained}
    # What is no part of a block may lie below all of them, as an embedding does.
    lowest = min((0 if place is None else place for place in places.values()), default=len(layout.blocks))
    return len(layout.blocks) - lowest
