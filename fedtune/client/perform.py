"""What a client does with an assignment: train or probe on its own examples, and hand back what it learned."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch

from fedtune.client.own_trainer import OwnTrainer, train_by_trainer
from fedtune.client.personal_state import StateFolder
from fedtune.client.personal_training import attach, train_personal
from fedtune.client.seeds import work_along_seeds
from fedtune.client.whole_losses import loss_after_in_whole, loss_before_in_whole
from fedtune.data.encode import Example
from fedtune.data.loss_rows import loss_rows, num_loss_rows
from fedtune.errors import ClientError, ShapeError
from fedtune.lora.adapter import Adapter, Factors
from fedtune.messages import (
    Assignment,
    ClientUpdate,
    DescendSeeds,
    LoraResult,
    Measured,
    Plan,
    ProbeSeeds,
    Pruning,
    SeedTask,
    SumClasses,
    Training,
    TrainLora,
)
from fedtune.model import libraries, module_importance, pruned_training
from fedtune.model.base import Base, check_packing, to_numpy
from fedtune.model.base_head import with_head
from fedtune.model.batches import Batch
from fedtune.model.class_sums import sum_classes
from fedtune.model.lora import read_local, start
from fedtune.model.moments import Moments
from fedtune.model.objective import Hooks
from fedtune.model.preference import check_rows, num_referred, preference_of, with_margins, with_reference
from fedtune.model.pruned_training import Structures
from fedtune.model.repair import Repair, repair_of
from fedtune.model.selective_backward import Windows, with_selective_backward
from fedtune.model.settings import quantised_format
from fedtune.model.shares import ALONE, Shares
from fedtune.model.train import check_finite, report_out_of_memory, train
from fedtune.model.variants import variant
from fedtune.number_formats import from_wire, to_wire
from fedtune.probing.replica import Replicas
from fedtune.probing.steps import OnStep, no_steps
from fedtune.pruning.structure import BlockLayout, bitmap
from fedtune.seeds import derive
from fedtune.tensors import Tensors

Extend: TypeAlias = Callable[[torch.nn.Module], Hooks]
"""From a model with its adapters to what its training does beside plain steps."""

CODES_BYTES = 8
"""Of the digest of a quantised base's codes, which an update states."""


def perform(
    base: Base,
    examples: Sequence[Example],
    assignment: Assignment,
    *,
    threads: int,
    replicas: Replicas | None = None,
    held_out: Sequence[Example] = (),
    on_step: OnStep = no_steps,
    shares: Shares = ALONE,
    max_bytes: int | None = None,
    personal: StateFolder | None = None,
    own: OwnTrainer | None = None,
) -> ClientUpdate:
    """Do what an assignment asks on so many CPU threads, and return the update; the base is afterwards as before.

    The number of threads is an argument, not the machine's choice, because it changes the last bits of a sum. Replicas
    are what this process remembers of earlier rounds; without them every short message is asked for again, whole.
    The losses before and after are those of rows that the client holds out, or of training rows if it holds out none.
    With shares the steps of an adapter's training are divided among several processes, each of which calls this.
    `max_bytes` is what this process may take in all; None: what the machine has. `personal` is where the client's own
    model of earlier rounds lies, and where this round's goes. `own` trains in place of fedtune's own training.

    Raises:
        ClientError: if the base is another, the training fails, or the client holds no example.
        ConfigError: if the base has no tensors such as are to be moved, or cannot read packed examples.
        ShapeError: if a tensor that was sent does not fit the base.
        WireError: if accumulators that were sent are not those that they are said to be.
    """
    replicas = replicas or Replicas()
    head = replicas.head(assignment.probe) if isinstance(assignment.task, SeedTask) else {}
    terms = assignment.task.terms if isinstance(assignment.task, TrainLora) else ()
    if own is None or own.losses is None:  # else its rows are not here
        check_rows(examples, terms, assignment.plan.client)
    if own is not None and not isinstance(assignment.task, TrainLora):
        expected = "an order to train a LoRA adapter, which is what a trainer of its own does"
        got = f"one of the method {assignment.method!r}"
        raise ClientError(f"{assignment.plan.client}: expected {expected}; got {got}; leave client.trainer out")
    with libraries.threads(threads), with_head(base, head) as base:
        match assignment.task:
            case ProbeSeeds() | DescendSeeds():
                return work_along_seeds(base, examples, assignment, replicas, held_out, on_step, max_bytes=max_bytes)
            case SumClasses():
                check_base(assignment, base)
                return sum_classes(base, examples, assignment, on_step=on_step)
            case TrainLora() as task:
                return train_adapter(base, examples, assignment, task, held_out, on_step, shares, personal, own)


