"""The local training of several clients at once: the steps of `model.train`, one forward pass for all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import nn
from torch.nn.functional import pad

from fedtune.data.encode import IGNORED, Example
from fedtune.lora.adapter import Adapter
from fedtune.messages import Measured, Training
from fedtune.model.base import Base
from fedtune.model.batches import Batch, collate, padding_side
from fedtune.model.frozen import FrozenChange
from fedtune.model.lora import with_adapters
from fedtune.model.loss import cross_entropies, hidden_cross_entropies, hidden_of, logits_of
from fedtune.model.stacked_lora import unstack, with_stacks
from fedtune.model.train import autocast, learning_rate, make_optimizer, peak_bytes, uses_autocast
from fedtune.probing.order import batches


@dataclass(frozen=True)
class Member:
    """One of the clients that train together."""

    examples: Sequence[Example]
    """Its own, at least one."""
    rows: Sequence[Example]
    """On which its loss is measured before and after."""
    key: int
    """From `derive`; the order of its data follows from it."""
    initial: Adapter
    """Over the same modules as those of the others, of any ranks; b without the scale."""
    scale: float
    """alpha / rank."""


@dataclass(frozen=True)
class Learned:
    """What one client learned beside others."""

    final: Adapter
    losses: Sequence[float]
    """Mean loss of each optimizer step, before the step."""
    measured: Measured
    """Of the seconds its share; the memory is that of all clients."""

    @property
    def finite(self) -> bool:
        """Whether every number is; where one is not, the client trains again alone, without the steps that are not."""
        ends = [loss for loss in (self.measured.loss_before, self.measured.loss_after) if loss is not None]
        numbers = all(map(math.isfinite, [*self.losses, *ends]))
        return numbers and all(np.isfinite(f.a).all() and np.isfinite(f.b).all() for f in self.final.values())


def train_together(
    base: Base, members: Sequence[Member], training: Training, *, frozen: FrozenChange, train: str
) -> Sequence[Learned]:
    """Train one adapter per client, each as `model.train.train` would train it alone, up to the rounding of sums.

    A client whose loss is not finite changes nothing for the others.

    Args:
        base: the resident base, as loaded; it is afterwards as before.
        members: the clients.
        training: with `steps` set, without dropout.
        frozen: change that all of them received.
        train: factors that get gradients, `ab` or `b`.

    Raises:
        UnbatchableError: if the base mixes rows, or puts them elsewhere than first.
    """
    assert training.steps is not None  # the planner resolves epochs
    began, rows = time.perf_counter(), len(members) * training.batch
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
    initial, scales = [member.initial for member in members], [member.scale for member in members]
    losses, tokens = list[Sequence[float]](), np.zeros(len(members), np.int64)
    with (
        with_adapters(base, frozen=frozen, half=uses_autocast(training, base.device)),
        with_stacks(base, initial, scales=scales, rows=rows, train=train) as stacks,
    ):
        base.model.eval()
        before = mean_losses(base, members, training)
        parameters = [p for stack in stacks.values() for p in (stack.a, stack.b) if p.requires_grad]
        optimizer = make_optimizer(training, parameters)
        orders = [batches(len(member.examples), size=training.batch, key=member.key) for member in members]
        for step in range(training.steps):
            optimizer.param_groups[0]["lr"] = learning_rate(training, step, training.steps)
            chosen = [list(islice(order, training.accumulation)) for order in orders]
            parts = [
                join_rows(
                    [examples_at(member, order[at]) for member, order in zip(members, chosen, strict=True)],
                    base,
                    training,
                )
                for at in range(training.accumulation)
            ]
            losses.append(backward(base, parts, training))
            limit_gradients(parameters, training.clip_norm, losses[-1])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += sum((part.tokens for part in parts), np.zeros_like(tokens))
        after = mean_losses(base, members, training)
        finals = unstack(stacks, initial)
    seconds = (time.perf_counter() - began) / len(members)
    measured = Measured(seconds=seconds, peak_bytes=peak_bytes(base.device))
    return [
        Learned(
            finals[place],
            [step[place] for step in losses],
            replace(measured, tokens=int(tokens[place]), loss_before=before[place], loss_after=after[place]),
        )
        for place in range(len(members))
    ]


def examples_at(member: Member, places: Sequence[int]) -> Sequence[Example]:
    return [member.examples[place] for place in places]


@dataclass(frozen=True)
class JoinedBatch:
    """The rows of all clients, in equal shares."""

    batch: Batch
    counts: Sequence[int]
    """What counts in the loss, by client."""
    tokens: np.ndarray[tuple[int], np.dtype[np.int64]]
    """Tokens of the examples, by client."""


def join_rows(own: Sequence[Sequence[Example]], base: Base, training: Training) -> JoinedBatch:
    """Return the examples of all clients as one batch; a client with fewer than others gets rows that do not count."""
    empty = empty_row(next(examples[0] for examples in own if examples), base)
    batch = collate([row for examples in own for row in [*examples, *[empty] * (training.batch - len(examples))]], base)
    # See `stacked_lora.adding`: with as many positions as rows, a layer that puts time first would go unnoticed.
    batch = longer(batch, base) if batch.input_ids.shape[0] == batch.input_ids.shape[1] else batch
    return JoinedBatch(
        batch,
        [sum(num_counted(example, base) for example in examples) for examples in own],
        np.array([sum(len(example.input_ids) for example in examples) for examples in own], np.int64),
    )


def num_counted(example: Example, base: Base) -> int:
    """Return what of an example counts in the loss: tokens (causal), or the example itself."""
    # The first token of a row is predicted by nothing, so it never counts.
    return int((np.asarray(example.labels)[1:] != IGNORED).sum()) if base.task == "causal" else 1


def empty_row(example: Example, base: Base) -> Example:
    """Return a row of one token, such as an example has, that counts in no loss."""
    ids = np.asarray(example.input_ids[:1])
    labels = np.full_like(ids, IGNORED) if base.task == "causal" else IGNORED
    types = None if example.token_types is None else np.zeros_like(ids)
    return Example(ids, labels, characters=0, prompt="", reference="", prompt_tokens=0, token_types=types)


def longer(batch: Batch, base: Base) -> Batch:
    """Return a batch with one more position of padding."""
    side = (1, 0) if padding_side(base) == "left" else (0, 1)
    return replace(
        batch,
        input_ids=pad(batch.input_ids, side, value=base.pad_id),
        attention_mask=pad(batch.attention_mask, side),
        labels=pad(batch.labels, side, value=IGNORED) if base.task == "causal" else batch.labels,
        token_types=None if batch.token_types is None else pad(batch.token_types, side),
    )


def summed_losses(base: Base, part: JoinedBatch, training: Training) -> torch.Tensor:
    """Return the cross-entropy of each client's rows, summed over what counts of them: (clients,)."""
    batch, model, task = part.batch, base.model, base.task
    with autocast(training, base.device):
        if batch.fused:
            outputs, summed = hidden_of(model, batch), partial(hidden_cross_entropies, model)
        else:
            outputs, summed = logits_of(model, batch, task=task), partial(cross_entropies, task=task)
        shares = zip(outputs.split(training.batch), batch.labels.split(training.batch), strict=True)
        return torch.stack([summed(own, labels) for own, labels in shares])


