"""What a client does with an assignment: train or probe on its own examples, and hand back what it learned."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import floor
from typing import Any

import numpy as np
import torch

from fedtune.client.replica import Replicas, restore
from fedtune.data.encode import Example
from fedtune.directions import sampling as sampling_module
from fedtune.directions.bank import BANKS, DirectionBank, displacement
from fedtune.directions.consistency import STATE, Displacement, block_checks
from fedtune.directions.kron import Kron
from fedtune.directions.rebuild_torch import displacement as torch_displacement
from fedtune.directions.rebuild_torch import fastest, rebuild_compiled
from fedtune.directions.trainable import TensorSelection, trainable_ordinals
from fedtune.errors import ClientError
from fedtune.lora.adapter import Adapter, Factors
from fedtune.messages import Assignment, ClientUpdate, LocalAdapter, Measured, Probe, ProbeResult, Pruning
from fedtune.model import libraries, pruned_training
from fedtune.model.base import Base, to_numpy
from fedtune.model.lora import frozen, layers, read_local, start, with_adapters
from fedtune.model.probe import measure
from fedtune.model.train import Between, Trained, report_out_of_memory, train
from fedtune.pruning.structure import LayerSlice, bitmap
from fedtune.seeds import derive
from fedtune.tensors import Tensors, cast

CALIBRATION = 16
"""Scalars that are measured, at least, to learn how large they are."""


def perform(
    base: Base,
    examples: Sequence[Example],
    assignment: Assignment,
    *,
    threads: int,
    replicas: Replicas | None = None,
) -> ClientUpdate:
    """Do what an assignment asks on so many CPU threads, and return the update; the base is afterwards as before.

    The number of threads is an argument, not the machine's choice, because it changes the last bits of a sum. Replicas
    are what this process remembers of earlier rounds; without them every short message is asked for again, whole.

    Raises:
        ClientError: if the base is another, the training fails, or the client holds no example.
        ConfigError: if the base has no tensors such as are to be moved.
        ShapeError: if a tensor that was sent does not fit the base.
        WireError: if accumulators that were sent are not those that they are said to be.
    """
    with libraries.threads(threads):
        if assignment.probe is not None:
            return measure_seeds(base, examples, assignment, assignment.probe, replicas or Replicas())
        return train_adapter(base, examples, assignment)


def measure_seeds(
    base: Base, examples: Sequence[Example], assignment: Assignment, probe: Probe, replicas: Replicas
) -> ClientUpdate:
    """Rebuild the model from the seeds, take steps along more of them, and return the scalars."""
    name, training = assignment.plan.client, assignment.plan.training
    bank = BANKS[probe.bank](probe.seeds, probe.key)
    answer = ClientUpdate(client=name, round=assignment.round, num_examples=len(examples), tensors={})
    ledger = restore(
        probe.state,
        bank=bank,
        exponent=probe.exponent,
        manifest=base.manifest.digest,
        sampling=probe.sampling,
        replicas=replicas,
    )
    if ledger is None:
        return replace(answer, probed=ProbeResult(np.empty(0, np.int8), lost=True))
    reach = TensorSelection(probe.bank, probe.trainable, vectors=probe.vectors, embeddings=probe.embeddings)
    ordinals = trainable_ordinals(base.manifest, reach, base.matrices)
    steps, sampling = training.steps, probe.sampling
    if probe.calibrate:
        steps, sampling = probe.queries * -(-CALIBRATION // probe.queries), "uniform"
    assert steps is not None  # the message holds a number
    found = measure(
        base,
        examples,
        training,
        probe,
        ledger,
        ordinals,
        sampling_module.sample_ids(
            derive(assignment.seed, "fedkseed.ids"), steps, bank.size, sampling=sampling, levels=probe.levels
        ),
        key=assignment.seed,
        client=name,
    )
    tail = found.losses[-max(1, len(found.losses) // 10) :]
    return replace(
        answer,
        measured=Measured(
            seconds=found.seconds,
            peak_bytes=found.peak_bytes,
            tokens=found.tokens,
            loss_before=found.losses[0] if found.losses else None,
            loss_after=sum(tail) / len(tail) if tail else None,
        ),
        probed=ProbeResult(
            scalars=np.empty(0, np.int8) if probe.calibrate else found.scalars,
            state=ledger.digest[:STATE],
            checks=block_checks(ledger, base.manifest, ordinals, displacement_of(base, bank)),
            skipped=found.skipped,
            rms=found.rms if probe.calibrate else None,
        ),
    )


def displacement_of(base: Base, bank: DirectionBank) -> Displacement:
    """Return the way to displacements by which this client rebuilds tensors; for kron, which does not, numpy's."""
    if isinstance(bank, Kron):
        return displacement
    if fastest(base.device) is not rebuild_compiled:
        return lambda *args, **named: torch_displacement(*args, **named, device=base.device).cpu().numpy()
    from fedtune.directions import rebuild_numba

    return rebuild_numba.displacement


