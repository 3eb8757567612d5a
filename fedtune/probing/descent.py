"""First-order local training of the numbers along seeds: Adam on their slopes, rounded to the small integers sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedtune.data.encode import Example
from fedtune.directions.bank import check_accumulators
from fedtune.directions.numbers import LARGEST_NUMBER
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.errors import ClientError
from fedtune.messages import Training
from fedtune.probing.measure import B, BatchOf
from fedtune.probing.order import batches
from fedtune.probing.steps import OnStep, no_steps
from fedtune.tensors import Array

BETAS = (0.9, 0.999)
"""Of Adam (arXiv 1412.6980): the shares of the running mean and of the running mean square that each step keeps."""
ADAM_EPSILON = 1e-8
"""Beside the root of the mean square; slopes are as large as the norm of the gradient."""
CUTS = 4
"""Powers of two by which the largest number may be cut, so that the others are rounded less."""
USUAL = 4096
"""Numbers, of all groups together, for which a learning rate is stated as it is."""
MAX_SKIPPED = 3
"""Steps of a round that a client may leave out because their loss or slopes are not finite."""


class Slope(Protocol[BatchOf]):
    """The weights w(A) of any accumulators, and there the losses of batches and their slopes along the directions."""

    @property
    def rms(self) -> float:
        """Root mean square of the trained weights in the base."""
        ...

    def loss(self, accumulators: Array, batch: BatchOf) -> float:
        """Return the mean loss over what counts in the batch at w(A)."""
        ...

    def slopes(self, accumulators: Array, parts: Sequence[BatchOf]) -> tuple[float, Array]:
        """Return the mean loss over what counts in all parts at w(A), and <dL/dw, z_k> of the newest directions.

        float64 (numbers,), in the order of `DirectionBank.newest`.
        """
        ...


@dataclass(frozen=True)
class Descent:
    """The result of a client's steps."""

    numbers: Array
    """int8 (numbers,): the newest accumulators move by numbers * 2^shift."""
    shift: int
    skipped: int
    """Steps that were left out because their loss or slopes were not finite."""
    losses: Sequence[float]
    """Mean loss of each step that was taken, before the step."""
    loss_before: float | None
    """Mean loss of the rows that were given for it, at the weights as received; None if it is not finite."""
    loss_after: float | None
    """The same at the weights that the numbers lead to, as they are sent."""
    tokens: int
    """Tokens that went forward in the steps, padding left out."""


@dataclass(frozen=True)
class Moments:
    """Adam's memory of the slopes of all steps so far."""

    mean: Array
    square: Array
    steps: int = 0


def descend(
    position: Slope[B],
    collate: Callable[[Sequence[Example]], B],
    examples: Sequence[Example],
    training: Training,
    ledger: SeedLedger,
    *,
    bits: int,
    largest_shift: int,
    key: int,
    client: str,
    rows: Sequence[Example] = (),
    on_step: OnStep = no_steps,
) -> Descent:
    """Take optimizer steps on the newest accumulators alone, from the ledger's, and round what they have moved by.

    Every step is taken at weights of whole accumulators, the nearest to the optimizer's own numbers.

    Args:
        position: of the weights at any accumulators.
        collate: makes a batch of examples.
        examples: the client's own.
        training: with `steps`, `batch`, `accumulation`, and `learning_rate`: the root mean square of a weight's change
            in one step, as a share of the trained weights' own.
        ledger: the weights to start from.
        bits: of each number sent.
        largest_shift: that the server takes; the steps stay within what can be sent.
        key: from `derive`; the order of the data follows from it.
        client: for error messages.
        rows: on which the loss is measured before the first step and after the last one; without any it is not.
        on_step: called after each step.

    Raises:
        ClientError: if there is no example, if the weights are all zero, or if too many steps were left out.
        RoundError: if the accumulators could leave 32 bits.
    """
    check_examples(examples, client)
    assert training.steps is not None  # the planner resolves epochs
    order = batches(len(examples), size=training.batch, key=key)
    start = check_accumulators(ledger.bank, ledger.accumulators)
    begin = start[ledger.bank.newest].astype(np.float64)
    numbers, moments = begin, Moments(np.zeros_like(begin), np.zeros_like(begin))
    rate = coordinate_rate(ledger, training.rate, position.rms, client)
    reach = float(LARGEST_NUMBER[bits] << largest_shift)
    losses, skipped, tokens = list[float](), 0, 0
    loss_before = loss_at(position, collate, start, rows, training.batch)
    for step in range(training.steps):
        parts = [collate([examples[i] for i in next(order)]) for _ in range(training.accumulation)]
        loss, slopes = position.slopes(accumulators_at(ledger, start, np.rint(numbers)), parts)
        if math.isfinite(loss) and np.isfinite(slopes).all():
            losses.append(loss)
            moments, direction = adam(moments, slopes)
            # dL/dA_k is -u <dL/dw, z_k>: downhill is along the slopes, not against them.
            numbers = np.clip(numbers + rate * direction, begin - reach, begin + reach)
        else:
            skipped += 1
            check_skipped(skipped, f"{client}, step {step + 1}", loss, training)
        tokens += sum(batch.tokens for batch in parts)
        on_step(step + 1, training.steps)
    sent, shift = small_numbers(numbers - begin, bits=bits, largest_shift=largest_shift)
    end = accumulators_at(ledger, start, begin + np.ldexp(sent.astype(np.float64), shift))
    return Descent(
        numbers=sent,
        shift=shift,
        skipped=skipped,
        losses=losses,
        loss_before=loss_before,
        loss_after=loss_at(position, collate, end, rows, training.batch),
        tokens=tokens,
    )


