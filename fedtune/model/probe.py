"""Zeroth-order local training: losses on both sides of the weights along seeded directions, rounded to integers."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fedtune.data.encode import Example
from fedtune.directions.bank import check_accumulators, perturb
from fedtune.directions.downlink import MAX_SCALAR
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.kron import Kron
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.errors import ClientError
from fedtune.messages import ProbeSeeds, Training
from fedtune.model.base import Base
from fedtune.model.batches import Batch, batches, collate
from fedtune.model.kron_forward import with_injected_paths
from fedtune.model.seed_rebuild import DisplacedPosition, Move, RebuiltPosition, working_copy
from fedtune.model.train import OnStep, no_steps, out_of_memory, peak_bytes
from fedtune.tensors import Array

CLIP_WINDOW, CLIP_MINIMUM, CLIP_QUANTILE, CLIP_FACTOR = 128, 16, 0.9, 2.0
"""The running clip: 2 times the 0.9-quantile of the last 128 sizes of g, from 16 sizes on."""
MIN_SIGMA = 1e-8
"""Standard deviation of a step's losses below which a normalised step is noise, and is skipped."""


class Position(Protocol):
    """A point in the space of weights, as accumulators, and the losses there and around it."""

    def losses(self, batch: Batch, moves: Sequence[Move]) -> Sequence[float]:
        """Return the mean loss of the batch at w(A + amount e_k) for each (k, amount)."""
        ...

    def move(self, seed: int, amount: int) -> None:
        """Add an amount to one accumulator for good."""
        ...


@dataclass(frozen=True)
class Measurements:
    """The results of a client's steps."""

    scalars: Array
    """int8 (steps,), one per seed."""
    skipped: int
    """How many of them are 0 because a loss was not finite."""
    rms: float
    """Root mean square of the unrounded steps, in the weights' own unit."""
    losses: Sequence[float]
    """Mean loss of each step whose losses were finite."""
    loss_before: float | None
    """Mean loss of the rows that were given for it, at the weights as received; None if it is not finite."""
    loss_after: float | None
    """The same after the last step."""
    tokens: int
    """Tokens of all forward passes, padding left out."""
    seconds: float
    peak_bytes: int


@contextmanager
def at_position(base: Base, ledger: SeedLedger, trainable: Sequence[int]) -> Iterator[Position]:
    """Give the position w(A) inside the block, in the way that suits the bank; the base is unchanged afterwards."""
    if isinstance(ledger.bank, Kron):
        with with_injected_paths(base, ledger, trainable) as position:
            yield position
        return
    with working_copy(base, trainable) as trios:
        # A rebuild of the gaussian bank costs K random numbers per weight, which displacements are spared.
        kind = DisplacedPosition if isinstance(ledger.bank, Gaussian) else RebuiltPosition
        yield kind(base, ledger, trios)