def train_adapter(
    base: Base,
    examples: Sequence[Example],
    assignment: Assignment,
    task: TrainLora,
    held_out: Sequence[Example] = (),
    on_step: OnStep = no_steps,
    shares: Shares = ALONE,
    personal: StateFolder | None = None,
    own: OwnTrainer | None = None,
) -> ClientUpdate:
    """Train the adapter of an assignment on the client's examples, in a pruned model if the task says so."""
    refuse_unsupported(assignment.plan, task, shares)
    plan, assignment = assignment.plan, in_numbers(assignment, "global", "local")
    task = assignment.lora
    # Before training: hours of work on another base would only be refused in the end.
    check_base(assignment, base)
    coded = plan.base_dtype or quantised_format(base.dtype)
    if coded and (task.pruning is not None or plan.ratio > 0):
        raise ClientError(
            f"{plan.client}: expected a plan that prunes no codes; got one over a base in {coded}; "
            "let the planner choose one of the two: columns taken out of codes leave blocks of others"
        )
    base = variant(base, plan.base_dtype)
    if plan.training.packing:
        check_packing(base)
    # Which parameters are trained in full is the site's own word: any other would be trained and sent as well.
    if strange := sorted(task.blobs.get("saved", {}).keys() - set(base.saved)):
        names = ", ".join(base.saved) or "none"
        raise ShapeError(f"{strange[0]}: expected parameters that this client trains in full ({names}); got another")
    with report_out_of_memory(plan.client, plan.training.batch):
        if own is not None:
            count = num_loss_rows(examples_seen(plan.training))
            rows = loss_rows(examples, held_out, plan.client, count=count) if own.losses is None else ()
            initial = start(task, plan, base.modules)
            outcome = train_by_trainer(own, base, examples, assignment, initial, rows, on_step)
            learned = LocalTraining(initial, outcome.final, outcome.saved, outcome.measured, None)
            result, measured = lora_result(base, assignment, task, learned), outcome.measured
        elif task.pruning is not None:
            result, measured = train_pruned(base, examples, assignment, task, task.pruning, held_out, on_step)
        elif task.personal is not None:
            result, measured = train_with_own(base, examples, assignment, task, held_out, on_step, personal)
        else:
            extend = partial(Hooks, terms=task.terms) if task.terms else None
            rows = loss_rows(examples, held_out, plan.client, count=num_loss_rows(examples_seen(plan.training)))
            initial, began = start(task, plan, base.modules), time.perf_counter()
            referred = 0
            if (preference := preference_of(task.terms)) is not None:
                examples = with_margins(base, examples, preference, plan.training, key=assignment.seed)
                rows = with_reference(base, rows, preference, plan.training)
                referred = num_referred(examples) + num_referred(rows)
            scores, tokens = module_importance.before_training(base, examples, assignment, initial)
            learned = train_locally(base, examples, assignment, initial, extend, rows, on_step, shares)
            result, measured = lora_result(base, assignment, task, learned), learned.measured
            if referred:
                seconds = time.perf_counter() - began
                measured = replace(measured, seconds=seconds, side_tokens=measured.side_tokens + referred)
            if plan.importance:
                late, more = module_importance.after_training(base, examples, assignment, learned.final, learned.saved)
                measured = replace(
                    measured,
                    seconds=time.perf_counter() - began,
                    # A token forward and backward counts as two that only go forward.
                    side_tokens=measured.side_tokens + 2 * (tokens + more),
                    module_importance=module_importance.normalise(scores or late, sorted(initial)),
                )
    return ClientUpdate(plan.client, assignment.round, len(examples), result, measured)


