"""What one update changes, by roles that are bounded apart; what aggregation sums follows from the same numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from fedtune.lora.adapter import Factors, draw_a
from fedtune.messages import AdmittedUpdate, Assignment, Blueprint, ProbeResult, Role, Size, TrainLora
from fedtune.number_formats import from_wire
from fedtune.tensors import Array, Tensors, squared_norm

Terms: TypeAlias = Sequence[Factors]
"""One or two products b a that add up to the change of a layer."""

SMALL = 2**13
"""Numbers of a factor below which float64 costs no more than to see whether float32 would do."""
EXACT = (1e-12, 1e12)
"""Least squared norm of a product, and largest of a factor's row, that float32 gives as well as a bound needs."""
CANCELLED = 0.01
"""Share of its terms' squares that may be left of a product's before float32 has lost too many digits of it."""


@dataclass(frozen=True)
class Change:
    """What one client changed in some layers, or beside them; each part its end minus its start."""

    product: Mapping[str, Terms] = field(default_factory=dict)
    """b a of a layer, in the base's coordinates: what the weights of the model move by."""
    factors: Tensors = field(default_factory=dict)
    """Every number of the factors that was trained; b carries the scale. A mean of factors moves by these."""
    saved: Tensors = field(default_factory=dict)
    """modules_to_save."""
    scalars: Tensors = field(default_factory=dict)
    """Of seeds that were measured."""
    numbers: Tensors = field(default_factory=dict)
    """What accumulators move by, where a client has descended."""
    features: Tensors = field(default_factory=dict)
    """Of a `SumClasses` task: the root mean square of each."""
    start: float = 0.0
    """Squared norm of the factors before training, or a little more: weight decay moves them in proportion to it."""
    rounded: float = 0.0
    """Of it, what has travelled back with the change, and was rounded with it: 0 where the client sent the
    difference."""


@dataclass(frozen=True)
class Extent:
    """How much one update changes."""

    sizes: Mapping[Role, Size]
    """By role that the change has. A norm is not finite where a number, or what it makes of the model, is none that
    float32 can hold."""
    factors: Mapping[str, int]
    """Numbers that were trained, by factor."""
    saved: Mapping[str, int]
    """The same, by parameter."""
    start: float
    """Norm of the factors before training; see `Change`."""
    rounded: float


def change_of(
    saved: Tensors,
    blueprint: Blueprint,
    assignment: Assignment,
    update: AdmittedUpdate,
    drawn: Mapping[str, Array] | None = None,
) -> Iterator[Change]:
    """Yield what an update of the whole model changes, from its task alone; `TrainLora` says where that starts.

    A layer at a time: the change of a whole model would be several times the update, and most of the time that it
    takes is that of getting so much memory.

    Args:
        saved: the server's modules_to_save.
        blueprint: of the base.
        assignment: that the update answers.
        update: which fits it.
        drawn: by module, A as every client draws it, where that is drawn already; smaller ranks are its first rows.
    """
    task = assignment.task
    if not isinstance(task, TrainLora):
        result = update.seeds
        if isinstance(result, ProbeResult):
            yield Change(scalars={"scalars": result.scalars.astype(np.float32)})
        else:
            # Of another size than scalars: these are bounded apart, in the accumulators' own units.
            yield Change(numbers={"numbers": np.ldexp(result.numbers.astype(np.float32), result.shift)})
        return
    task = assignment.lora
    # Numbers, where codes were sent: a client starts from what it could decode.
    task = replace(task, blobs={role: from_wire(tensors) for role, tensors in task.blobs.items() if role == "local"})
    sent, ranks = update.lora.tensors, assignment.plan.rank_of(blueprint.modules)
    for name, (_, n) in sorted(blueprint.modules.items()):
        if name not in ranks:
            continue
        fresh = drawn[name] if drawn else None
        a0, b0 = start_of(task, name, update_b=sent[f"{name}.b"], rank=ranks[name], in_features=n, drawn=fresh)
        end_a, da = end_and_change(sent.get(f"{name}.a"), a0, task)
        _, db = end_and_change(sent[f"{name}.b"].T, pad_rows(b0.T, len(a0)), task)
        # Of the ranks that were sent: one that a client of HetLoRA has cut is no number that enters a mean.
        rank = sent[f"{name}.b"].shape[1]
        factors = {f"{name}.b": db.T[:, :rank]}
        if task.train == "ab":
            factors[f"{name}.a"] = da[:rank]
        start = quick_square(b0) + (quick_square(a0) if task.train == "ab" else 0.0)
        product = {name: product_terms(end_a, da=da, db=db.T, b0=b0)}
        yield Change(product, factors, start=start, rounded=start if task.upload == "factors" else 0.0)
    yield Change(saved=saved_change(saved, update))


def start_of(
    task: TrainLora, name: str, *, update_b: Array, rank: int, in_features: int, drawn: Array | None = None
) -> tuple[Array, Array]:
    """Return a (rank, in) and b (out, p) that a task starts one layer from, float32; b is zero beyond p columns."""
    blob = task.blobs.get("local", {})
    sent_a, sent_b = blob.get(f"{name}.a"), blob.get(f"{name}.b")
    b0 = np.zeros((len(update_b), 0), np.float32) if sent_b is None else sent_b.astype(np.float32, copy=False)
    if sent_a is not None and len(sent_a) == rank:
        return sent_a.astype(np.float32, copy=False), b0
    if sent_a is None and drawn is not None:
        return drawn[:rank], b0
    a0 = draw_a(task.a_key, name, rank, in_features)
    if sent_a is not None:
        a0[: len(sent_a)] = sent_a
    return a0, b0


