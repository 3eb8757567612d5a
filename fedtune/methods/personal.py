"""Linear methods whose clients have a model of their own: what stays with a client enters no mean and no message."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedtune.messages import AdmittedUpdate, Assignment, Blueprint, LoraResult, Personal, PlannedClient
from fedtune.methods.change import Change
from fedtune.methods.method import LinearMethod, Method, MethodState, factor_rank, resize_factor
from fedtune.number_formats import SCALES
from fedtune.tensors import Array, Tensors

LOCAL, SAVED = "local/", "saved/"
"""What precedes the names of factors and of modules_to_save in a contribution; see `method.join`."""
MOST = 64
"""Mappings of a round, one a rank, whose rest is remembered: those of earlier rounds are of no more use."""


def with_personal(method: Method[Any], personal: Personal | None) -> Method[Any]:
    """Return a method whose orders ask clients for a personal model, and whose server never sees what they keep.

    The server's own values of those tensors stay as they are before round 1: of a client that has none, they are the
    start. Without settings, and with those that store nothing, the method is as it was.
    """
    if personal is None or not personal.has_state:
        return method
    own, shared = personal.in_full(), without_kept(personal.in_full())

    def assign(state: MethodState, seed: int, planned: PlannedClient) -> Assignment:
        assignment = method.assign(state, seed, planned)
        blobs = {role: rest for role, tensors in assignment.lora.blobs.items() if (rest := shared(tensors))}
        return replace(assignment, task=replace(assignment.lora, blobs=blobs, personal=own))

    if not own.keep:
        return replace(method, assign=assign)
    assert isinstance(method, LinearMethod)  # checked when the recipe is bound
    return replace(method, assign=assign, **averaging_the_rest(method, own))


def averaging_the_rest(method: LinearMethod[Any], personal: Personal) -> Mapping[str, Any]:
    """Return the operations of a linear method by which all but the kept tensors are averaged."""

    def rest_of(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if not personal.keeps(name.partition("/")[2])}

    def contribution(state: Any, update: AdmittedUpdate) -> Tensors:
        return rest_of(method.contribution(state, with_kept(method, state, personal, update)))

    def current(state: Any) -> Tensors:
        return rest_of(method.current(state))

    def advance(state: Any, mean: Tensors) -> Any:
        # What no client sends does not move, to the bit: a mean of equal numbers may be rounded.
        return method.advance(state, {**method.current(state), **mean})

    def change(state: Any, blueprint: Blueprint, assignment: Assignment, update: AdmittedUpdate) -> Iterable[Change]:
        whole = with_kept(method, state, personal, update)
        own = kept_factors(method.current(state), personal, update)
        local = {**assignment.lora.blobs.get("local", {}), **own}
        task = replace(assignment.lora, blobs={**assignment.lora.blobs, "local": local})
        return method.change(state, blueprint, replace(assignment, task=task), whole)

    return {"contribution": contribution, "current": current, "advance": advance, "change": change}


def with_kept(method: LinearMethod[Any], state: Any, personal: Personal, update: AdmittedUpdate) -> AdmittedUpdate:
    """Return an update as if its client had left the kept tensors at the server's values."""
    current = method.current(state)
    own = kept_factors(current, personal, update)
    if update.upload == "difference":
        own = {name: np.zeros_like(value) for name, value in own.items()}
    saved = {
        name.removeprefix(SAVED): value
        for name, value in current.items()
        if name.startswith(SAVED) and personal.keeps(name.removeprefix(SAVED))
    }
    result: LoraResult = update.lora
    whole = replace(result, tensors={**result.tensors, **own}, saved={**result.saved, **saved})
    return replace(update, update=replace(update.update, result=whole))


def kept_factors(current: Tensors, personal: Personal, update: AdmittedUpdate) -> Tensors:
    """Return the server's values of the kept factors, in the rank of an update: of their partner, or of any factor."""
    factors, sent = dict[str, Array](), update.lora.tensors
    ranks = {name.rpartition(".")[0]: factor_rank(name, factor) for name, factor in sent.items()}
    usual = next(iter(ranks.values()), None)
    for name, value in current.items():
        own = name.removeprefix(LOCAL)
        if not name.startswith(LOCAL) or not personal.keeps(own):
            continue
        rank = ranks.get(own.rpartition(".")[0], usual)
        factors[own] = value if rank is None else resize_factor(value, own, rank)
    return factors


def without_kept(personal: Personal) -> Callable[[Tensors], Tensors]:
    """Return a function that leaves out what stays with clients, and keeps the identity of what it has left.

    Of one mapping that goes to a whole cohort it returns one other, which is then encoded once.
    """
    if not personal.keep:
        return lambda tensors: tensors
    known: dict[int, tuple[Tensors, Tensors]] = {}  # holds the mapping too, so that no other one takes over its id

    def rest_of(tensors: Tensors) -> Tensors:
        if id(tensors) not in known:
            if len(known) >= MOST:
                known.clear()
            rest = {name: t for name, t in tensors.items() if not personal.keeps(name.removesuffix(SCALES))}
            known[id(tensors)] = tensors, rest
        return known[id(tensors)][1]

    return rest_of
