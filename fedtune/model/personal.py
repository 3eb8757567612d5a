"""The steps by which a client trains a model of its own: Ditto, pFedMe and FedRep, on the parameters that are attached.

All of them are float32, as the adapters and modules_to_save are, whatever the format of the frozen base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fedtune.data.encode import Example
from fedtune.messages import Measured, Personal, Proximal, Term, Training
from fedtune.model.base import Base, to_numpy
from fedtune.model.lora import layers
from fedtune.model.objective import Hooks, Start
from fedtune.model.train import (
    check_finite,
    learning_rate,
    loss_before_training,
    mean_loss,
    row_losses,
    train,
)
from fedtune.probing.steps import OnStep, no_steps
from fedtune.seeds import derive
from fedtune.tensors import Tensors


@dataclass(frozen=True)
class Work:
    """What the steps of every kind need beside the parameters that are attached to the base."""

    base: Base
    examples: Sequence[Example]
    training: Training
    """With `steps` set, of the client's other steps."""
    personal: Personal
    key: int
    """From `derive`: of the client and the round."""
    client: str
    terms: Sequence[Term] = ()
    """Of the objective, but for pulls towards the global model."""
    rows: Sequence[Example] = ()
    """On which the losses before and after are measured."""
    on_step: OnStep = no_steps

    @property
    def own(self) -> Training:
        """How the personal steps are taken."""
        training, personal = self.training, self.personal
        return replace(
            training, steps=personal.steps or training.steps, learning_rate=personal.rate or training.learning_rate
        )


def trained_parameters(model: nn.Module, saved: Sequence[str]) -> Mapping[str, nn.Parameter]:
    """Return what may be trained beside the frozen base, by the names that it travels under."""
    factors = {f"{name}.{side}": getattr(layer, side) for name, layer in layers(model).items() for side in "ab"}
    parameters = dict(model.named_parameters())
    return {**factors, **{name: parameters[name] for name in saved}}


def ditto(work: Work, parameters: Mapping[str, nn.Parameter], towards: Tensors) -> Measured:
    """Take Ditto's personal steps v <- v - eta (grad F(v) + lambda (v - w)), Li et al., 2021, arXiv 2012.04221.

    Args:
        work: the client's.
        parameters: v, at their start.
        towards: w, by the same names.
    """
    anchor: Start = {
        parameter: torch.from_numpy(towards[name].copy()).to(parameter)
        for name, parameter in parameters.items()
        if parameter.requires_grad
    }
    hooks = Hooks(work.base.model, [*work.terms, *pull(work.personal)], anchor=anchor)
    return train(
        work.base,
        work.examples,
        work.own,
        key=derive(work.key, "personal"),
        client=work.client,
        hooks=hooks,
        on_step=work.on_step,
    ).measured


def pull(personal: Personal) -> Sequence[Term]:
    return (Proximal(personal.pull),) if personal.pull > 0 else ()


def pfedme(work: Work, parameters: Mapping[str, nn.Parameter]) -> tuple[Measured, Tensors]:
    """Train by pFedMe, Dinh et al., 2020, arXiv 2006.08848; leave w in the parameters, and return theta.

    On every mini-batch theta takes K steps theta <- theta - eta_p (grad f(theta) + lambda (theta - w)), and then w one:
    w <- w - eta lambda (w - theta). Both start from the global model. The losses that are measured are those of w.
    """
    training, own, strength = work.training, work.own, work.personal.pull
    assert training.steps is not None  # the planner resolves epochs
    assert own.steps is not None
    inner, outer = own.steps, training.steps
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    w: Start = {parameter: parameter.detach().clone() for parameter in trained.values()}

    def follow(steps: int, optimizer: torch.optim.Optimizer, start: Start) -> None:
        if steps % inner == 0:
            step_towards(w, strength * learning_rate(training, steps // inner - 1, outer))

    before, rows = loss_before_training(work.base, work.rows, training)
    measured = train(
        work.base,
        work.examples,
        replace(own, steps=inner * outer),
        key=work.key,
        client=work.client,
        hooks=Hooks(work.base.model, [*work.terms, *pull(work.personal)], between=follow, anchor=w),
        on_step=work.on_step,
        repeat=inner,
    ).measured
    # The last one: nothing is due behind the last step of a training.
    step_towards(w, strength * learning_rate(training, outer - 1, outer))
    theta = {name: to_numpy(parameter) for name, parameter in trained.items()}
    for parameter, value in w.items():
        parameter.data.copy_(value)
    return with_losses(work, measured, before, rows), theta


@torch.no_grad()
def step_towards(w: Start, share: float) -> None:
    """Move w by w <- w - share (w - theta), theta being the parameters themselves."""
    for parameter, value in w.items():
        value.sub_(value - parameter, alpha=share)


def fedrep(work: Work, parameters: Mapping[str, nn.Parameter]) -> Measured:
    """Train what stays with the rest frozen, then the rest with that frozen; Collins et al., 2021, arXiv 2102.07078."""
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    before, rows = loss_before_training(work.base, work.rows, work.training)
    parts = []
    for stays, training, key in ((True, work.own, derive(work.key, "personal")), (False, work.training, work.key)):
        for name, parameter in trained.items():
            parameter.requires_grad_(work.personal.keeps(name) == stays)
        hooks = Hooks(work.base.model, work.terms) if work.terms else None
        parts.append(
            train(
                work.base,
                work.examples,
                training,
                key=key,
                client=work.client,
                hooks=hooks,
                on_step=work.on_step,
            ).measured
        )
    return with_losses(work, together(*parts), before, rows)


def with_losses(work: Work, measured: Measured, before: float | None, rows: Sequence[Sequence[Example]]) -> Measured:
    """Return what was measured with the losses of some rows before the work and, of the model as it is, after it."""
    after = mean_loss(row_losses(work.base, rows, work.training))
    check_finite(before, f"{work.client}, before step 1", work.training)
    check_finite(after, f"{work.client}, after step {work.training.steps}", work.training)
    return replace(measured, loss_before=before, loss_after=after)


def together(first: Measured, second: Measured) -> Measured:
    """Return what two trainings, one after the other, have taken; losses are those of the second."""
    return replace(
        second,
        seconds=first.seconds + second.seconds,
        peak_bytes=max(first.peak_bytes, second.peak_bytes),
        tokens=first.tokens + second.tokens,
        skipped_steps=first.skipped_steps + second.skipped_steps,
    )
