"""Slopes and curvatures of a client's loss along directions that all clients of a run share; nothing is moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.data.encode import Example
from fedtune.directions import sampling
from fedtune.errors import ClientError
from fedtune.messages import ProbeSeeds
from fedtune.probing.measure import B, Position, loss_at
from fedtune.probing.order import batches
from fedtune.probing.steps import OnStep, finite, no_steps
from fedtune.seeds import derive
from fedtune.tensors import Array

LARGEST = 1e12
"""Of a slope or a curvature: a larger one is of losses that are none, and is counted as skipped."""


@dataclass(frozen=True)
class Curvatures:
    """What a client has measured along the shared directions."""

    slopes: tuple[float, ...]
    """(l+ - l-) / (2 eps) along each, as float32 holds it."""
    curvatures: tuple[float, ...]
    """(l+ + l- - 2 l0) / eps^2 along each, likewise."""
    skipped: int
    """How many of them are 0 because a loss was not finite."""
    loss: float | None
    """Mean loss of the rows that were given for it; None if it is not finite."""
    tokens: int
    """Tokens of the forward passes, padding left out."""


def shared_ids(probe: ProbeSeeds) -> Array:
    """Return the directions, alike for all clients of a run: from the bank's key, each at most once where K allows."""
    count = min(sampling.SHARED, probe.seeds)
    return sampling.sample_ids(derive(probe.key, "fedkseed.curvature"), count, probe.seeds, sampling="distinct")


def measure_curvatures(
    position: Position[B],
    collate: Callable[[Sequence[Example]], B],
    examples: Sequence[Example],
    batch: int,
    probe: ProbeSeeds,
    *,
    key: int,
    client: str,
    rows: Sequence[Example] = (),
    on_step: OnStep = no_steps,
) -> Curvatures:
    """Measure the losses at the weights and on both sides of them along each shared direction, each on its own batch.

    Own batches, and not one for all, so that what clients agree on can be separated from the noise of their examples.

    Args:
        position: of the weights that the client was sent.
        collate: makes a batch of examples.
        examples: the client's own.
        batch: examples per forward pass.
        probe: the bank and the perturbation.
        key: from `derive`; the order of the data follows from it.
        client: for error messages.
        rows: on which the loss is measured at the weights.
        on_step: called after each direction.

    Raises:
        ClientError: if there is no example.
    """
    if not examples:
        raise ClientError(f"{client}: expected at least one training example; got none; give the client more data")
    order, ids = batches(len(examples), size=batch, key=key), shared_ids(probe)
    distance = probe.perturbation * 2.0**-probe.exponent
    slopes, curvatures, skipped, tokens = list[float](), list[float](), 0, 0
    for seed in ids.tolist():
        part = collate([examples[i] for i in next(order)])
        moves = [(seed, 0), (seed, -probe.perturbation), (seed, probe.perturbation)]
        losses = position.losses(part, moves)
        tokens += len(moves) * part.tokens
        slope, curvature = slope_and_curvature(losses, distance)
        if max(abs(slope), abs(curvature)) <= LARGEST:
            slopes.append(single(slope))
            curvatures.append(single(curvature))
        else:
            slopes.append(0.0)
            curvatures.append(0.0)
            skipped += 1
        on_step(len(slopes), len(ids))
    loss = loss_at(position, collate, rows, batch)
    return Curvatures(tuple(slopes), tuple(curvatures), skipped, loss, tokens)


def single(number: float) -> float:
    """Return a number as it travels: every engine gives the server the same."""
    return float(np.float32(number))


def slope_and_curvature(losses: Sequence[float], distance: float) -> tuple[float, float]:
    """Return the central differences of a loss, from its values in the middle, ahead and behind; NaN if one is none.

    >>> slope_and_curvature([1.0, 1.75, 0.75], 0.5)
    (1.0, 2.0)
    """
    middle, ahead, behind = losses
    if not finite(losses):
        return math.nan, math.nan
    return (ahead - behind) / (2 * distance), (ahead + behind - 2 * middle) / distance**2