def train_adapter(base: Base, examples: Sequence[Example], assignment: Assignment) -> ClientUpdate:
    name = assignment.plan.client
    if assignment.base and assignment.base != base.digest:
        raise ClientError(
            f"{name}: expected base {assignment.base[:12]}; has {base.digest[:12]} ({base.name}); "
            "load the same model in the same revision and dtype"
        )
    with report_out_of_memory(name, assignment.plan.training.batch):
        if assignment.surgery is not None:
            return train_pruned(base, examples, assignment, assignment.surgery)
        learned = train_locally(base, base, examples, assignment, {})
    return make_update(base, examples, assignment, learned, measured_of(learned.trained))


@dataclass(frozen=True)
class LocalTraining:
    """What came of a training: the local adapter before and after, and whatever was looked at while it was attached."""

    initial: Adapter
    final: Adapter
    saved: Tensors
    trained: Trained
    seen: Any = None


def train_locally(
    base: Base,
    small: Base,
    examples: Sequence[Example],
    assignment: Assignment,
    cut: Mapping[str, LayerSlice],
    *,
    between: Callable[[torch.nn.Module], Between | None] = lambda model: None,
    then: Callable[[torch.nn.Module], Any] | None = None,
) -> LocalTraining:
    """Train as an assignment asks, on a base that is pruned as `cut` says.

    Args:
        base: the whole base.
        small: the same, pruned.
        examples: the client's own.
        assignment: its blobs in the coordinates of `small`.
        cut: what `small` keeps.
        between: from the model with its adapters to what happens between two steps.
        then: called with the model at the end, its adapters still attached.
    """
    local, initial = assignment.local, start(assignment, base.modules, cut)
    saved = assignment.blobs.get("saved", {})
    with with_adapters(
        small,
        frozen=frozen(assignment),
        local=initial,
        scale=assignment.plan.scale,
        dropout=assignment.plan.training.dropout,
        train=local.train,
        saved=saved,
    ) as model:
        kept = max(1, floor(local.rank_decay * assignment.plan.rank))
        tail = tail_norms(model, kept) if local.rank_penalty > 0 else None
        at_start = 0.0 if tail is None else tail().item()
        done = train(
            small,
            examples,
            assignment.plan.training,
            key=assignment.seed,
            client=assignment.plan.client,
            penalty=None if tail is None else lambda: local.rank_penalty * tail(),
            between=between(model),
            weigh=assignment.surgery is not None,
        )
        final = read_local(model)
        if tail is not None and tail().item() < at_start:
            final = {module: Factors(a=f.a[:kept], b=f.b[:, :kept]) for module, f in final.items()}
        parameters = dict(model.named_parameters())
        new_saved = {key: to_numpy(parameters[key]) for key in saved}
        seen = then(model) if then is not None else None
    return LocalTraining(initial, final, new_saved, done, seen)


def make_update(
    base: Base, examples: Sequence[Example], assignment: Assignment, learned: LocalTraining, measured: Measured
) -> ClientUpdate:
    local, plan = assignment.local, assignment.plan
    return ClientUpdate(
        client=plan.client,
        round=assignment.round,
        num_examples=len(examples),
        tensors=cast(upload(learned.initial, learned.final, local, scale=plan.scale), local.wire_dtype),
        saved=learned.saved,
        measured=measured,
        base=base.digest,
    )


