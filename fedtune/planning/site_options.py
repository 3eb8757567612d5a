"""What each site of a cohort could do under its memory and a common end: depth, base format and batch, as arrays.

s: sites, o: options, b: batch sizes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from fedtune.messages import BaseDtype, Training
from fedtune.planning.allocation import Allocation, Targets
from fedtune.planning.deadline import candidate_ends
from fedtune.planning.planner import Cost
from fedtune.tensors import Array

LOST: Mapping[BaseDtype, float] = {"": 0.0, "int8": 0.005, "nf4": 0.02}
"""Share of what is learned that a format of the frozen base costs; assumed."""
BITS: Mapping[BaseDtype, int] = {"": 16, "int8": 8, "nf4": 4}
"""By which formats are preferred where they gain as much."""
MOST_BATCHES = 8
"""Halvings of a batch that are tried, its own size among them."""
ALIKE = 0.98
"""Share of the largest value from which on other things decide."""


@dataclass(frozen=True)
class Option:
    """A number format of the frozen base, and how many blocks are trained, from the top."""

    base_dtype: BaseDtype
    depth: int


@dataclass(frozen=True, eq=False)
class Table:
    """What every option costs sites of one kind; each cost is `at zero + per number * numbers trained`."""

    options: Sequence[Option]
    batches: Sequence[int]
    """Examples per forward pass, falling."""
    least: Array
    """(o,) Numbers of rank 1 in every module of the option."""
    memory_gb: Array
    """(o, b)"""
    gb_per_number: Array
    """(o, b)"""
    tflop: Array
    """(o,) Of a round with all steps."""
    tflop_per_number: Array
    megabytes: Array
    mb_per_number: Array


@dataclass(frozen=True, eq=False)
class Sites:
    """A cohort with its costs, (s, o) throughout unless said otherwise."""

    options: Sequence[Option]
    feasible: Array
    """Whether rank 1 everywhere fits the site's memory."""
    batch: Array
    """Place of the batch among the sites' own."""
    least: Array
    room: Array
    """Numbers that memory and the recipe's budget allow."""
    overhead_s: Array
    """(s, 1)"""
    transfer_s: Array
    """At rank 1 everywhere."""
    compute_s: Array
    """At rank 1 everywhere, with all steps."""
    transfer_per_number: Array
    compute_per_number: Array
    steps: Array
    """(s, 1) Of the recipe."""
    weights: Array
    """(s,)"""

    def seconds(self, numbers: Array, share: Array) -> Array:
        """Return how long a round takes with so many numbers and this share of the steps."""
        more = numbers - self.least
        transfer = self.transfer_s + more * self.transfer_per_number
        return np.asarray(self.overhead_s + transfer + share * (self.compute_s + more * self.compute_per_number))


@dataclass(frozen=True, eq=False)
class Fitting:
    """What fits an end of the round: budget, share of the steps, value and time of each option, (s, o)."""

    numbers: Array
    share: Array
    value: Array
    """-inf where the option is not done by then."""
    seconds: Array


def batch_sizes(training: Training) -> Sequence[int]:
    """Return the batches that a step may be split into, the recipe's own first: half of it, a quarter, ...

    >>> batch_sizes(Training(batch=12, accumulation=2))
    [12, 6, 3]
    """
    sizes = [training.batch]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    return sizes


