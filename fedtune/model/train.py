"""First-order local training: the schedule, the optimizer, and one client's training loop."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from fedtune.data.encode import Example
from fedtune.errors import ClientError
from fedtune.messages import OUT_OF_MEMORY, Measured, Training
from fedtune.model.base import Base
from fedtune.model.batches import Batch, collate
from fedtune.model.lora import layers
from fedtune.model.loss import summed_loss
from fedtune.model.objective import Hooks
from fedtune.model.shares import ALONE, Shares
from fedtune.model.torch_seed import torch_seed
from fedtune.probing.answer import process_peak_bytes
from fedtune.probing.order import batches
from fedtune.probing.steps import OnStep, no_steps
from fedtune.seeds import derive

CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
"""What transformers calls it today, and up to some release of 5."""
MAX_SKIPPED = 3
"""Steps of a round that a client may leave out because their loss or gradient is not finite."""


@dataclass(frozen=True)
class Trained:
    """The course of a training run."""

    losses: Sequence[float]
    """Mean loss of each optimizer step that was taken, before the step."""
    measured: Measured
    """Memory of the allocator on CUDA, of the whole process elsewhere."""


def learning_rate(training: Training, step: int, steps: int) -> float:
    """Return the learning rate of a step (from 0): linear warm-up, then constant, linear or cosine to zero."""
    # Not transformers' schedules: their warm-up starts at a rate of 0, and the first step of a round would do nothing.
    warm = math.ceil(training.warmup * steps)
    if step < warm:
        return training.rate * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return training.rate * shape[training.schedule]


def autocast(training: Training, device: torch.device) -> AbstractContextManager[Any]:
    """Return the bf16 autocast context where `uses_autocast` says so."""
    return torch.autocast(device.type, torch.bfloat16) if uses_autocast(training, device) else nullcontext()


def uses_autocast(training: Training, device: torch.device) -> bool:
    """Return whether the recipe wants bf16 autocast, or leaves it to the device (`auto`) and that is fast at it."""
    # Compute capability 8.0 is Ampere, the first with bf16 in its tensor cores.
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return training.autocast == "bf16" or (training.autocast == "auto" and fast)


def make_optimizer(training: Training, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return the recipe's optimizer, SGD or AdamW, new for every round; `train` sets its learning rate step by step."""
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=training.momentum, weight_decay=training.weight_decay)
    return torch.optim.AdamW(parameters, weight_decay=training.weight_decay)


def train(
    base: Base,
    examples: Sequence[Example],
    training: Training,
    *,
    key: int,
    client: str,
    hooks: Hooks | None = None,
    rows: Sequence[Example] = (),
    on_step: OnStep = no_steps,
    shares: Shares = ALONE,
    repeat: int = 1,
) -> Trained:
    """Take `training.steps` optimizer steps on all parameters of the base's model that require a gradient.

    One step averages the loss over all tokens (causal) or examples of its `accumulation` batches, so that it equals
    one step on the joined batch.

    Args:
        base: the base with its adapters attached.
        examples: the client's own.
        training: with `steps` set.
        key: from `derive`; data order and dropout follow from it.
        client: for error messages.
        hooks: what is done beside that: after each backward pass, before each step, and after every one but the last.
        rows: on which the loss is measured before the first step and after the last one; without any it is not. Batches
            of them whose loss is not finite before the first step are left out, unless that is all.
        on_step: called after each step.
        shares: what of each batch this process computes; the others of the client take the same steps.
        repeat: steps in a row that see the same batches.

    A step whose loss or gradient is not finite is left out: its gradients are dropped, and rates and data go on.

    Raises:
        ClientError: if there is no example, if the loss before or after is not finite, or if more than `MAX_SKIPPED`
            steps, or all, were left out; of memory see `report_out_of_memory`.
    """
    if not examples:
        raise ClientError(f"{client}: expected at least one training example; got none; give the client more data")
    assert training.steps is not None  # the planner resolves epochs
    began, order = time.perf_counter(), batches(len(examples), size=training.batch, key=key)
    optimizer = make_optimizer(training, [p for p in base.model.parameters() if p.requires_grad])
    [group] = optimizer.param_groups
    losses, chosen, tokens, skipped = list[float](), list[Any](), 0, 0
    loss_before, measured_rows = loss_before_training(base, rows, training)
    check_finite(loss_before, f"{client}, before step 1", training)
    with training_mode(base, training), torch_seed(derive(key, "dropout", shares.place), base.device):
        for step in range(training.steps):
            group["lr"] = learning_rate(training, step, training.steps)
            if step % repeat == 0:
                chosen = [shares.own(next(order)) for _ in range(training.accumulation)]
            parts = [collate([examples[i] for i in own], base, packed=training.packing) for own in chosen if own]
            counted, seen = sum(batch.count for batch in parts), sum(batch.tokens for batch in parts)
            loss, seen = shares.join(group["params"], backward(base, parts, training), counted, seen)
            if hooks:
                hooks.after_backward(optimizer)
            norm = gradient_norm(group["params"])
            # After one step on what is not finite, every parameter would be NaN.
            if math.isfinite(loss) and math.isfinite(norm):
                losses.append(loss)
                take_step(optimizer, norm, training, hooks)
            else:
                skipped += 1
                got = f"loss {loss:g}, gradient of norm {norm:g}"
                check_skipped(skipped, f"{client}, step {step + 1}", got, training)
            optimizer.zero_grad(set_to_none=True)
            tokens += seen
            on_step(step + 1, training.steps)
            if hooks and step + 1 < training.steps:
                hooks.after_step(step + 1, optimizer)
    loss_after = mean_loss(row_losses(base, measured_rows, training))
    check_finite(loss_after, f"{client}, after step {training.steps}", training)
    measured = Measured(
        seconds=time.perf_counter() - began,
        peak_bytes=peak_bytes(base.device),
        tokens=tokens,
        loss_before=loss_before,
        loss_after=loss_after,
        skipped_steps=skipped,
    )
    return Trained(losses, measured)


