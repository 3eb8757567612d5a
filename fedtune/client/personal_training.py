"""What a client does beside its part of the global model: it trains a model of its own, and stores that on its disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from fedtune.client.personal_state import PersonalState, StateFolder
from fedtune.data.encode import Example
from fedtune.errors import ClientError
from fedtune.lora.adapter import Adapter, pack, unpack
from fedtune.messages import Assignment, Measured, Personal, PersonalTrace, Proximal
from fedtune.model.base import Base, to_numpy
from fedtune.model.lora import frozen_change, read_local, with_adapters
from fedtune.model.personal import Work, ditto, fedrep, pfedme, trained_parameters
from fedtune.model.train import uses_autocast
from fedtune.probing.steps import OnStep
from fedtune.tensors import Tensors

Plain: TypeAlias = Callable[[Assignment, Adapter], tuple[Adapter, Tensors, Measured]]
"""(order, start) -> (factors, modules_to_save, what was measured) of a training without a personal model."""


@dataclass(frozen=True)
class PersonalTraining:
    """The outcome of a round of a client with a model of its own."""

    initial: Adapter
    """What was trained from: the server's values and, of the tensors that stay, the client's."""
    final: Adapter
    saved: Tensors
    measured: Measured
    own: Tensors
    """What the client stores, by name."""
    trace: PersonalTrace = field(default_factory=PersonalTrace)


def train_personal(
    base: Base,
    examples: Sequence[Example],
    assignment: Assignment,
    initial: Adapter,
    folder: StateFolder | None,
    *,
    rows: Sequence[Example],
    on_step: OnStep,
    plain: Plain,
) -> PersonalTraining:
    """Do a round's part of the global model and of the client's own, and store the latter.

    Args:
        base: the base.
        examples: the client's own.
        assignment: with a personal model; its tensors as numbers.
        initial: the start of the trained adapter, as the server gives it.
        folder: of the client's personal states; where there is none nothing can be asked for that is to stay.
        rows: on which the losses before and after are measured.
        on_step: called after each step.
        plain: trains as without a personal model.

    Raises:
        ClientError: if there is no folder, or training fails.
        StoreError: if the state cannot be read or written.
    """
    task, plan = assignment.lora, assignment.plan
    assert task.personal is not None
    if folder is None:
        raise ClientError(f"{plan.client}: expected an order without [personal]; this client has no folder for a state")
    # What stays with the client comes in no message: the base's own values are the start of those in full.
    received = {**base.saved_tensors(), **task.blobs.get("saved", {})}
    stored = folder.load(plan.client, assignment.round)
    if stored is not None and not fits(stored.state, assignment, initial, received):
        stored = None
    work = Work(
        base,
        examples,
        plan.training,
        task.personal,
        assignment.seed,
        plan.client,
        [term for term in task.terms if not isinstance(term, Proximal)],
        rows,
        on_step,
    )
    own = {**stored.state.factors, **stored.state.saved} if stored else {}
    train = {"ditto": train_second, "pfedme": train_followed}.get(task.personal.kind, train_parts)
    outcome = train(work, assignment, initial, received, own, plain)
    state = PersonalState(
        plan.client,
        assignment.round,
        task.personal.kind,
        plan.scale,
        factors={name: tensor for name, tensor in outcome.own.items() if name not in received},
        saved={name: tensor for name, tensor in outcome.own.items() if name in received},
    )
    return replace(outcome, trace=PersonalTrace(stored.digest if stored else b"", folder.store(state)))


def fits(state: PersonalState, assignment: Assignment, initial: Adapter, received: Tensors) -> bool:
    """Return whether a state is one that this order's training can go on from: of its kind, scale, names and shapes."""
    task, personal = assignment.lora, assignment.lora.personal
    assert personal is not None
    trained = {name: factor for name, factor in pack(initial).items() if name[-1] in task.train}
    expected = {name: t.shape for name, t in {**trained, **received}.items() if stays(personal, name)}
    got = {name: tensor.shape for name, tensor in {**state.factors, **state.saved}.items()}
    return (state.kind, state.scale, got) == (personal.kind, assignment.plan.scale, expected)


def stays(personal: Personal, name: str) -> bool:
    """Return whether a trained tensor is part of a client's personal state; of a second model all are."""
    return personal.kind in ("ditto", "pfedme") or personal.keeps(name)


def train_second(
    work: Work, assignment: Assignment, initial: Adapter, received: Tensors, own: Tensors, plain: Plain
) -> PersonalTraining:
    """Train the global part exactly as without a personal model, and then that of Ditto."""
    final, saved, measured = plain(assignment, initial)
    start = {**pack(initial), **received}
    began = {**start, **own}
    factors = unpack({name: tensor for name, tensor in began.items() if name not in received})
    with attach(work.base, assignment, factors, {name: began[name] for name in received}) as model:
        parameters = trained_parameters(model, sorted(received))
        beside = ditto(work, parameters, towards=start)
        second = {name: to_numpy(p) for name, p in parameters.items() if p.requires_grad}
    measured = replace(
        measured,
        seconds=measured.seconds + beside.seconds,
        peak_bytes=max(measured.peak_bytes, beside.peak_bytes),
        # A token forward and backward counts as two that only go forward.
        side_tokens=measured.side_tokens + 2 * beside.tokens,
    )
    return PersonalTraining(initial, final, saved, measured, second)


def train_followed(
    work: Work, assignment: Assignment, initial: Adapter, received: Tensors, own: Tensors, plain: Plain
) -> PersonalTraining:
    """Train by pFedMe, whose personal model starts from the global one in every round."""
    with attach(work.base, assignment, initial, received) as model:
        measured, theta = pfedme(work, trained_parameters(model, sorted(received)))
        return PersonalTraining(initial, read_local(model), read_saved(model, received), measured, theta)


def train_parts(
    work: Work, assignment: Assignment, initial: Adapter, received: Tensors, own: Tensors, plain: Plain
) -> PersonalTraining:
    """Train one model of which some tensors are the client's: these first with FedRep, else all at once."""
    personal, task = work.personal, assignment.lora
    mixed = {**pack(initial), **received, **own}
    full: Tensors = {name: mixed[name] for name in received}
    initial = unpack({name: tensor for name, tensor in mixed.items() if name not in received})
    if personal.kind == "fedrep":
        with attach(work.base, assignment, initial, full) as model:
            measured = fedrep(work, trained_parameters(model, sorted(received)))
            final, saved = read_local(model), read_saved(model, received)
    else:
        blobs = {**task.blobs, **({"saved": full} if full else {})}
        final, saved, measured = plain(replace(assignment, task=replace(task, blobs=blobs)), initial)
    trained = {name: factor for name, factor in pack(final).items() if name[-1] in task.train}
    ends = {name: tensor for name, tensor in {**trained, **saved}.items() if personal.keeps(name)}
    return PersonalTraining(initial, final, saved, measured, ends)


def attach(base: Base, assignment: Assignment, local: Adapter, saved: Tensors) -> AbstractContextManager[Any]:
    """Return the context in which an order's adapter is trained from some values, as without a personal model."""
    plan, task = assignment.plan, assignment.lora
    return with_adapters(
        base,
        frozen=frozen_change(task),
        local=local,
        scale=plan.scale,
        dropout=plan.training.dropout,
        train=task.train,
        saved=saved,
        half=uses_autocast(plan.training, base.device),
    )


def read_saved(model: Any, names: Iterable[str]) -> Tensors:
    parameters = dict(model.named_parameters())
    return {name: to_numpy(parameters[name]) for name in names}
