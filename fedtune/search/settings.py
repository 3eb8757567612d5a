"""The recipe's table `search`: which settings are tried, how many trials there are, and for how many rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge

SearchKind: TypeAlias = Literal["random", "grid", "tpe", "sha", "asha", "pbt"]
ValidationMetric: TypeAlias = Literal["loss", "perplexity", "bits_per_character", "accuracy", "macro_f1"]
Value: TypeAlias = Any
"""What a recipe's key may hold: a number, a text, true or false, or a list of them."""


@dataclass(frozen=True)
class Range:
    """Numbers that a setting may have; whole ones where both ends are."""

    low: int | float
    """Smallest value."""
    high: int | float
    """Largest value, above `low`."""
    log: bool = False
    """Whether values are spread evenly over their logarithms, as learning rates are; then `low` is above 0."""
    points: Annotated[int, Ge(2)] | None = None
    """Values that `kind = "grid"` tries, both ends among them; the other kinds draw from the whole range."""

    @property
    def whole(self) -> bool:
        """Whether all values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


Dimension: TypeAlias = Range | Sequence[Value]
"""What a setting may be: a range of numbers, or a list of values."""


@dataclass(frozen=True)
class SearchSettings:
    """What `fedtune search` tries; the recipe's table `search`. `fedtune simulate` and all other commands ignore it."""

    kind: SearchKind = "random"
    """random: independent draws; grid: every combination; tpe: draws where earlier trials were good (the extra
    `search`); sha: all trials run some rounds, the best go on, and so on (successive halving); asha: the same, where
    each trial goes on as soon as it is among the best so far; pbt: all trials go on, and after some rounds the worst
    quarter continues from the model of a better one with its settings times 0.8 or 1.2 (population based training)."""
    trials: Annotated[int, Ge(1)] | None = None
    """Trials to run; none: every combination with grid; 16 with the other kinds, or all there are if fewer."""
    score: str = "validation"
    """validation: the clients' held-out rows, pooled. Nothing else: a model that was chosen by its test score has none
    left that says how good it is."""
    metric: ValidationMetric = "loss"
    """Which of the scores on these rows decides; of loss, perplexity and bits_per_character lower is better."""
    first_rung: Annotated[int, Ge(1)] | None = None
    """Rounds after which trials are first compared; with sha and asha 1 by default, and the number is multiplied by
    `reduction` until `rounds.count`. With random, grid and tpe all trials run all rounds, and are scored there too, to
    show how well early scores predict final ones; none scores them at the end alone."""
    reduction: Annotated[int, Ge(2)] = 3
    """Of so many trials one goes on, for so many times as many rounds."""
    interval: Annotated[int, Ge(1)] | None = None
    """With pbt: rounds after which the worst copy the better ones; none: a fifth of `rounds.count`."""
    seed: Annotated[int, Ge(0)] | None = None
    """Seed of the draws; none takes the recipe's. All trials train with the recipe's own seed."""
    space: Mapping[str, Dimension] = field(default_factory=dict)
    """The settings to try, by their dotted keys: lists of values, or ranges { low, high, log, points }."""


USUAL_TRIALS = 16
"""Of a search that does not say how many."""
HALVING = ("sha", "asha")
"""Kinds whose trials do not all run all rounds."""


def rungs(settings: SearchSettings, rounds: int) -> tuple[int, ...]:
    """Return after how many rounds trials are compared, the last of them all rounds of the recipe.

    >>> rungs(SearchSettings(kind="sha", first_rung=2), 20), rungs(SearchSettings(), 20)
    ((2, 6, 18, 20), (20,))
    """
    if settings.kind == "pbt":
        step = interval(settings, rounds)
        return (*range(step, rounds, step), rounds)
    first = settings.first_rung or (1 if settings.kind in HALVING else rounds)
    steps = []
    while first < rounds:
        steps.append(first)
        first *= settings.reduction
    return (*steps, rounds)


def interval(settings: SearchSettings, rounds: int) -> int:
    """Return after how many rounds the worst trials of `pbt` copy better ones."""
    return settings.interval or max(1, rounds // 5)
