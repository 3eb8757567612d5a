"""How much a larger rank would help each adapted layer, measured on a client's examples in one pass.

Ours, after what is known of FedPipe (Fang et al., arXiv 2404.06448), whose formula is not published: "SVD and
sensitivity of the adapters". r: rank, n: in features, m: out features
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch

from fedtune.data.encode import Example
from fedtune.lora.adapter import Adapter, Factors, draw_a
from fedtune.messages import Assignment, ImportanceName
from fedtune.model.base import Base
from fedtune.model.batches import collate
from fedtune.model.lora import frozen_change, layers, with_adapters
from fedtune.model.loss import summed_loss
from fedtune.model.train import autocast, training_mode, uses_autocast
from fedtune.probing.order import batches
from fedtune.seeds import derive
from fedtune.tensors import Array, Tensors

BATCHES = 8
"""Over which gradients are averaged: those of a single one are mostly noise."""
PROBE_RANK = 4
"""Of the fresh adapter beside the trained one, whose B is zero: each of its rows is one draw."""
MEMORY = 0.85
"""AdaLoRA's beta_1 and beta_2, as in PEFT."""

Gradients: TypeAlias = Mapping[str, Factors]
"""Of a and of b as it is trained, without the scale, by module."""


def before_training(
    base: Base, examples: Sequence[Example], assignment: Assignment, initial: Adapter
) -> tuple[Mapping[str, float], int]:
    """Return the scores that a fresh adapter beside the received one gives, by module, and the tokens it took."""
    name = assignment.plan.importance
    if name not in FRESH:
        return {}, 0
    key = derive(assignment.seed, "importance.a")
    probes = {name: draw_a(key, name, PROBE_RANK, factors.shape[1]) for name, factors in initial.items()}
    mean, tokens = mean_gradients(base, examples, assignment, beside(initial, probes))
    # Of the fresh columns of B alone: those of the received adapter say what it has left to learn.
    return {
        name: FRESH[assignment.plan.importance](factors.b[:, -PROBE_RANK:], probes[name], assignment.plan.scale)
        for name, factors in mean.items()
    }, tokens


def after_training(
    base: Base, examples: Sequence[Example], assignment: Assignment, final: Adapter, saved: Tensors | None = None
) -> tuple[Mapping[str, float], int]:
    """Return the scores of a trained adapter's own factors, by module, and the tokens they took.

    Args:
        base: as it was trained on.
        examples: the client's own.
        assignment: that it answers.
        final: the trained factors.
        saved: modules_to_save as trained.
    """
    if saved:
        task = replace(assignment.lora, blobs={**assignment.lora.blobs, "saved": saved})
        assignment = replace(assignment, task=task)
    match assignment.plan.importance:
        case "svd":
            mean, tokens = mean_gradients(base, examples, assignment, final)
            scale = assignment.plan.scale
            scores = {name: svd_sensitivity(final[name], grad.a, scale=scale) for name, grad in mean.items()}
            return scores, tokens
        case "adalora":
            return adalora_scores(base, examples, assignment, final)
        case _:
            return {}, 0


def beside(initial: Adapter, probes: Mapping[str, Array]) -> Adapter:
    """Return an adapter with more rows in A, and columns of zero for them in B: it gives what it gave."""
    return {
        name: Factors(
            a=np.concatenate([factors.a, probes[name]]),
            b=np.concatenate([factors.b, np.zeros((len(factors.b), len(probes[name])), np.float32)], axis=1),
        )
        for name, factors in initial.items()
    }


def first_step_gain(b: Array, a: Array, scale: float) -> float:
    """Return sum |gradient of B|, (m, r): what a first step of Adam, which moves each number alike, gains."""
    return float(np.abs(b).sum())


def squared_gradient(b: Array, a: Array, scale: float) -> float:
    """Return an unbiased estimate of ||dL/dW||^2 from the gradient of B (m, r) beside a random A (r, n).

    E ||g_B||^2 = s^2 r var(A) ||G||^2; the variance is read off A, and not assumed of its initialisation.
    """
    return float((b**2).sum() / (scale**2 * len(a) * np.mean(a**2)))


FRESH: Mapping[ImportanceName, Callable[[Array, Array, float], float]] = {
    "gain": first_step_gain,
    "gradient": squared_gradient,
}
"""(gradient of B, A, scale) -> score, float64, of the scores that need no trained factors."""


