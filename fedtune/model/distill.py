"""Distillation of an emulator's middle: trained so that its output is the true middle's, of the same input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt

from fedtune.data.encode import Example
from fedtune.errors import ConfigError, Fault
from fedtune.model.base import Base
from fedtune.model.batches import Batch, collate
from fedtune.model.blocks import find_blocks, listen_to_output
from fedtune.model.emulator import Projection, as_it_is
from fedtune.model.loss import summed_loss
from fedtune.seeds import derive, generator

WARMUP = 0.1
"""Share of the steps over which the learning rate rises; after that it falls to zero, linearly."""
LARGEST_NORM = 1.0
"""Of a step's gradient; a longer one is cut to it."""


@dataclass(frozen=True)
class DistillSettings:
    """How the middle of an emulator is distilled.

    A step's loss is lm_weight * CE + kd_weight * mean(((t - s) / rms(t))^2), with the output t of the true middle, s of
    the emulator's, and rms(t) = sqrt(mean t^2) (Xiao et al., arXiv 2302.04870).
    """

    steps: Annotated[int, Ge(1)] = 500
    """Optimizer steps."""
    learning_rate: Annotated[float, Gt(0)] = 1e-4
    """Largest learning rate of AdamW."""
    lm_weight: Annotated[float, Ge(0)] = 1.0
    """Weight of the emulator's own cross-entropy on the text."""
    kd_weight: Annotated[float, Ge(0)] = 30.0
    """Weight of the middle's squared error, relative to the output."""
    batch: Annotated[int, Ge(1)] = 8
    """Rows of a step."""


@dataclass(frozen=True)
class Distilled:
    """The course of a distillation, by step."""

    errors: Sequence[float]
    """Mean of ((t - s) / rms(t))^2, before each step."""
    losses: Sequence[float]
    """Cross-entropy of the emulator, before each step; empty where lm_weight is 0."""


def distill(
    base: Base,
    emulator: Any,
    rows: Sequence[Example],
    settings: DistillSettings,
    *,
    front: int,
    back: int,
    free: Sequence[str],
    projection: Projection = as_it_is,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, error: None,
) -> Distilled:
    """Train an emulator's middle on public text, in place.

    The ends are the true base's and stay so: both middles read the same input. Where the middle's values are projected,
    gradients are taken at the projected values and added to free ones.

    Args:
        base: the true base, in float32.
        emulator: of it.
        rows: public text, encoded.
        settings: how long, how fast, and towards what.
        front: first blocks of both that are the same.
        back: last blocks of both that are the same.
        free: names of the parameters of the middle.
        projection: what each free value is rounded or masked to.
        seed: of the order of the rows.
        on_step: called with the number of steps taken and the last error.

    Raises:
        ConfigError: if there are no rows, nothing to train towards, or the training diverges.
    """
    check_settings(base, rows, settings)
    parameters = {name: parameter for name, parameter in emulator.named_parameters() if name in set(free)}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    same = projection is as_it_is
    values = {name: p if same else p.detach().clone().requires_grad_(True) for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(values.values(), lr=settings.learning_rate, weight_decay=0.0)
    errors, losses = list[float](), list[float]()
    try:
        for step, chosen in enumerate(order(len(rows), settings, seed)):
            if not same:
                set_projected(parameters, values, projection)
            batch = collate([rows[i] for i in chosen], base)
            error, loss = losses_of(base, emulator, batch, front=front, back=back, with_loss=settings.lm_weight > 0)
            total = settings.kd_weight * error + settings.lm_weight * loss
            if not math.isfinite(total.item()):
                expected, hint = "finite losses", "lower --learning-rate"
                raise ConfigError(Fault("distill", expected, f"{total.item()} at step {step + 1}", hint))
            errors.append(error.item())
            losses += [loss.item()] * (settings.lm_weight > 0)
            total.backward()
            for name, parameter in parameters.items():
                values[name].grad = parameter.grad
            torch.nn.utils.clip_grad_norm_(values.values(), LARGEST_NORM)
            optimizer.param_groups[0]["lr"] = settings.learning_rate * rate(step, settings.steps)
            optimizer.step()
            for parameter in parameters.values():
                parameter.grad = None
            on_step(step + 1, errors[-1])
        set_projected(parameters, values, projection)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    return Distilled(errors, losses)


def check_settings(base: Base, rows: Sequence[Example], settings: DistillSettings) -> None:
    """Raise ConfigError where nothing can be distilled."""
    faults = [
        Fault(name, f"a number {'from' if closed else 'above'} {least}", f"{value:g}")
        for name, value, least, closed in (
            ("steps", settings.steps, 1, True),
            ("batch", settings.batch, 1, True),
            ("learning_rate", settings.learning_rate, 0, False),
            ("lm_weight", settings.lm_weight, 0, True),
            ("kd_weight", settings.kd_weight, 0, True),
        )
        if not (math.isfinite(value) and (value >= least if closed else value > least))
    ]
    if not rows:
        faults.append(Fault("distill", "text of at least two tokens", "none", "give public text, one row per document"))
    if settings.lm_weight and base.task != "causal":
        expected = "0 for a classifier, which predicts no next token"
        faults.append(Fault("lm_weight", expected, f"{settings.lm_weight:g}", "give --lm-weight 0"))
    if not (settings.lm_weight or settings.kd_weight):
        faults.append(Fault("kd_weight", "above 0, or lm_weight above 0", "both are 0"))
    if faults:
        raise ConfigError(faults)


def order(rows: int, settings: DistillSettings, seed: int) -> Iterator[Sequence[int]]:
    """Yield the rows of each step: all of them once, in an order of the seed, before any comes again."""
    left = list[int]()
    for step in range(settings.steps):
        chosen = list[int]()
        while len(chosen) < min(settings.batch, rows):
            if not left:
                left = generator(derive(seed, "emulator.distill", step)).permutation(rows).tolist()
            chosen.append(left.pop())
        yield chosen


def rate(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step, from 0: up over the first tenth, then down to zero.

    >>> rate(0, 20), rate(1, 20), rate(11, 20)
    (0.5, 1.0, 0.5)
    """
    warm = math.ceil(WARMUP * steps)
    return (step + 1) / warm if step < warm else 1 - (step - warm) / max(1, steps - warm)


def losses_of(
    base: Base, emulator: Any, batch: Batch, *, front: int, back: int, with_loss: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the middle's relative squared error and the emulator's cross-entropy, 0 where it is not asked for."""
    outputs = list[torch.Tensor]()
    options = {"use_cache": False} if base.task == "causal" else {}
    with ExitStack() as stack:
        for model in (base.model, emulator):
            blocks = find_blocks(model)[1]
            stack.enter_context(listen_to_output(blocks[len(blocks) - back - 1], outputs.append))
        with torch.no_grad():
            base.model.base_model(**batch.inputs, **options)
        if with_loss:
            loss = summed_loss(emulator, batch, task=base.task) / max(1, batch.count)
        else:
            emulator.base_model(**batch.inputs, **options)
            loss = torch.zeros((), device=base.device)
    wanted, got = (output.float()[batch.attention_mask.bool()] for output in outputs)  # (tokens, width)
    return (wanted - got).square().mean() / wanted.square().mean(), loss


def set_projected(
    parameters: dict[str, torch.nn.Parameter], values: dict[str, torch.Tensor], projection: Projection
) -> None:
    """Give the middle the values that its free ones are projected to, in place."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            if values[name] is not parameter:
                parameter.copy_(projection(name, values[name].detach()))