def measure(
    base: Base,
    examples: Sequence[Example],
    training: Training,
    probe: ProbeSeeds,
    ledger: SeedLedger,
    trainable: Sequence[int],
    ids: Array,
    *,
    key: int,
    client: str,
    rows: Sequence[Example] = (),
    on_step: OnStep = no_steps,
) -> Measurements:
    """Take one step along every seed; each step is rounded to what the server will add before the next one is taken.

    Args:
        base: the pristine base.
        examples: the client's own.
        training: with `steps`, one per seed, `batch` and `learning_rate`.
        probe: perturbation, estimator and scalar step.
        ledger: the weights to start from.
        trainable: ordinals of the tensors that are moved.
        ids: the seeds in the order in which they are measured, int32 (steps,).
        key: from `derive`; the order of the data follows from it.
        client: for error messages.
        rows: on which the loss is measured before the first step and after the last one; without any it is not.
        on_step: called after each seed, or group of seeds, with the seeds so far.

    Raises:
        ClientError: if there is no example, or memory runs out.
        RoundError: if the accumulators could leave 32 bits.
    """
    if not examples:
        raise ClientError(f"{client}: expected at least one training example; got none; give the client more data")
    began, order = time.perf_counter(), batches(len(examples), size=training.batch, key=key)
    # `step` is the change of a weight by a scalar of 1: a power of two, so that dividing by it is exact.
    sums, step = check_accumulators(ledger.bank, ledger.accumulators), 2.0 ** (probe.shift - probe.exponent)
    sizes = deque[float](maxlen=CLIP_WINDOW)
    scalars, unrounded, losses, skipped, tokens = list[int](), list[float](), list[float](), 0, 0
    # One-sided queries of a group share the batch and the loss at the middle.
    group = probe.queries if probe.estimator == "one-sided" else 1
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
    try:
        with at_position(base, ledger, trainable) as position, torch.inference_mode():
            loss_before = loss_at(position, rows, base, training.batch)
            for start in range(0, len(ids), group):
                seeds = ids[start : start + group].tolist()
                batch = collate([examples[i] for i in next(order)], base)
                moves = around(seeds, probe)
                step_losses = position.losses(batch, moves)
                tokens += len(moves) * batch.tokens
                steps = [math.nan]
                if finite(step_losses):
                    steps = steps_of(step_losses, probe, training.learning_rate, sizes)
                if finite(steps):
                    losses.append(sum(step_losses) / len(step_losses))
                    unrounded += steps
                else:
                    # Scalars of 0, not fewer scalars: the server matches them to the ids by their place.
                    steps, skipped = [0.0] * len(seeds), skipped + len(seeds)
                for seed, move in zip(seeds, steps, strict=True):
                    scalar = 0 if probe.calibrate else max(-MAX_SCALAR, min(MAX_SCALAR, round(move / step)))
                    scalars.append(scalar)
                    if scalar:
                        # Checked at every step: a sum beyond 32 bits would wrap around in the rebuild.
                        sums = check_accumulators(ledger.bank, perturb(sums, seed, scalar << probe.shift))
                        position.move(seed, scalar << probe.shift)
                on_step(min(start + group, len(ids)), len(ids))
            # A calibration moves nothing.
            loss_after = loss_before if probe.calibrate else loss_at(position, rows, base, training.batch)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ClientError(
            f"{client}: expected its batch of {training.batch} to fit; memory ran out; lower client.batch"
        ) from error
    return Measurements(
        scalars=np.array(scalars, np.int8),
        skipped=skipped,
        rms=float(np.sqrt(np.mean(np.square(unrounded)))) if unrounded else 0.0,
        losses=losses,
        loss_before=loss_before,
        loss_after=loss_after,
        tokens=tokens,
        seconds=time.perf_counter() - began,
        peak_bytes=peak_bytes(base.device),
    )


def loss_at(position: Position, rows: Sequence[Example], base: Base, batch: int) -> float | None:
    """Return the mean loss of some rows at a position, in nats per token (causal) or example.

    None where nothing of them counts, or a loss is not finite: such steps are skipped, and the client's work is used.
    """
    total, count = 0.0, 0
    for begin in range(0, len(rows), batch):
        part = collate(rows[begin : begin + batch], base)
        [loss] = position.losses(part, [(0, 0)])  # an amount of 0 stays where it is, whatever the seed
        total, count = total + loss * part.count, count + part.count
    return total / count if count and math.isfinite(total) else None


def finite(numbers: Sequence[float]) -> bool:
    """Return whether all numbers are finite."""
    return all(map(math.isfinite, numbers))


def around(seeds: Sequence[int], probe: ProbeSeeds) -> Sequence[Move]:
    """Return the moves at which the losses of a step are measured; w + E u z is at the accumulators A - E e_k."""
    if probe.estimator == "one-sided":
        return [(seeds[0], 0), *((seed, -probe.perturbation) for seed in seeds)]
    return [(seed, amount) for seed in seeds for amount in (-probe.perturbation, probe.perturbation)]


def steps_of(losses: Sequence[float], probe: ProbeSeeds, learning_rate: float, sizes: deque[float]) -> list[float]:
    """Return the step along each seed, in the weights' own unit; appends |g| to `sizes` for the running clip.

    Two-sided (Spall 1992; MeZO, arXiv 2305.17333): lr (l+ - l-) / (2 eps). One-sided over N queries (FZOO, arXiv
    2506.09034): lr (l_i - l_0) / (N eps), or / (N sigma) with the standard deviation of the N losses.
    """
    distance = probe.perturbation * 2.0**-probe.exponent
    if probe.estimator == "two-sided":
        plus, minus = losses
        return [learning_rate * clip_scalar((plus - minus) / (2 * distance), probe.clip, sizes)]
    first, others = losses[0], losses[1:]
    if probe.normalise:
        sigma = float(np.std(others))
        return [0.0 if sigma < MIN_SIGMA else learning_rate * (loss - first) / (len(others) * sigma) for loss in others]
    return [learning_rate * clip_scalar((loss - first) / distance, probe.clip, sizes) / len(others) for loss in others]


def clip_scalar(g: float, clip: float, sizes: deque[float]) -> float:
    """Return g within [-bound, bound], appending |g| to `sizes` where the bound is the running one (`clip` of 0)."""
    bound = clip
    if clip == 0.0:
        bound = CLIP_FACTOR * float(np.quantile(sizes, CLIP_QUANTILE)) if len(sizes) >= CLIP_MINIMUM else math.inf
        sizes.append(abs(g))
    return max(-bound, min(bound, g))