def refuse_unsupported(plan: Plan, task: TrainLora, shares: Shares) -> None:
    """Raise ClientError for what an order may ask and this client does not do: nothing is left out in silence."""
    preference, pruning = preference_of(task.terms), task.pruning is not None
    personal = task.personal is not None
    asked = {
        f"an adapter of the {plan.view} model alone": plan.view != "whole" and plan.ratio == 0,
        "answers that are compared in a pruned model": preference is not None and (pruning or plan.ratio > 0),
        "answers that are compared in packed rows": preference is not None and plan.training.packing,
        "answers that are compared beside a personal model": preference is not None and personal,
        "scores of the modules of a pruned model": bool(plan.importance) and plan.ratio > 0,
        "scores of the modules beside a personal model": bool(plan.importance) and personal,
        "a personal model of a pruned one": pruning and personal,
        "a personal model that several processes share": shares.size > 1 and personal,
    }
    if unsupported := [what for what, is_asked in asked.items() if is_asked]:
        raise ClientError(
            f"{plan.client}: expected a plan that this client can follow; got {' and '.join(unsupported)}; "
            "run a release of fedtune that does it, or let the planner choose another"
        )


def in_numbers(assignment: Assignment, *roles: str) -> Assignment:
    """Return an assignment whose tensors of some roles are numbers where codes came: training works on those."""
    task = assignment.lora
    blobs = {role: from_wire(blob) if role in roles else blob for role, blob in task.blobs.items()}
    return replace(assignment, task=replace(task, blobs=blobs))


def examples_seen(training: Training) -> int:
    """Return how many examples go forward in a client's steps, each counted as often as it does."""
    assert training.steps is not None  # the planner resolves epochs
    return training.steps * training.batch * training.accumulation


def check_base(assignment: Assignment, base: Base) -> None:
    """Refuse an assignment that is for another base.

    Raises:
        ClientError: naming both.
    """
    if base.spoiled:
        client, why = assignment.plan.client, base.spoiled[0]
        raise ClientError(f"{client}: expected the base as it was loaded; got another, since {why}; start anew")
    if assignment.base and assignment.base != base.digest:
        raise ClientError(
            f"{assignment.plan.client}: expected base {assignment.base[:12]}; has {base.digest[:12]} ({base.name}); "
            "load the same model in the same revision and dtype"
        )


@dataclass(frozen=True)
class LocalTraining:
    """A local adapter before and after its training, and what was measured."""

    initial: Adapter
    final: Adapter
    saved: Tensors
    measured: Measured
    hooks: Hooks | None
    """What was done beside plain steps."""


def train_locally(
    base: Base,
    examples: Sequence[Example],
    assignment: Assignment,
    initial: Adapter,
    extend: Extend | None = None,
    rows: Sequence[Example] = (),
    on_step: OnStep = no_steps,
    shares: Shares = ALONE,
) -> LocalTraining:
    """Train an adapter from its initial value as an assignment asks.

    Args:
        base: the base, whole or pruned.
        examples: the client's own.
        assignment: its blobs in the coordinates of `base`.
        initial: the trainable adapter.
        extend: from the model with its adapters to what is done beside plain steps.
        rows: on which the loss is measured before and after; see `train`.
        on_step: called after each step.
        shares: what of each batch this process computes.
    """
    plan, task = assignment.plan, assignment.lora
    saved = task.blobs.get("saved", {})
    with attach(base, assignment, initial, saved) as model:
        hooks = extend(model) if extend else None
        windows = Windows(plan.back, derive(assignment.seed, "back"))

        def after_step(done: int, steps: int) -> None:
            # The same for all batches of a step, which then is one on the joined batch.
            windows.next_step()
            on_step(done, steps)

        with with_selective_backward(model, windows) if plan.back else nullcontext():
            trained = train(
                base,
                examples,
                plan.training,
                key=assignment.seed,
                client=plan.client,
                hooks=hooks,
                rows=rows,
                on_step=after_step,
                shares=shares,
            )
        # Inside the block: outside of it the base is as before, and what was learned is gone.
        parameters, final = dict(model.named_parameters()), read_local(model)
        new_saved = {name: to_numpy(parameters[name]) for name in saved}
        if hooks:
            final = hooks.after_training(final)
    return LocalTraining(initial, final, new_saved, trained.measured, hooks)


