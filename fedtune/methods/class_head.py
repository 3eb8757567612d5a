"""A classification head in one round before training: diagonal discriminant analysis of the clients' class sums.

A drawn head says nothing of the classes, so the first rounds go into it, and a method that only measures losses has no
slope to measure. The head here needs three sums of each client: the examples of each class, their features, and the
squares of these. It is the linear discriminant of Fisher with the covariance taken as diagonal (Bickel and Levina,
Bernoulli 10(6), 2004: with more features than examples can tell apart, correlations are better left out), its variances
shrunk towards their mean (Friedman, JASA 84, 1989, equation 18).

C: classes, d: features, n_c: examples of class c, m_c: mean of its features, m: of all, v: variance within classes
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

from fedtune.class_sums import FRACTION_BITS, MOST_EXAMPLES, ClassSums, Head, add, find_head, root_mean_square
from fedtune.errors import RoundError
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    Plan,
    PlannedClient,
    SumClasses,
    Training,
    Weight,
)
from fedtune.methods.change import Change
from fedtune.methods.fedkseed_state import FedKSeedState, with_new_head
from fedtune.methods.method import Method, accept, no_displacement, no_other_assignment
from fedtune.seeds import derive
from fedtune.tensors import Array, Tensors

SHRINKAGE = 0.1
"""Share of the mean variance in each feature's: one that hardly varies would decide alone."""
CAUTION = (4.0, 1.2)
"""(a, b): the features' part of the scores is divided by a + b D, D the root mean square distance of the classes' means
from the mean of all, in standard deviations. Features of an encoder are correlated, and scores that take them for
independent are too large by more the further the classes lie apart: the best divisors of MiniLM's features were 6 (2
classes, D = 1.5) and 23 (77 classes, D = 18) for the mean, 4 and 32 for the first token's state."""


def head_round(method: Method[Any], blueprint: Blueprint, labels: Sequence[str]) -> Method[Any]:
    """Return the method of a run's first round, which gives the state of `method` a head and trains nothing.

    Args:
        method: of the rounds after it.
        blueprint: whose `saved` holds the head that is replaced.
        labels: names of the classes, by row of the head.

    Raises:
        ShapeError: if the head is not among what is trained in full, or has no bias.
    """
    shapes = {name: array.shape for name, array in blueprint.saved.items()}
    head = find_head(shapes, len(labels))

    def aggregate(state: Any, updates: Sequence[AdmittedUpdate]) -> Any:
        total = total_of(updates)
        check_classes(total, labels, round=state.round + 1)
        return with_head(state, discriminant(total, head))

    own = {field.name: getattr(method, field.name) for field in fields(Method)}
    return Method(
        **{
            **own,
            "assign": partial(assign, method.name),
            "aggregate": aggregate,
            "change": change,
            "displacement": no_displacement,
            "assign_whole": no_other_assignment,
            "refuse": accept,
            "task": SumClasses,
        }
    )


def assign(method: str, state: Any, seed: int, planned: PlannedClient) -> Assignment:
    """Ask for the sums of all of a client's examples."""
    client, number = planned.plan.client, state.round + 1
    # Nothing is trained: of the plan only the rows of a forward pass are used.
    plan = Plan(client, rank=1, scale=1.0, training=Training(batch=planned.plan.training.batch, steps=1))
    return Assignment(method, number, derive(seed, "client", number, client), plan, SumClasses(FRACTION_BITS))


def change(state: Any, blueprint: Blueprint, assignment: Assignment, update: AdmittedUpdate) -> Iterator[Change]:
    """Yield the size of a client's features, which the cohort's median bounds: all clients have one encoder."""
    bits = assignment.sums.fraction_bits
    yield Change(features={"features": root_mean_square(update.class_sums, fraction_bits=bits)})


def total_of(updates: Sequence[AdmittedUpdate]) -> ClassSums:
    """Return the sums of a cohort, each client's in proportion to what it counts; whole numbers, so in any order."""
    weights = [update.weight or Weight(update.num_examples, 1) for update in updates]
    parts = [update.class_sums for update in updates]
    as_enrolled = all(weight.examples == part.examples for weight, part in zip(weights, parts, strict=True))
    if as_enrolled and sum(part.examples for part in parts) <= MOST_EXAMPLES:
        return add(parts)
    return add([in_proportion(part, weight.examples) for weight, part in zip(weights, parts, strict=True)])


def in_proportion(part: ClassSums, examples: int) -> ClassSums:
    """Return sums as if a client had so many examples, in Python's own whole numbers, rounded to the nearest."""
    share = Fraction(examples, part.examples)
    scale = np.frompyfunc(lambda number: round(int(number) * share), 1, 1)
    return ClassSums(scale(part.counts), scale(part.sums), scale(part.squares))


def check_classes(total: ClassSums, labels: Sequence[str], *, round: int) -> None:
    """Refuse to make a head without an example of each class.

    Raises:
        RoundError: naming the classes.
    """
    empty = [name for name, count in zip(labels, total.counts, strict=True) if not count]
    if not empty:
        return
    named = ", ".join(map(repr, empty[:5])) + f" and {len(empty) - 5} more" * (len(empty) > 5)
    raise RoundError(
        f"round {round}: expected an example of each class for the head of adapter.head = 'lda'; got none of class "
        f"{named} at any client of the round; start another run without {'it' if len(empty) == 1 else 'them'} in the "
        "data, with the clients that have some, or with adapter.head = 'drawn'",
        final=True,
    )


def discriminant(total: ClassSums, head: Head) -> Tensors:
    """Return weight and bias of the head, float32: score_c(x) = t (x - (m_c + m) / 2) (m_c - m) / v + log(n_c / n).

    With t as `CAUTION` says. What all classes have in common is left out, which no probability depends on: the weights
    of two classes of equal size are each other's negatives.
    """
    counts, sums, squares = (as_floats(array) for array in (total.counts, total.sums, total.squares))
    unit = 2.0**-FRACTION_BITS
    n = counts.sum()
    means, middle = sums / counts[:, None], sums.sum(0) / n
    within = squares - (np.square(sums) / counts[:, None]).sum(0)
    variance = np.maximum(within, 0.0) / max(1.0, n - head.classes)
    variance = (1 - SHRINKAGE) * variance + SHRINKAGE * variance.mean()
    # A quarter of a unit's square is what rounding alone makes of features that do not vary.
    variance = np.maximum(variance, 0.25)
    distances = (np.square(means - middle) / variance).sum(1)  # (C,), squared
    share = 1 / (CAUTION[0] + CAUTION[1] * np.sqrt((counts / n * distances).sum()))
    weight = share * (means - middle) / variance / unit
    bias = np.log(counts / n) - share * ((np.square(means) - np.square(middle)) / (2 * variance)).sum(1)
    return {head.weight: weight.astype(np.float32), head.bias: bias.astype(np.float32)}


def as_floats(whole: Array) -> Array:
    """Return whole numbers of any size as float64, each rounded once."""
    return np.array([float(number) for number in whole.ravel().tolist()]).reshape(whole.shape)


def with_head(state: Any, head: Tensors) -> Any:
    """Return the state after the round: with the head in place of the former one, and nothing else moved."""
    if isinstance(state, FedKSeedState):
        return with_new_head(state, head)
    if hasattr(state, "inner"):
        return replace(state, inner=with_head(state.inner, head))
    return replace(state, saved={**state.saved, **head}, round=state.round + 1)