def end_and_change(sent: Array | None, start: Array, task: TrainLora) -> tuple[Array, Array]:
    """Return (end, end minus start) of a factor whose first axis is the rank, float32; None: it was not trained."""
    if sent is None:
        return start, np.zeros((0, start.shape[1]), np.float32)
    wide = sent.astype(np.float32, copy=False)
    if task.upload == "difference" and len(wide) == len(start):
        return start + wide, wide
    trained = start[: len(wide)] + wide if task.upload == "difference" else wide
    end = pad_rows(trained, len(start))  # ranks that a client has cut are gone
    return end, end - start


def pad_rows(rows: Array, count: int) -> Array:
    if len(rows) == count:
        return rows
    return np.concatenate([rows, np.zeros((count - len(rows), rows.shape[1]), rows.dtype)])


def product_terms(end_a: Array, *, da: Array, db: Array, b0: Array) -> Terms:
    """Return b a at the end minus b a at the start, as db (a0 + da) + b0 da: nothing large cancels, nothing is dense.

    Args:
        end_a: a0 + da, (r, in).
        da: (r, in), or without rows where a did not move.
        db: (out, r).
        b0: (out, p), p at most r; b's columns from p on started at zero.
    """
    p = b0.shape[1]
    moved = Factors(a=end_a, b=db)
    return (moved, Factors(a=da[:p], b=b0)) if len(da) and p else (moved,)


def product_change(terms: Terms) -> Factors:
    """Return the sum of terms as one product, of the sum of their ranks.

    >>> one = np.ones((1, 1), np.float32)
    >>> change = product_change(product_terms(2 * one, da=one, db=one, b0=one))
    >>> (change.b @ change.a).tolist()
    [[3.0]]
    """
    if len(terms) == 1:
        return terms[0]
    return Factors(a=np.concatenate([term.a for term in terms]), b=np.concatenate([term.b for term in terms], axis=1))


def saved_change(saved: Tensors, update: AdmittedUpdate) -> Tensors:
    return {name: array - saved[name] for name, array in update.lora.saved.items()}


def extent_of(parts: Iterable[Change]) -> Extent:
    """Return how much the parts of a change make up together; each is dropped before the next is computed."""
    squares: dict[Role, dict[str, float]] = {
        "change": {},
        "factors": {},
        "saved": {},
        "scalars": {},
        "numbers": {},
        "features": {},
    }
    factors, saved, start, rounded = dict[str, int](), dict[str, int](), 0.0, 0.0
    # Finite numbers may have sums and products that are not, which are computed in here too: no bound admits those.
    with np.errstate(over="ignore", invalid="ignore"):
        for part in parts:
            for name, terms in part.product.items():
                squares["change"][name] = squared_product(terms)
            for name, array in part.factors.items():
                squares["factors"][name], factors[name] = quick_square(array), array.size
            for name, array in part.saved.items():
                squares["saved"][name], saved[name] = squared_norm(array), array.size
            for name, array in part.scalars.items():
                squares["scalars"][name] = squared_norm(array)
            for name, array in part.numbers.items():
                squares["numbers"][name] = squared_norm(array)
            for name, array in part.features.items():
                squares["features"][name] = squared_norm(array)
            start, rounded = start + part.start, rounded + part.rounded
    sizes = {role: size_of(parts) for role, parts in squares.items() if parts}
    return Extent(sizes, factors, saved, float(np.sqrt(start)), float(np.sqrt(rounded)))


def squared_product(terms: Terms) -> float:
    """Return the squared Frobenius norm of a sum of products, from r x r matrices: of float32 where that will do.

    For large factors that is an eighth of the time, and the norm is within a thousandth. Numbers that are too large or
    too small for it, and terms that cancel each other, are summed in float64.
    """
    if all(factor.size >= SMALL and factor.dtype == np.float32 for term in terms for factor in (term.a, term.b)):
        square, own, largest = 0.0, 0.0, 0.0
        for place, left in enumerate(terms):
            for right in terms[place:]:
                b, a = left.b.T @ right.b, left.a @ right.a.T  # (r, r')
                if left is right:
                    own += float(np.dot(b.diagonal(), a.diagonal()))
                    largest = max(largest, float(b.diagonal().max()), float(a.diagonal().max()))
                square += (1.0 if left is right else 2.0) * float(np.vdot(b, a))
        least, most = EXACT
        # A comparison with what is no number is false, so it is left to float64.
        if largest <= most and own < math.inf and square >= max(least, CANCELLED * own):
            return square
    return exact_square(product_change(terms))


def exact_square(factors: Factors) -> float:
    """Return the squared Frobenius norm of b a in float64."""
    b, a = factors.b.astype(np.float64), factors.a.astype(np.float64)  # once each: the copies are most of the work
    return float(np.sum((b.T @ b) * (a @ a.T)))


def quick_square(array: Array) -> float:
    """Return a sum of squares that is held against a bound: in float32, and in float64 where that is too small.

    It is finite where, and only where, every number is. The caller silences numpy, which warns of what is not: that
    once for each tensor would take as long as the sum.
    """
    # No copy of float32, whichever axis comes first.
    flat = array.astype(np.float32, copy=False).ravel(order="K")
    square = float(np.dot(flat, flat))
    return square if math.isfinite(square) else squared_norm(array)


def size_of(squares: Mapping[str, float]) -> Size:
    """Return the root of a sum of squared norms, and the name of the largest."""
    # NaN counts as the largest. By name first: of equal parts the same is named everywhere.
    largest = max(sorted(squares), key=lambda name: np.inf if np.isnan(squares[name]) else squares[name])
    total = sum(squares.values())
    # Rounding can leave a sum of squares a little below zero; NaN must stay what it is.
    return Size(0.0 if total < 0 else float(np.sqrt(total)), largest)
