"""From a space of settings to the values of a trial: drawn, enumerated, or those of another trial made a little other.

A draw depends on the search's seed, the number of the trial and the name of the setting, and on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

from fedtune.search.settings import Dimension, Range, SearchSettings, Value
from fedtune.seeds import derive, generator

DIGITS = 4
"""Significant digits of a drawn number: more say nothing, and a table and a recipe are read by people."""
TRIES = 64
"""How often a trial is drawn again whose values another one has, as with short lists."""
FACTORS = (0.8, 1.2)
"""By which `pbt` multiplies the numbers of a copied trial, Jaderberg et al., arXiv 1711.09846."""


def size(space: Mapping[str, Dimension]) -> int | None:
    """Return how many different trials there are; None for any number."""
    counts = [count_of(dimension) for dimension in space.values()]
    known = [count for count in counts if count is not None]
    return math.prod(known) if len(known) == len(counts) else None


def count_of(dimension: Dimension) -> int | None:
    if not isinstance(dimension, Range):
        return len(dimension)
    return int(dimension.high) - int(dimension.low) + 1 if dimension.whole else None


def grid(space: Mapping[str, Dimension]) -> Sequence[Mapping[str, Value]]:
    """Return every combination of the listed values and of the points of ranges, the last setting changing fastest."""
    lists = [points_of(dimension) if isinstance(dimension, Range) else dimension for dimension in space.values()]
    return [dict(zip(space, values, strict=True)) for values in product(*lists)]


def combinations(space: Mapping[str, Dimension]) -> int:
    """Return at most how many trials `grid` makes, without making them."""
    return math.prod((one.points or 2) if isinstance(one, Range) else len(one) for one in space.values())


def points_of(numbers: Range) -> Sequence[Value]:
    """Return evenly spread values of a range, both ends among them, each once.

    >>> points_of(Range(1e-4, 1e-2, log=True, points=3)), points_of(Range(1, 4, points=9))
    ([0.0001, 0.001, 0.01], [1, 2, 3, 4])
    """
    count = numbers.points or 2
    return list(dict.fromkeys(value_at(numbers, place / (count - 1)) for place in range(count)))


def value_at(numbers: Range, share: float) -> Value:
    """Return the value of a range at a share of its length, or of that of its logarithms."""
    if numbers.log:
        value = math.exp(math.log(numbers.low) + share * (math.log(numbers.high) - math.log(numbers.low)))
    else:
        value = numbers.low + share * (numbers.high - numbers.low)
    return within(numbers, value)


def within(numbers: Range, value: float) -> Value:
    """Return a number rounded as values are, and not beyond the ends of the range."""
    rounded = round(value) if numbers.whole else float(f"{value:.{DIGITS}g}")
    return min(max(rounded, numbers.low), numbers.high)


def draw_values(
    settings: SearchSettings, seed: int, trial: int, others: Sequence[Mapping[str, Value]]
) -> Mapping[str, Value]:
    """Return the values of a trial, drawn independently of each other and, as far as can be, unlike those of others."""
    values: Mapping[str, Value] = {}
    for attempt in range(TRIES):
        values = {
            key: draw(dimension, derive(seed, "search", trial, f"{key}#{attempt}" if attempt else key))
            for key, dimension in settings.space.items()
        }
        if values not in others:
            break
    return values


def draw(dimension: Dimension, key: int) -> Value:
    """Return one value of a dimension; each of a list, and each whole number of a range, is as likely as the others."""
    rng = generator(key)
    if not isinstance(dimension, Range):
        return dimension[int(rng.integers(len(dimension)))]
    if dimension.whole and not dimension.log:
        return int(rng.integers(int(dimension.low), int(dimension.high) + 1))
    return value_at(dimension, float(rng.random()))


def perturb(
    values: Mapping[str, Value], space: Mapping[str, Dimension], seed: int, trial: int, until: int
) -> Mapping[str, Value]:
    """Return values whose numbers of ranges are multiplied by 0.8 or 1.2 and kept in range; those of lists stay."""
    changed = dict(values)
    for key, dimension in space.items():
        if isinstance(dimension, Range):
            rng = generator(derive(seed, "search.pbt", until, f"{trial}.{key}"))
            factor = FACTORS[int(rng.integers(len(FACTORS)))]
            value = within(dimension, factor * values[key])
            if value == values[key] and dimension.whole:  # 0.8 times 2 is 2 again
                value = within(dimension, values[key] + (1 if factor > 1 else -1))
            changed[key] = value
    return changed
