"""What several clients in one process do with their assignments at once: one forward pass for all their adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedtune.client.perform import LocalTraining, examples_seen, in_numbers, lora_result
from fedtune.data.encode import Example
from fedtune.data.loss_rows import loss_rows, num_loss_rows
from fedtune.errors import FedtuneError
from fedtune.messages import Assignment, ClientUpdate, TrainLora
from fedtune.model import libraries
from fedtune.model.base import Base
from fedtune.model.lora import frozen_change, start
from fedtune.model.stacked_lora import UnbatchableError
from fedtune.model.stacked_train import Learned, Member, train_together
from fedtune.model.train import out_of_memory
from fedtune.rounds.failures import debug_traceback

LARGEST = 32
"""Clients of one forward pass, at most, where memory alone decides; more of them no longer fill a GPU better."""


@dataclass(frozen=True)
class Resident:
    """A client in this process."""

    examples: Sequence[Example]
    held_out: Sequence[Example]
    threads: int


class Batched:
    """Does the work of the clients of one process together, where that is plain training of an adapter.

    The updates are those of `perform`, up to the rounding of sums. It remembers how many clients fit into memory.
    """

    def __init__(self, base: Base, clients: Mapping[str, Resident], *, most: int = LARGEST) -> None:
        """Take the base, the clients by name, and how many of them a forward pass may have."""
        self._base, self._clients, self._most = base, clients, most

    def __call__(self, assignments: Sequence[Assignment]) -> Mapping[str, ClientUpdate]:
        """Return the updates of the clients that could be trained beside others; the rest work alone."""
        able = [item for item in assignments if not why_alone(self._base, self._clients[item.plan.client], item)]
        updates = dict[str, ClientUpdate]()
        for alike in groups(able, self._clients):
            for begin in range(0, len(alike), self._most):
                updates |= self._perform(alike[begin : begin + self._most])
        return updates

    def _perform(self, assignments: Sequence[Assignment]) -> Mapping[str, ClientUpdate]:
        """Train clients of equal plans together; after an error of memory in two halves."""
        if len(assignments) < 2:
            return {}
        clients = [self._clients[item.plan.client] for item in assignments]
        try:
            with libraries.threads(clients[0].threads):
                return updates_of(self._base, clients, assignments)
        # Alone, each client has its own error; and what a layer cannot do for many it can do for one.
        except (UnbatchableError, FedtuneError) as error:
            debug_traceback(error)
            return {}
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            debug_traceback(error)
        if self._base.device.type == "cuda":
            torch.cuda.empty_cache()
        half = -(-len(assignments) // 2)
        self._most = min(self._most, half)
        return {**self._perform(assignments[:half]), **self._perform(assignments[half:])}


def why_alone(base: Base, client: Resident, assignment: Assignment) -> str:
    """Return why a client's work is not done beside that of others; empty where it can be."""
    task, training = assignment.task, assignment.plan.training
    if not isinstance(task, TrainLora):
        return "it is no training of an adapter"
    reasons = {
        "it has no example": not client.examples,
        "it is for another base": bool(assignment.base) and assignment.base != base.digest,
        "the model is pruned": task.pruning is not None,
        "the backward pass leaves something out": assignment.plan.back > 0,
        "its base has a format of its own": bool(assignment.plan.base_dtype),
        "its adapter is of another view": assignment.plan.view != "whole",
        "modules are scored": bool(assignment.plan.importance),
        "the objective has other terms": bool(task.terms),
        "the client has a model of its own": task.personal is not None,
        "modules are trained in full": bool(task.blobs.get("saved")),
        # It is drawn from one generator, layer by layer: beside others a client would get another draw than alone.
        "there is dropout": training.dropout > 0,
        "activations are computed again": training.gradient_checkpointing,
        "examples share rows": training.packing,
    }
    return next((reason for reason, there in reasons.items() if there), "")


def groups(assignments: Sequence[Assignment], clients: Mapping[str, Resident]) -> Sequence[Sequence[Assignment]]:
    """Return assignments by what they must have in common: the received model, how it is trained, and the threads."""
    alike = dict[Any, list[Assignment]]()
    for item in assignments:
        task = item.lora
        # By identity: tensors that many clients receive are decoded once.
        received = id(task.blobs["global"]) if "global" in task.blobs else None
        # Of one set of modules: a layer's factors are stacked, whatever the ranks of each client.
        trained = tuple(rank > 0 for rank in item.plan.ranks) if 0 in item.plan.ranks else ()
        key = item.plan.training, task.train, received, clients[item.plan.client].threads, trained
        alike.setdefault(key, []).append(item)
    return list(alike.values())


def updates_of(
    base: Base, clients: Sequence[Resident], assignments: Sequence[Assignment]
) -> Mapping[str, ClientUpdate]:
    """Return the updates of clients that are trained together, without those whose loss was not finite."""
    members = [member_of(base, client, assignment) for client, assignment in zip(clients, assignments, strict=True)]
    first = assignments[0]
    frozen = frozen_change(in_numbers(first, "global").lora)
    results = train_together(
        base,
        members,
        first.plan.training,
        frozen=frozen,
        train=first.lora.train,
    )
    return {
        assignment.plan.client: update_of(base, client, assignment, member, learned)
        for client, assignment, member, learned in zip(clients, assignments, members, results, strict=True)
        if learned.finite
    }


def member_of(base: Base, client: Resident, assignment: Assignment) -> Member:
    plan = assignment.plan
    count = num_loss_rows(examples_seen(plan.training))
    return Member(
        client.examples,
        loss_rows(client.examples, client.held_out, plan.client, count=count),
        assignment.seed,
        start(in_numbers(assignment, "local").lora, plan, base.modules),
        plan.scale,
    )


def update_of(base: Base, client: Resident, assignment: Assignment, member: Member, learned: Learned) -> ClientUpdate:
    local = LocalTraining(member.initial, learned.final, {}, learned.measured, None)
    result = lora_result(base, assignment, assignment.lora, local)
    return ClientUpdate(assignment.plan.client, assignment.round, len(client.examples), result, learned.measured)