def lora_result(base: Base, assignment: Assignment, task: TrainLora, learned: LocalTraining) -> LoraResult:
    tensors = upload(learned.initial, learned.final, task, scale=assignment.plan.scale)
    # Rounded at random: a change smaller than half a step then still counts, on average over clients and rounds.
    return LoraResult(
        to_wire(tensors, task.wire_dtype, key=assignment.seed),
        learned.saved,
        base.digest,
        base_dtype=quantised_format(base.dtype) or "",
        codes=base.codes[:CODES_BYTES],
    )


def train_with_own(
    base: Base,
    examples: Sequence[Example],
    assignment: Assignment,
    task: TrainLora,
    held_out: Sequence[Example],
    on_step: OnStep,
    folder: StateFolder | None,
) -> tuple[LoraResult, Measured]:
    """Train an adapter beside the client's own model, of which nothing is in the result but two short digests."""
    plan = assignment.plan
    extend = partial(Hooks, terms=task.terms) if task.terms else None
    rows = loss_rows(examples, held_out, plan.client, count=num_loss_rows(examples_seen(plan.training)))

    def plain(order: Assignment, initial: Adapter) -> tuple[Adapter, Tensors, Measured]:
        learned = train_locally(base, examples, order, initial, extend, rows, on_step)
        return learned.final, learned.saved, learned.measured

    initial = start(task, plan, base.modules)
    trained = train_personal(base, examples, assignment, initial, folder, rows=rows, on_step=on_step, plain=plain)
    saved = {name: tensor for name, tensor in trained.saved.items() if name in task.blobs.get("saved", {})}
    learned = LocalTraining(trained.initial, trained.final, saved, trained.measured, None)
    return replace(lora_result(base, assignment, task, learned), personal=trained.trace), trained.measured


def train_pruned(
    base: Base,
    examples: Sequence[Example],
    assignment: Assignment,
    task: TrainLora,
    pruning: Pruning,
    held_out: Sequence[Example] = (),
    on_step: OnStep = no_steps,
) -> tuple[LoraResult, Measured]:
    """Measure the loss as received, make the model smaller, train, measure again, and score heads and channels.

    The loss before is taken at the ratio of the last participation, before the model is pruned: taken after it, a
    planner would reward the damage that training repairs. (By the ranking of heads and channels as it is now: in the
    round after a new one that is not quite the structure that was trained.)
    """
    began, key, plan, settings = time.perf_counter(), assignment.seed, assignment.plan, pruning.settings
    body, side = pruned_training.block_layout(base), 0
    if not examples:
        raise ClientError(f"{plan.client}: expected at least one training example; got none; give the client more data")
    score = partial(
        pruned_training.score_units,
        examples=examples,
        settings=settings,
        layout=body,
        key=key,
        batch=plan.training.batch,
    )
    # Scored as received, before any step: the client's own structure must not depend on how it trains.
    if settings.policy == "local" and plan.ratio > 0:
        with pruned_training.with_received_adapters(base, task, plan, base, {}) as model:
            worth, side = score(model, base, structure=None)
        parts = pruned_training.own_structures(worth, plan.ratio, settings, body)
    else:
        parts = pruned_training.structures_of(pruning, body)
    steps = plan.training.steps
    assert steps is not None  # the planner resolves epochs
    parts = parts.within(steps)
    repair = repair_of(base.model, task.blobs.get("moments", {}), settings, body)
    moments = Moments(settings, body, key=key, device=base.device) if pruning.moments_requested else None
    chosen = loss_rows(examples, held_out, plan.client, count=pruned_training.ROWS)
    rows = pruned_training.evaluation_batches(chosen, base, batch=plan.training.batch)
    loss_before, rows = loss_as_received(base, task, plan, parts, body, rows, repair)
    check_finite(loss_before, f"{plan.client}, before step 1", plan.training)

    def measure_at_end(model: torch.nn.Module) -> tuple[float, Tensors, int]:
        asked = pruning.scores_requested or moments is not None
        scores, tokens = score(model, base, structure=parts.last, moments=moments) if asked else ({}, 0)
        return pruned_training.evaluation_loss(model, rows, base), scores, tokens

    def extend(model: torch.nn.Module) -> Hooks:
        shrink = pruned_training.stage_shrinker(model, parts.stages, settings, body, steps=steps, repair=repair)
        return Hooks(model, task.terms, between=shrink, weigh=True, measure=measure_at_end)

    with pruned_training.with_pruned_model(base, parts.first, body, repair) as small:
        received = pruned_training.slice_task(task, parts.first, parts.sent, body)
        initial = start(received, plan, base.modules, pruned_training.slices_of(parts.first, body))
        learned = train_locally(small, examples, replace(assignment, task=received), initial, extend, on_step=on_step)
    assert learned.hooks is not None
    loss_after, worth, tokens = learned.hooks.at_end
    check_finite(loss_after, f"{plan.client}, after step {steps}", plan.training)
    # The start of what was trained, in the structure in which it ended.
    last = start(
        pruned_training.slice_task(task, parts.last, parts.sent, body),
        plan,
        base.modules,
        pruned_training.slices_of(parts.last, body),
    )
    whole: dict[str, Any] = {}
    if pruning.whole_requested:
        whole["whole_loss_before"] = loss_before_in_whole(base, task, plan, rows)
        whole["whole_loss_after"] = loss_after_in_whole(
            base,
            task,
            plan,
            rows,
            initial=last,
            final=learned.final,
            saved=learned.saved,
            parts=parts,
            layout=body,
        )
    measured = replace(
        learned.measured,
        **whole,
        seconds=time.perf_counter() - began,
        loss_before=loss_before,
        loss_after=loss_after,
        importance=learned.hooks.importance / (steps - learned.measured.skipped_steps),
        side_tokens=side + tokens + (2 + len(whole)) * sum(batch.tokens for batch in rows),
    )
    sends_scores = pruning.scores_requested and settings.policy == "nested"
    result = replace(
        lora_result(base, assignment, task, replace(learned, initial=last)),
        structure_digest=parts.last.digest if parts.last else b"",
        mask=mask_of(pruning, plan.ratio, parts, worth, body),
        scores=pruned_training.wire_scores(worth) if sends_scores else {},
        moments=moments.result() if moments is not None else {},
    )
    return result, measured