def backward(base: Base, parts: Sequence[JoinedBatch], training: Training) -> Sequence[float]:
    """Add up the gradients of one optimizer step of every client, and return each client's mean loss."""
    counts = np.maximum(1, np.sum([part.counts for part in parts], axis=0))
    divisors = torch.tensor(counts, dtype=torch.float32).to(base.device)
    total = torch.zeros_like(divisors)
    for part in parts:
        losses = summed_losses(base, part, training) / divisors
        losses.sum().backward()
        total += losses.detach()
    means: list[float] = total.tolist()
    return means


def limit_gradients(parameters: Sequence[nn.Parameter], clip_norm: float | None, losses: Sequence[float]) -> None:
    """Scale down each client's gradients to the norm, as if they were alone; of a loss that is not finite, to zero."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for place, loss in enumerate(losses):
        if not math.isfinite(loss):
            for grad in grads:
                grad[place] = 0.0
    if clip_norm is not None:
        squares = [torch.linalg.vector_norm(grad, dim=(1, 2)) for grad in grads]
        norms = torch.linalg.vector_norm(torch.stack(squares), dim=0)  # (clients,)
        factors = (clip_norm / (norms + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
        for grad in grads:
            grad *= factors.view(-1, 1, 1)


def mean_losses(base: Base, members: Sequence[Member], training: Training) -> Sequence[float | None]:
    """Return each client's mean loss on its rows; None where nothing of them counts."""
    totals, counts = np.zeros(len(members)), np.zeros(len(members), np.int64)
    with torch.no_grad():
        for rows in row_batches([member.rows for member in members], training.batch):
            part = join_rows(rows, base, training)
            totals += np.array(summed_losses(base, part, training).tolist())
            counts += np.array(part.counts, np.int64)
    return [float(total / count) if count else None for total, count in zip(totals, counts, strict=True)]


def row_batches(rows: Sequence[Sequence[Example]], size: int) -> Iterator[Sequence[Sequence[Example]]]:
    """Yield batches of every client's rows in their order, until those of all have been seen."""
    for begin in range(0, max(map(len, rows)), size):
        yield [own[begin : begin + size] for own in rows]