def split(training: Training, batch: int) -> Training:
    """Return the same steps over smaller batches: a step sees as many examples as before.

    >>> split(Training(batch=12, accumulation=2), 3).accumulation
    8
    """
    return replace(training, batch=batch, accumulation=training.accumulation * (training.batch // batch))


def table_of(
    options: Sequence[Option],
    targets: Targets,
    training: Training,
    cost: Callable[[int, int, Training, BaseDtype], Cost],
) -> Table:
    """Return the costs of clients of one kind, from those of ranks 1 and 2: they are linear in the numbers trained.

    Args:
        options: to choose from.
        targets: the modules.
        training: as the recipe says.
        cost: (depth, rank, training, base format) -> what that costs.
    """
    batches = batch_sizes(training)
    costs = np.zeros((3, len(options), MOST_BATCHES, 2))
    for o, option in enumerate(options):
        for b, batch in enumerate(batches[:MOST_BATCHES]):
            for r in (0, 1):
                own = cost(option.depth, r + 1, split(training, batch), option.base_dtype)
                costs[:, o, b, r] = own.memory_gb, own.tflop, own.megabytes
        # Sites of one cohort may have recipes with fewer batches to choose from: the last one again changes nothing.
        costs[:, o, len(batches) :] = costs[:, o, len(batches[:MOST_BATCHES]) - 1][:, None]
    least = np.array([targets.numbers(option.depth) for option in options], np.float64)
    slope = np.maximum((costs[..., 1] - costs[..., 0]) / least[:, None], 1e-18)
    at_zero = costs[..., 0] - slope * least[:, None]
    batches = [*batches, *[batches[-1]] * MOST_BATCHES][:MOST_BATCHES]
    # Smaller batches do the same work: its time and traffic are those of the recipe's own.
    return Table(
        options,
        batches,
        least,
        memory_gb=at_zero[0],
        gb_per_number=slope[0],
        tflop=at_zero[1][:, 0],
        tflop_per_number=slope[1][:, 0],
        megabytes=at_zero[2][:, 0],
        mb_per_number=slope[2][:, 0],
    )


def sites(
    tables: Sequence[Table],
    *,
    memory_gb: Array,
    ranks: Array,
    compute: Array,
    transfer: Array,
    overhead: Array,
    steps: Array,
    weights: Array,
) -> Sites:
    """Return a cohort's options; for each the largest batch with which its whole budget fits, else the smallest.

    Args:
        tables: of each site, over the same options.
        memory_gb: of each site, infinite where it is not known.
        ranks: of each site by the recipe; it trains no more numbers than with that rank in every module of an option.
        compute: seconds per TFLOP.
        transfer: seconds per MB.
        overhead: seconds of a round that nothing changes.
        steps: of the recipe.
        weights: of the sites; they sum to 1.
    """
    least = np.array([table.least for table in tables], np.float64)  # (s, o)
    at_zero = np.array([table.memory_gb for table in tables])  # (s, o, b)
    per_number = np.array([table.gb_per_number for table in tables])
    room = (memory_gb[:, None, None] - at_zero) / per_number
    # By depth: else a site would leave blocks out to have more rank in the others, and breadth wins over rank.
    budgets = ranks[:, None] * least
    fits = room >= budgets[..., None]
    # A batch that leaves room for every rank that may be asked for costs nothing: activations are what memory is for.
    batch = np.where(fits.any(axis=2), fits.argmax(axis=2), at_zero.shape[2] - 1)
    room = np.minimum(np.take_along_axis(room, batch[..., None], axis=2)[..., 0], budgets)
    stack = {
        name: np.array([getattr(table, name) for table in tables])
        for name in ("tflop", "tflop_per_number", "megabytes", "mb_per_number")
    }
    compute, transfer = compute[:, None], transfer[:, None]
    return Sites(
        options=tables[0].options,
        feasible=room >= least,
        batch=batch,
        least=least,
        room=room,
        overhead_s=overhead[:, None],
        transfer_s=transfer * (stack["megabytes"] + least * stack["mb_per_number"]),
        compute_s=compute * (stack["tflop"] + least * stack["tflop_per_number"]),
        transfer_per_number=transfer * stack["mb_per_number"],
        compute_per_number=compute * stack["tflop_per_number"],
        steps=steps[:, None],
        weights=weights,
    )


def take(cohort: Sites, rows: Array) -> Sites:
    """Return some of the sites; the weights of the others are theirs in proportion."""
    parts = {each.name: getattr(cohort, each.name)[rows] for each in fields(cohort) if each.name != "options"}
    return Sites(cohort.options, **{**parts, "weights": parts["weights"] / max(parts["weights"].sum(), 1e-300)})


def fit(cohort: Sites, allocation: Allocation, end: float, *, least_share: float) -> Fitting:
    """Return what every option gains if the round ends then: fewer steps first where rank 1 is late, else more rank."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (end - cohort.overhead_s - cohort.transfer_s) / cohort.compute_s
        share = np.where(np.isnan(share), 1.0, np.clip(share, 0.0, 1.0))
        per_number = cohort.transfer_per_number + cohort.compute_per_number
        spare = (end - cohort.seconds(cohort.least, np.ones_like(share))) / per_number
    # Whole steps, rounded down: a little more than the share would end a little late.
    share = np.floor(share * cohort.steps + 1e-9) / cohort.steps
    in_time = cohort.feasible & (share >= np.minimum(least_share, 1.0)) & (share > 0)
    spare = np.where(np.isnan(spare), np.inf, np.maximum(spare, 0.0))
    numbers = np.where(share >= 1, np.minimum(cohort.room, cohort.least + spare), cohort.least)
    value = np.empty_like(numbers)
    for column, option in enumerate(cohort.options):
        gained = allocation.values(option.depth, numbers[:, column])
        value[:, column] = np.where(in_time[:, column], gained, 0.0) * share[:, column] * (1 - LOST[option.base_dtype])
    return Fitting(numbers, share, np.where(in_time, value, -np.inf), cohort.seconds(numbers, share))


def fastest(cohort: Sites, *, least_share: float) -> tuple[Array, Array]:
    """Return the place of each site's fastest option, and its share of the steps: for those that are always late."""
    share = np.maximum(1.0, np.ceil(least_share * cohort.steps)) / cohort.steps
    seconds = np.where(cohort.feasible, cohort.seconds(cohort.least, share), np.inf)
    return seconds.argmin(axis=1), share[:, 0]


def best_end(cohort: Sites, allocation: Allocation, *, least_share: float, server_s: float) -> float:
    """Return the end of the round with the largest value per second, summed over the sites by their weights.

    A site that is late with every option takes its fastest one, and the round then lasts as long as that.
    """
    quickest, least = fastest(cohort, least_share=least_share)
    rows, ones = np.arange(len(quickest)), np.ones_like(cohort.least)
    late_s = cohort.seconds(cohort.least, least[:, None])[rows, quickest]
    late_value = np.array(
        [
            (1 - LOST[cohort.options[o].base_dtype])
            * least[row]
            * float(allocation.values(cohort.options[o].depth, cohort.least[row, o : o + 1])[0])
            for row, o in enumerate(quickest.tolist())
        ]
    )
    times = [
        cohort.seconds(cohort.least, least[:, None]),
        cohort.seconds(cohort.least, ones),
        cohort.seconds(cohort.room, ones),
    ]
    best, best_value = float("inf"), -np.inf
    for end in candidate_ends(np.where(cohort.feasible, np.array(times), np.inf)).tolist():
        fitting = fit(cohort, allocation, end, least_share=least_share)
        chosen = fitting.value.argmax(axis=1)
        value, in_time = fitting.value[rows, chosen], np.isfinite(fitting.value[rows, chosen])
        last = float(np.where(in_time, fitting.seconds[rows, chosen], late_s).max())
        per_second = float(cohort.weights @ np.where(in_time, value, late_value)) / (last + server_s)
        # Rising ends: of values equal but for rounding the earliest one stays, on every machine.
        if per_second > best_value * (1 + 1e-12) or best_value == -np.inf:
            best, best_value = end, per_second
    return best


def prefer(cohort: Sites, fitting: Fitting) -> Array:
    """Return each site's option: of those within 2 % of its largest value more bits, a larger batch, less time, depth.

    Sites without an option have any.
    """
    value, time = fitting.value, fitting.seconds
    largest = value.max(axis=1, keepdims=True)
    near = np.where(np.isfinite(largest), value >= ALIKE * largest, True)
    bits = np.array([BITS[option.base_dtype] for option in cohort.options])
    depth = np.array([option.depth for option in cohort.options])
    rows = []
    for row in range(len(value)):
        keys = (-depth, time[row], cohort.batch[row], -bits, ~near[row])
        rows.append(int(np.lexsort(keys)[0]))
    return np.array(rows)