def loss_as_received(
    base: Base,
    task: TrainLora,
    plan: Plan,
    parts: Structures,
    body: BlockLayout,
    rows: Sequence[Batch],
    repair: Repair | None = None,
) -> tuple[float, Sequence[Batch]]:
    """Return the loss of what was sent, in the structure of the client's last participation, and the rows it is of.

    Batches of rows whose loss is not finite are left out, unless that is all.
    """
    with pruned_training.with_pruned_model(base, parts.before, body, repair) as small:
        received = pruned_training.slice_task(task, parts.before, parts.sent, body)
        cut = pruned_training.slices_of(parts.before, body)
        with pruned_training.with_received_adapters(small, received, plan, base, cut) as model:
            loss = pruned_training.evaluation_loss(model, rows, base)
            if not math.isfinite(loss):
                rows = pruned_training.finite_batches(model, rows, base)
                loss = pruned_training.evaluation_loss(model, rows, base)
            return loss, rows


def mask_of(pruning: Pruning, ratio: float, parts: Structures, worth: Tensors, body: BlockLayout) -> bytes:
    """Return the bitmap that is sent: of a client's own structure, of its vote, or none."""
    settings = pruning.settings
    if settings.policy == "local" and parts.last is not None:
        return bitmap(parts.last, body)
    if settings.policy == "vote" and pruning.scores_requested:
        return pruned_training.vote(worth, parts.last, max(ratio, settings.target), settings, body)
    return b""


def difference(initial: Factors, final: Factors) -> Factors:
    """Return what training has changed; of ranks that the client has cut nothing is sent."""
    rank = final.rank
    return Factors(a=final.a - initial.a[:rank], b=final.b - initial.b[:, :rank])


def upload(initial: Adapter, final: Adapter, task: TrainLora, *, scale: float) -> Tensors:
    """Return the flat tensors that go up, the scale folded into b; see `TrainLora.upload` and `.train`."""
    if task.upload == "difference":
        # In float32, before the cast: in 16 bits the small difference of two large factors is mostly rounding.
        final = {name: difference(initial[name], factors) for name, factors in final.items()}
    tensors = {f"{name}.b": scale * factors.b for name, factors in final.items()}
    if task.train == "ab":
        tensors |= {f"{name}.a": factors.a for name, factors in final.items()}
    if task.personal is None:
        return tensors
    return {name: tensor for name, tensor in tensors.items() if not task.personal.keeps(name)}
