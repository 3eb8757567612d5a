"""What one update changes, by roles that are bounded apart; what aggregation sums follows from the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedtune.lora.adapter import Adapter, Factors, draw_a
from fedtune.messages import AdmittedUpdate, Assignment, Blueprint, ProbeSeeds, Role, Size, TrainLora
from fedtune.tensors import Array, Tensors, squared_norm


@dataclass(frozen=True)
class Change:
    """What one client changed, each part its end minus its start."""

    product: Adapter = field(default_factory=dict)
    """b a of every layer, in factors and in the base's coordinates: what the weights of the model move by."""
    factors: Tensors = field(default_factory=dict)
    """Every number of the factors that was trained; b carries the scale. A mean of factors moves by these."""
    saved: Tensors = field(default_factory=dict)
    """modules_to_save."""
    scalars: Tensors = field(default_factory=dict)
    """Of a `ProbeSeeds` task."""
    start: float = 0.0
    """Norm of the factors before training, or a little more: weight decay moves them in proportion to it."""
    rounded: float = 0.0
    """Of them, what has travelled back with the change, and was rounded with it: 0 where the client sent the
    difference."""


def change_of(saved: Tensors, blueprint: Blueprint, assignment: Assignment, update: AdmittedUpdate) -> Change:
    """Return what an update of the whole model changes, from its task alone; `TrainLora` says where that starts.

    Args:
        saved: the server's modules_to_save.
        blueprint: of the base.
        assignment: that the update answers.
        update: which fits it.
    """
    task = assignment.task
    if isinstance(task, ProbeSeeds):
        return Change(scalars={"scalars": update.probe.scalars.astype(np.float32)})
    sent, product, factors, start = update.lora.tensors, dict[str, Factors](), dict[str, Array](), 0.0
    for name, (_, n) in sorted(blueprint.modules.items()):
        a0, b0 = start_of(task, name, update_b=sent[f"{name}.b"], rank=assignment.plan.rank, in_features=n)
        end_a, da = end_and_change(sent.get(f"{name}.a"), a0, task)
        _, db = end_and_change(sent[f"{name}.b"].T, pad_rows(b0.T, len(a0)), task)
        product[name] = product_change(end_a, da=da, db=db.T, b0=b0)
        # Of the ranks that were sent: one that a client of HetLoRA has cut is no number that enters a mean.
        rank = sent[f"{name}.b"].shape[1]
        factors[f"{name}.b"] = db.T[:, :rank]
        if task.train == "ab":
            factors[f"{name}.a"] = da[:rank]
        start += quick_square(b0) + (quick_square(a0) if task.train == "ab" else 0.0)
    norm = float(np.sqrt(start))
    rounded = norm if task.upload == "factors" else 0.0
    return Change(product, factors, saved_change(saved, update), start=norm, rounded=rounded)


def start_of(task: TrainLora, name: str, *, update_b: Array, rank: int, in_features: int) -> tuple[Array, Array]:
    """Return a (rank, in) and b (out, p) that a task starts one layer from, float32; b is zero beyond p columns."""
    blob = task.blobs.get("local", {})
    sent_a, sent_b = blob.get(f"{name}.a"), blob.get(f"{name}.b")
    b0 = np.zeros((len(update_b), 0), np.float32) if sent_b is None else sent_b.astype(np.float32, copy=False)
    if sent_a is not None and len(sent_a) == rank:
        return sent_a.astype(np.float32, copy=False), b0
    a0 = draw_a(task.a_key, name, rank, in_features)
    if sent_a is not None:
        a0[: len(sent_a)] = sent_a
    return a0, b0


def end_and_change(sent: Array | None, start: Array, task: TrainLora) -> tuple[Array, Array]:
    """Return (end, end minus start) of a factor whose first axis is the rank, float32; None: it was not trained."""
    if sent is None:
        return start, np.zeros((0, start.shape[1]), np.float32)
    wide = sent.astype(np.float32, copy=False)
    # Finite numbers may have an infinite sum: its norm is one that no bound admits.
    with np.errstate(over="ignore"):
        if task.upload == "difference":
            return start + wide, wide
        end = pad_rows(wide, len(start))  # ranks that a client has cut are gone
        return end, end - start


def pad_rows(rows: Array, count: int) -> Array:
    if len(rows) == count:
        return rows
    return np.concatenate([rows, np.zeros((count - len(rows), rows.shape[1]), rows.dtype)])


def product_change(end_a: Array, *, da: Array, db: Array, b0: Array) -> Factors:
    """Return b a at the end minus b a at the start, as db (a0 + da) + b0 da: nothing large cancels, nothing is dense.

    Args:
        end_a: a0 + da, (r, in).
        da: (r, in), or without rows where a did not move.
        db: (out, r).
        b0: (out, p), p at most r; b's columns from p on started at zero.

    >>> one = np.ones((1, 1), np.float32)
    >>> change = product_change(2 * one, da=one, db=one, b0=one)
    >>> (change.b @ change.a).tolist()
    [[3.0]]
    """
    p = b0.shape[1]
    if not len(da) or not p:
        return Factors(a=end_a, b=db)
    return Factors(a=np.concatenate([end_a, da[:p]]), b=np.concatenate([db, b0], axis=1))


def saved_change(saved: Tensors, update: AdmittedUpdate) -> Tensors:
    with np.errstate(over="ignore"):
        return {name: array - saved[name] for name, array in update.lora.saved.items()}


def sizes(change: Change) -> Mapping[Role, Size]:
    """Return the norm of every role that a change has, with the part that has the largest share of it.

    A norm is not finite where a number, or what it makes of the model, is none that float32 can hold.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        squares: Mapping[Role, Mapping[str, float]] = {
            "change": {name: squared_product(factors) for name, factors in change.product.items()},
            "factors": {name: quick_square(array) for name, array in change.factors.items()},
            "saved": {name: squared_norm(array) for name, array in change.saved.items()},
            "scalars": {name: squared_norm(array) for name, array in change.scalars.items()},
        }
    return {role: size_of(parts) for role, parts in squares.items() if parts}


def squared_product(factors: Factors) -> float:
    """Return the squared Frobenius norm of b a, from r x r matrices in float64."""
    b, a = factors.b.astype(np.float64), factors.a.astype(np.float64)  # once each: the copies are most of the work
    return float(np.sum((b.T @ b) * (a @ a.T)))


def quick_square(array: Array) -> float:
    """Return a sum of squares that is held against a bound: in float32, and in float64 where that is too small."""
    flat = array.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(flat @ flat)
    return square if np.isfinite(square) else squared_norm(array)


def size_of(squares: Mapping[str, float]) -> Size:
    """Return the root of a sum of squared norms, and the name of the largest."""
    # NaN counts as the largest. By name first: of equal parts the same is named everywhere.
    largest = max(sorted(squares), key=lambda name: np.inf if np.isnan(squares[name]) else squares[name])
    total = sum(squares.values())
    # Rounding can leave a sum of squares a little below zero; NaN must stay what it is.
    return Size(0.0 if total < 0 else float(np.sqrt(total)), largest)