RowLosses: TypeAlias = Sequence[tuple[float, int]]
"""By batch, the summed loss and what counts in it."""


def loss_before_training(
    base: Base, rows: Sequence[Example], training: Training
) -> tuple[float | None, Sequence[Sequence[Example]]]:
    """Return the mean loss of some rows, and the batches of them that it is of: without those that are not finite."""
    parts = [rows[begin : begin + training.batch] for begin in range(0, len(rows), training.batch)]
    losses = row_losses(base, parts, training)
    # One text that overflows a 16-bit base must not cost a client its round: the rest says how well it learns.
    finite = [place for place, (total, _) in enumerate(losses) if math.isfinite(total)] or range(len(parts))
    return mean_loss([losses[place] for place in finite]), [parts[place] for place in finite]


def row_losses(base: Base, parts: Sequence[Sequence[Example]], training: Training) -> RowLosses:
    """Return the losses of batches of rows, in the arithmetic of the training, without dropout."""
    losses = list[tuple[float, int]]()
    base.model.eval()  # adapters are attached in training mode, with their dropout
    # Not in inference mode: what a model stores in a forward pass, as some do of positions, is used again in training.
    with torch.no_grad():
        for part in parts:
            batch = collate(part, base, packed=training.packing)
            with autocast(training, base.device):
                losses.append((summed_loss(base.model, batch, task=base.task).item(), batch.count))
    return losses


def mean_loss(losses: RowLosses) -> float | None:
    """Return the mean loss in nats per token (causal) or example; None where nothing counts."""
    count = sum(counted for _, counted in losses)
    return sum(total for total, _ in losses) / count if count else None


def backward(base: Base, parts: Sequence[Batch], training: Training) -> float:
    """Add up the gradients of one optimizer step, batch by batch, and return the mean loss over all of them."""
    # Divided by the count of the whole step, not of each batch: a short last batch must not weigh more.
    count, total = max(1, sum(batch.count for batch in parts)), 0.0
    for batch in parts:
        with autocast(training, base.device):
            loss = summed_loss(base.model, batch, task=base.task) / count
        loss.backward()
        total += loss.item()
    return total