def check_examples(examples: Sequence[Example], client: str) -> None:
    """Raise ClientError if there is no example."""
    if not examples:
        raise ClientError(f"{client}: expected at least one training example; got none; give the client more data")


def coordinate_rate(ledger: SeedLedger, learning_rate: float, rms: float, client: str) -> float:
    """Return by how much an accumulator moves in a step of Adam, so that a weight moves by a share of `rms`.

    The share is the rate, over the square root of how many times `USUAL` numbers there are, if more: their steps lie so
    much closer to the gradient. The best single step, as other clients' batches judge it, is 0.010 to 0.022 with 4096
    numbers and 0.0033 to 0.0049 with 16 times as many, on models of 260 thousand and 135 million weights
    (`simulations/bytes`); with fewer it is no longer: 35 groups of 64 reach 3.58 with it and 3.89 with a sixth of it.

    K accumulators meet at every weight, along directions of variance 1: its change is sqrt(K) times as large.

    Raises:
        ClientError: if all weights are zero, of which a share is nothing.
    """
    if not rms > 0:
        raise ClientError(
            f"{client}: expected trained weights that are not all zero; got zeros; name others in method.trainable"
        )
    newest = ledger.bank.newest
    closer = max(1.0, (newest.stop - newest.start) / USUAL)
    return learning_rate * rms * 2.0**ledger.exponent / math.sqrt(closer * ledger.bank.seeds)


def adam(before: Moments, slopes: Array) -> tuple[Moments, Array]:
    """Return Adam's memory after a step, and the step: numbers of about 1 in size, with the sign of the slopes."""
    (first, second), steps = BETAS, before.steps + 1
    mean = first * before.mean + (1 - first) * slopes
    square = second * before.square + (1 - second) * np.square(slopes)
    size = np.sqrt(square / (1 - second**steps)) + ADAM_EPSILON
    return Moments(mean, square, steps), mean / (1 - first**steps) / size


def accumulators_at(ledger: SeedLedger, start: Array, newest: Array) -> Array:
    """Return all accumulators, those of the newest bank replaced by whole numbers; int32.

    Raises:
        RoundError: if a displacement could leave 32 bits.
    """
    sums = start.astype(np.int64)
    sums[ledger.bank.newest] = newest.astype(np.int64)
    return check_accumulators(ledger.bank, sums)


def small_numbers(moved: Array, *, bits: int, largest_shift: int) -> tuple[Array, int]:
    """Return numbers of so many bits, int8, and the shift with which they are nearest to what moved, by least squares.

    Of 8 bits that is the smallest shift at which the largest fits. Of 2 bits it is a smaller one: to fit a few outliers
    would round most of the others to zero.

    >>> small_numbers(np.array([300.0, -20.0, 2.0]), bits=8, largest_shift=20)
    (array([75, -5,  0], dtype=int8), 2)
    >>> small_numbers(np.array([9.0, -4.0, 4.0, -3.0, 4.0]), bits=2, largest_shift=20)
    (array([ 1, -1,  1, -1,  1], dtype=int8), 2)
    """
    most, shift = LARGEST_NUMBER[bits], 0
    largest = float(np.abs(moved).max(initial=0.0))
    while shift < largest_shift and round(math.ldexp(largest, -shift)) > most:
        shift += 1

    def numbers_with(shift: int) -> Array:
        return np.clip(np.rint(np.ldexp(moved, -shift)), -most, most)

    def error(shift: int) -> float:
        return float(np.square(moved - np.ldexp(numbers_with(shift), shift)).sum())

    # From the largest on, so that of equal ones it is the shift at which nothing is cut.
    shift = min(range(shift, max(-1, shift - CUTS - 1), -1), key=error)
    return numbers_with(shift).astype(np.int8), shift


def loss_at(
    position: Slope[B],
    collate: Callable[[Sequence[Example]], B],
    accumulators: Array,
    rows: Sequence[Example],
    batch: int,
) -> float | None:
    """Return the mean loss of some rows at w(A), in nats per token (causal) or example.

    None where nothing of them counts, or the loss is not finite: such steps are skipped, and the client's work is used.
    """
    total, count = 0.0, 0
    for part in parts_of(rows, collate, batch):
        total, count = total + position.loss(accumulators, part) * part.count, count + part.count
    return total / count if count and math.isfinite(total) else None


def parts_of(rows: Sequence[Example], collate: Callable[[Sequence[Example]], B], batch: int) -> Iterator[B]:
    """Yield rows in batches."""
    for begin in range(0, len(rows), batch):
        yield collate(rows[begin : begin + batch])


def check_skipped(skipped: int, where: str, loss: float, training: Training) -> None:
    """Raise ClientError if more steps were left out than a round may lose, or all of them."""
    if skipped > MAX_SKIPPED or skipped == training.steps:
        got = f"a loss of {loss:g}" if not math.isfinite(loss) else "slopes that are not"
        raise ClientError(
            f"{where}: expected a finite loss and slopes in all but {MAX_SKIPPED} steps, and in one at least; got "
            f"{skipped} without, the last with {got}, at descend.learning_rate {training.learning_rate:g}; "
            "lower it, or use another model.dtype"
        )