def train_pruned(base: Base, examples: Sequence[Example], assignment: Assignment, surgery: Pruning) -> ClientUpdate:
    """Measure the loss as received, make the model smaller, train, measure again, and score heads and channels.

    The loss before is taken at the ratio of the last participation, before surgery: taken after it, a client would be
    paid for the damage that training repairs. (By the order of heads and channels as it is now: in the round after a
    new one that is not quite the structure that was trained.)
    """
    began, key, plan, settings = time.perf_counter(), assignment.seed, assignment.plan, surgery.settings
    body, side = pruned_training.block_layout(base), 0
    if not examples:
        raise ClientError(f"{plan.client}: expected at least one training example; got none; give the client more data")
    score = partial(
        pruned_training.measured_scores,
        examples=examples,
        settings=settings,
        anatomy=body,
        key=key,
        batch=plan.training.batch,
    )
    if settings.policy == "local" and plan.ratio > 0:
        with pruned_training.with_received_adapters(base, assignment, base, {}) as model:
            worth, side = score(model, base, keep=None)
        parts = pruned_training.own_structures(worth, plan.ratio, settings, body)
    else:
        parts = pruned_training.structures_of(surgery, body)
    steps = plan.training.steps
    assert steps is not None  # the planner resolves epochs
    parts = parts.within(steps)
    rows = pruned_training.evaluation_rows(examples, base, key=key, batch=plan.training.batch)
    with pruned_training.with_pruned_model(base, parts.before, body) as small:
        order, cut = (
            pruned_training.sliced_assignment(assignment, parts.before, parts.sent, body),
            pruned_training.cut_of(parts.before, body),
        )
        with pruned_training.with_received_adapters(small, order, base, cut) as model:
            loss_before = pruned_training.evaluation_loss(model, rows, base)

    def then(model: torch.nn.Module) -> tuple[float, Tensors, int]:
        found, tokens = score(model, base, keep=parts.last) if surgery.wanted else ({}, 0)
        return pruned_training.evaluation_loss(model, rows, base), found, tokens

    with pruned_training.with_pruned_model(base, parts.first, body) as small:
        learned = train_locally(
            base,
            small,
            examples,
            pruned_training.sliced_assignment(assignment, parts.first, parts.sent, body),
            pruned_training.cut_of(parts.first, body),
            between=lambda model: pruned_training.cutter(model, parts.stages, settings, body, steps=steps),
            then=then,
        )
    loss_after, worth, tokens = learned.seen
    # The start of what was trained, in the structure in which it ended.
    last = start(
        pruned_training.sliced_assignment(assignment, parts.last, parts.sent, body),
        base.modules,
        pruned_training.cut_of(parts.last, body),
    )
    done = replace(
        measured_of(learned.trained),
        seconds=time.perf_counter() - began,
        loss_before=loss_before,
        loss_after=loss_after,
        side_tokens=side + tokens + 2 * sum(each.tokens for each in rows),
    )
    mask = b""
    if settings.policy == "local" and parts.last is not None:
        mask = bitmap(parts.last, body)
    elif settings.policy == "vote" and surgery.wanted:
        mask = pruned_training.vote(worth, parts.last, max(plan.ratio, settings.target), settings, body)
    return replace(
        make_update(base, examples, assignment, replace(learned, initial=last), done),
        kept=parts.last.digest if parts.last else b"",
        mask=mask,
        scores=pruned_training.wire_scores(worth) if surgery.wanted and settings.policy == "nested" else {},
    )


def upload(initial: Adapter, final: Adapter, local: LocalAdapter, *, scale: float) -> Tensors:
    """Return the flat tensors that go up, the scale folded into b; see `LocalAdapter.upload` and `.train`."""
    tensors = {}
    for name, factors in final.items():
        a, b = factors.a, factors.b
        if local.upload == "difference":
            a, b = a - initial[name].a, b - initial[name].b
        tensors[f"{name}.b"] = scale * b
        if local.train == "ab":
            tensors[f"{name}.a"] = a
    return tensors


def tail_norms(model: torch.nn.Module, kept: int) -> Callable[[], torch.Tensor]:
    """Return a function that gives the sum over modules of ||B[:, kept:]|| ||A[kept:, :]|| as it then stands.

    HetLoRA's regulariser, Cho et al., EMNLP 2024, arXiv 2401.06432, section 3.2. The small number keeps the gradient
    of a norm finite at zero.
    """
    pairs = [(layer.lora_A["local"].weight, layer.lora_B["local"].weight) for layer in layers(model, "local").values()]

    def tail() -> torch.Tensor:
        norms = [
            (b[:, kept:].square().sum() + 1e-12).sqrt() * (a[kept:].square().sum() + 1e-12).sqrt() for a, b in pairs
        ]
        return torch.stack(norms).sum()

    return tail


def measured_of(trained: Trained) -> Measured:
    return Measured(
        seconds=trained.seconds,
        peak_bytes=trained.peak_bytes,
        tokens=trained.tokens,
        loss_before=trained.loss_before,
        loss_after=trained.loss_after,
        importance=trained.importance,
    )