def gradient_norm(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Return the norm of all gradients together; not finite if one of their numbers is not."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def take_step(optimizer: torch.optim.Optimizer, norm: torch.Tensor, training: Training, hooks: Hooks | None) -> None:
    """Scale gradients of this norm down to the recipe's bound, and take the step."""
    [group] = optimizer.param_groups
    if hooks:
        hooks.before_step(optimizer)
    if training.clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(group["params"], training.clip_norm, norm)
    optimizer.step()


def check_skipped(skipped: int, where: str, got: str, training: Training) -> None:
    """Raise ClientError if more steps were left out than a round may lose, or all of them.

    Raises:
        ClientError: with the last of them.
    """
    if skipped > MAX_SKIPPED or skipped == training.steps:
        raise ClientError(
            f"{where}: expected a finite loss and gradient in all but {MAX_SKIPPED} steps, and in one at least; got "
            f"{skipped} without, the last with {got}, with {training.optimizer} at learning_rate "
            f"{training.rate:g}; lower it, or use another model.dtype"
        )


def check_finite(loss: float | None, where: str, training: Training) -> None:
    """Raise ClientError if a loss is not finite."""
    if loss is not None and not math.isfinite(loss):
        raise ClientError(
            f"{where}: expected a finite loss; got {loss} with {training.optimizer} at "
            f"learning_rate {training.rate:g}; lower it, or use another model.dtype"
        )


@contextmanager
def training_mode(base: Base, training: Training) -> Iterator[None]:
    """Put a model with adapters into training mode inside the block, and measure its peak memory from here on."""
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
    only_adapters_train(base.model)
    try:
        with activation_checkpointing(base.model) if training.gradient_checkpointing else nullcontext():
            yield
    finally:
        base.model.eval()


@contextmanager
def activation_checkpointing(model: Any) -> Iterator[None]:
    """Let a model compute activations again in the backward pass instead of storing them, inside the block."""
    name = next(name for name in CHECKPOINTING if hasattr(model, f"{name}_enable"))
    getattr(model, f"{name}_enable")()
    # Enabling puts a hook on the embeddings that asks for their gradient: backward passes would then go through every
    # block, also through those below the lowest that is trained. Checkpoints need none of that.
    model.disable_input_require_grads()
    hooks = list[RemovableHandle]()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # the flag alone: checkpointing reads it, and the modules inside stay in eval mode
            # The layer's own computation, in which some models such as OPT use dropout by this flag, reads the other
            # value. Checkpointing reads the flag before that: in the layer's call or at the top of its forward.
            func = in_eval_mode(module, module._gradient_checkpointing_func)
            module._gradient_checkpointing_func = func
            # Where nothing needs a gradient there is no checkpoint, and forward computes at once.
            hooks.append(module.register_forward_pre_hook(leave_training_mode))
            hooks.append(module.register_forward_hook(enter_training_mode, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        getattr(model, f"{name}_disable")()


def in_eval_mode(module: torch.nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return `checkpoint` for a layer whose flag says eval mode while it computes, the second time as the first."""

    def compute(function: Callable[..., Any], *args: Any) -> Any:
        module.training = False
        try:
            return function(*args)
        finally:
            module.training = True

    return lambda function, *args: checkpoint(partial(compute, function), *args)


def leave_training_mode(module: torch.nn.Module, *_: Any) -> None:
    module.training = torch.is_grad_enabled()


def enter_training_mode(module: torch.nn.Module, *_: Any) -> None:
    module.training = True


@contextmanager
def report_out_of_memory(client: str, batch: int) -> Iterator[None]:
    """Raise one kind of error where memory runs out, on every device: planners then ask for less.

    Raises:
        ClientError: in place of the device's own error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise too_large(client, batch) from error
        raise


def too_large(client: str, batch: int) -> ClientError:
    return ClientError(
        f"{client}: expected its batch of {batch} to fit; {OUT_OF_MEMORY}; lower client.batch (and raise "
        f"client.accumulation) or set client.gradient_checkpointing = true"
    )


def out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Return whether an error means that memory ran out."""
    # torch.OutOfMemoryError is CUDA's alone: the CPU and mps raise a bare RuntimeError.
    return isinstance(error, MemoryError) or bool(re.search("out of memory|can't allocate memory", str(error)))


def only_adapters_train(model: Any) -> None:
    """Put the trainable adapter's dropout into training mode, and leave the base's own off.

    The base is frozen: dropout in it would only make the trained loss differ from the evaluated one.
    """
    model.eval()
    for layer in layers(model).values():
        layer.training = True  # the flag alone: the layer beneath stays in eval mode


def peak_bytes(device: torch.device) -> int:
    """Return the highest memory use so far: of the device on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return process_peak_bytes()