def svd_sensitivity(factors: Factors, gradient_a: Array, *, scale: float) -> float:
    """Return the sum over singular components j of s b a of |sigma_j u_j^T G v_j|, their effect on the loss.

    From the gradient of A alone: the effect is (A v_j) . (g_A v_j), and needs neither G nor an inverse.
    """
    a, b = factors.a.astype(np.float64), factors.b.astype(np.float64)
    _, upper_b = np.linalg.qr(b)
    basis_a, upper_a = np.linalg.qr(a.T)  # (n, r), (r, r)
    v = basis_a @ np.linalg.svd(scale * upper_b @ upper_a.T)[2].T  # (n, r)
    return float(np.abs(((a @ v) * (gradient_a.astype(np.float64) @ v)).sum(axis=0)).sum())


def adalora_scores(
    base: Base, examples: Sequence[Example], assignment: Assignment, final: Adapter
) -> tuple[Mapping[str, float], int]:
    """Return sensitivity times uncertainty, summed over ranks: I <- .85 I + .15 s, U <- .85 U + .15 |s - I|.

    s = |parameter * gradient| of one batch; a rank's score is the mean over its column of B plus that over its row of
    A (AdaLoRA, arXiv 2303.10512), without the factor Lambda that LoRA lacks.
    """
    smooth = {name: (np.zeros_like(f.a, np.float64), np.zeros_like(f.b, np.float64)) for name, f in final.items()}
    spread = {name: tuple(np.zeros_like(part) for part in parts) for name, parts in smooth.items()}
    tokens = 0
    for gradients, seen in batch_gradients(base, examples, assignment, final):
        tokens += seen
        for name, own in gradients.items():
            for side, (value, slope) in enumerate(((final[name].a, own.a), (final[name].b, own.b))):
                sensitivity = np.abs(value.astype(np.float64) * slope)
                smooth[name][side][:] = MEMORY * smooth[name][side] + (1 - MEMORY) * sensitivity
                off = np.abs(sensitivity - smooth[name][side])
                spread[name][side][:] = MEMORY * spread[name][side] + (1 - MEMORY) * off
    scores = {}
    for name, (a, b) in smooth.items():
        rows = (a * spread[name][0]).mean(axis=1) + (b * spread[name][1]).mean(axis=0)
        scores[name] = float(rows.sum())
    return scores, tokens


def mean_gradients(
    base: Base, examples: Sequence[Example], assignment: Assignment, adapter: Adapter
) -> tuple[Gradients, int]:
    """Return the mean gradient over the batches, float64, and the tokens that it took."""
    total, count, tokens = dict[str, Factors](), 0, 0
    for gradients, seen in batch_gradients(base, examples, assignment, adapter):
        count, tokens = count + 1, tokens + seen
        for name, own in gradients.items():
            before = total.get(name)
            total[name] = Factors(a=before.a + own.a, b=before.b + own.b) if before else own
    return {name: Factors(a=own.a / count, b=own.b / count) for name, own in total.items()}, tokens


def batch_gradients(
    base: Base, examples: Sequence[Example], assignment: Assignment, adapter: Adapter
) -> Iterator[tuple[Gradients, int]]:
    """Yield the gradients of a few batches, float64, and their tokens; batches that are not finite are left out."""
    plan, task = assignment.plan, assignment.lora
    training = plan.training
    number = min(BATCHES, -(-len(examples) // training.batch))
    order = batches(len(examples), size=training.batch, key=derive(assignment.seed, "importance.rows"))
    with (
        with_adapters(
            base,
            frozen=frozen_change(task),
            local=adapter,
            scale=plan.scale,
            saved=task.blobs.get("saved", {}),
            half=uses_autocast(training, base.device),
        ) as model,
        training_mode(base, training),
    ):
        for rows in islice(order, number):
            model.zero_grad(set_to_none=True)
            batch = collate([examples[i] for i in rows], base, packed=training.packing)
            with autocast(training, base.device):
                loss = summed_loss(model, batch, task=base.task) / max(1, batch.count)
            loss.backward()
            gradients = {name: Factors(*read(layer)) for name, layer in layers(model).items()}
            if all(np.isfinite(part).all() for own in gradients.values() for part in (own.a, own.b)):
                yield gradients, batch.tokens


def read(layer: Any) -> tuple[Array, Array]:
    a, b = (
        np.zeros(tuple(p.shape)) if p.grad is None else p.grad.detach().to(torch.float64).cpu().numpy()
        for p in (layer.a, layer.b)
    )
    return a, b


def normalise(scores: Mapping[str, float], modules: Sequence[str]) -> tuple[float, ...]:
    """Return scores as shares of their sum, in float32; equal ones where nothing could be measured.

    Shares hide the scale of a client's loss, which says something of its data, and count every client alike.
    """
    values = np.array([scores.get(name, 0.0) for name in modules])
    total = float(values.sum())
    if not (math.isfinite(total) and total > 0):
        values, total = np.ones(len(modules)), float(len(modules))
    return tuple((values / total).astype(np.float32).tolist())
