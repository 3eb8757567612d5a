"""A client whose adapter another program trains: it gets a PEFT model, the data and the order, and is checked after."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fedtune.data.as_dataset import to_dataset
from fedtune.data.encode import Example
from fedtune.errors import ClientError, FedtuneError
from fedtune.lora.adapter import Adapter
from fedtune.messages import Assignment, Measured, Preference, Term, Training
from fedtune.model.base import Base, to_numpy
from fedtune.model.lora import frozen_change, with_adapters, with_saved
from fedtune.model.objective import Hooks, Pairs
from fedtune.model.peft_model import WHAT, lora_layers, read_factors, unwrap, with_peft_model
from fedtune.model.reread import changed_names, reread
from fedtune.model.settings import quantised_format
from fedtune.model.torch_seed import torch_seed
from fedtune.model.train import (
    check_finite,
    loss_before_training,
    mean_loss,
    out_of_memory,
    peak_bytes,
    row_losses,
    uses_autocast,
)
from fedtune.probing.steps import OnStep, no_steps
from fedtune.seeds import derive
from fedtune.tensors import Tensors


@dataclass(frozen=True)
class TrainingData:
    """What a client's own trainer trains on, in the form that suits it."""

    examples: Sequence[Example]
    """Encoded by fedtune, as the recipe's or the site's table `data` says."""
    tokenizer: Any
    """Of the base."""
    rows: Any = None
    """As Python code gave them; None where they came from a file, or to a process of their own."""

    def dataset(self) -> Any:
        """Return the examples as a `datasets.Dataset` with `input_ids` and `labels`, as a Trainer takes it."""
        return to_dataset(self.examples)


@dataclass(frozen=True)
class TrainingOrder:
    """What a round asks of a client's own trainer. It is not checked how it trains, only what comes out."""

    client: str
    method: str
    round: int
    rank: int
    """Of the adapter; the largest, where layers differ."""
    steps: int
    """Optimizer steps."""
    batch: int
    """Examples per forward pass."""
    learning_rate: float
    seed: int
    """Of this client's data order and dropout in this round, below 2^31."""
    trained: str
    """Factors that get gradients: `ab`, or `b` where A is the same for all clients."""
    training: Training
    """The rest of the recipe's table `client`: accumulation, optimizer, schedule, clip_norm and so on."""
    folder: Path | None = None
    """Of this client in the run, for an optimizer's state or checkpoints; None where nothing may be stored."""


Function: TypeAlias = Callable[[Any, TrainingData, TrainingOrder], object]
"""(`peft.PeftModel`, data, order): trains the model's adapter in place, or returns the model that holds it."""
Losses: TypeAlias = Callable[[Any, int], float | None]
"""(model, steps of the round): its mean loss on the rows that a trainer is measured by."""


@dataclass(frozen=True)
class OwnTrainer:
    """Another program's training in place of fedtune's."""

    function: Function
    rows: Any = None
    """The client's data as Python code gave them."""
    losses: Losses | None = None
    """Measures the losses before and after, of a trainer that holds its data itself; None: fedtune does."""
    preference: float | None = None
    """DPO's beta of what it trains; None of what compares no answers."""
    quotes: bool = False
    """Whether the text of its errors may be shown: in a simulation, where the data are the user's own."""
    folder: Path | None = None
    """Where it may store something from round to round."""
    announce: Callable[[Assignment], object] = lambda assignment: None
    """Called with an order that is about to be followed: other processes of this client follow it too."""


@dataclass(frozen=True)
class OwnResult:
    """What a client's own trainer has made of an adapter."""

    final: Adapter
    saved: Tensors
    measured: Measured


@dataclass
class Watch:
    """What is counted while another program trains."""

    model: Any
    """That holds the adapter."""
    steps: int = 0
    tokens: list[torch.Tensor | int] = field(default_factory=list)


def train_by_trainer(
    own: OwnTrainer,
    base: Base,
    examples: Sequence[Example],
    assignment: Assignment,
    initial: Adapter,
    rows: Sequence[Example],
    on_step: OnStep = no_steps,
) -> OwnResult:
    """Have a client's own trainer train the adapter of an assignment, and check what it hands back.

    Terms of the objective (HetLoRA's, FedProx's) are added to the gradients before each step of the optimizer.

    Args:
        own: the trainer.
        base: afterwards as before, whatever the trainer does with it, or refused from then on.
        examples: the client's own.
        assignment: its blobs as numbers.
        initial: the adapter that the round starts from.
        rows: on which the losses before and after are measured, as with fedtune's own training.
        on_step: called before each step of an optimizer of torch on the adapter.

    Raises:
        ClientError: if the order asks for what only fedtune's own training does; if the trainer fails, changes the
            base, or hands back no adapter, or one of other layers or ranks, or one that is not finite.
    """
    plan, task = assignment.plan, assignment.lora
    refuse_for_trainer(own, base, assignment)
    if not examples:
        raise ClientError(f"{plan.client}: expected at least one training example; got none; give the client more data")
    own.announce(assignment)
    began, received = time.perf_counter(), task.blobs.get("saved", {})
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
    steps = plan.training.steps or 1
    parts: Sequence[Sequence[Example]] = ()
    loss_before: float | None = None
    if own.losses is None:
        with attach_as_fedtune(base, assignment, initial, received):
            loss_before, parts = loss_before_training(base, rows, plan.training)
    with (
        unchanged_base(base, plan.client),
        with_saved(base, received, trainable=True),
        with_peft_model(
            base,
            initial,
            frozen=frozen_change(task),
            scale=plan.scale,
            dropout=plan.training.dropout,
            train=task.train,
            key=derive(assignment.seed, "peft"),
        ) as model,
    ):
        parameters = dict(base.model.named_parameters())
        full = {name: parameters[name].requires_grad_(True) for name in received}
        loss_before = own.losses(model, steps) if own.losses is not None else loss_before
        check_finite(loss_before, f"{plan.client}, before step 1", plan.training)
        with stepping(model, task.terms, steps, on_step) as (watch, hooks):
            watch.model = call(own, model, examples, assignment, base)
        final = read_factors(watch.model, initial, scale=plan.scale, client=plan.client)
        check_trained(final, initial, watch, hooks, assignment)
        saved = {name: to_numpy(parameter) for name, parameter in full.items()}
        loss_after = own.losses(watch.model, steps) if own.losses is not None else None
        final = hooks.after_training(final)
    if own.losses is None:
        with attach_as_fedtune(base, assignment, final, saved):
            loss_after = mean_loss(row_losses(base, parts, plan.training))
    check_finite(loss_after, f"{plan.client}, after step {watch.steps}", plan.training)
    measured = Measured(
        seconds=time.perf_counter() - began,
        peak_bytes=peak_bytes(base.device),
        tokens=sum(int(tokens) for tokens in watch.tokens),
        loss_before=loss_before,
        loss_after=loss_after,
    )
    return OwnResult(final, saved, measured)


def refuse_for_trainer(own: OwnTrainer, base: Base, assignment: Assignment) -> None:
    """Refuse an order of which a client's own trainer could not do a part.

    Raises:
        ClientError: naming all of them.
    """
    plan, task = assignment.plan, assignment.lora
    compares = next((term.beta for term in task.terms if isinstance(term, Preference)), None)
    asked = {
        "a pruned model": task.pruning is not None or plan.ratio > 0,
        "a personal model": task.personal is not None,
        "scores of modules": bool(plan.importance),
        "backward passes that leave a share out": plan.back > 0,
        f"a base in {plan.base_dtype or base.dtype}": bool(plan.base_dtype or quantised_format(base.dtype)),
        "virtual tokens": base.virtual is not None,
        f"answers compared with beta {compares}": compares is not None and compares != own.preference,
        "an objective that compares no answers": compares is None and own.preference is not None,
    }
    if unsupported := [what for what, is_asked in asked.items() if is_asked]:
        raise ClientError(
            f"{plan.client}: expected a plan that a trainer of its own can follow; got {' and '.join(unsupported)}; "
            "train this client with fedtune's own training, or leave that out of the recipe"
        )


def attach_as_fedtune(
    base: Base, assignment: Assignment, local: Adapter, saved: Tensors
) -> AbstractContextManager[Any]:
    """Return the context in which losses are measured as with fedtune's own training, to the bit."""
    plan, task = assignment.plan, assignment.lora
    half = uses_autocast(plan.training, base.device)
    return with_adapters(base, frozen=frozen_change(task), local=local, scale=plan.scale, saved=saved, half=half)


def call(own: OwnTrainer, model: Any, examples: Sequence[Example], assignment: Assignment, base: Base) -> Any:
    """Return the model that holds the trained adapter: the one that the trainer returns, or the given one.

    Raises:
        ClientError: if the trainer fails.
    """
    plan, training = assignment.plan, assignment.plan.training
    order = TrainingOrder(
        client=plan.client,
        method=assignment.method,
        round=assignment.round,
        rank=plan.rank,
        steps=training.steps or 1,
        batch=training.batch,
        learning_rate=training.rate,
        seed=assignment.seed % 2**31,
        trained=assignment.lora.train,
        training=training,
        folder=own.folder,
    )
    try:
        with torch_seed(derive(assignment.seed, "trainer"), base.device), torch_modes():
            result = own.function(model, TrainingData(examples, base.tokenizer, own.rows), order)
    # It is another program's code: whatever it raises is this client's failure, and the round goes on.
    except (Exception, SystemExit) as error:
        if isinstance(error, FedtuneError) or (isinstance(error, RuntimeError | MemoryError) and out_of_memory(error)):
            raise
        raise trainer_failed(own, plan.client, error) from error
    return model if result is None else unwrap(result) or model


@contextmanager
def torch_modes() -> Iterator[None]:
    """Put back, after the block, torch's modes that the next client of this process would train under."""
    kind, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(kind)
        torch.set_grad_enabled(gradients)


def trainer_failed(own: OwnTrainer, client: str, error: BaseException) -> ClientError:
    """Return the error of a trainer that fails, with the line of its code; its text may quote the site's data."""
    traceback.print_exception(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    text = " ".join(str(error).split())[:200] if own.quotes else ""
    got = f"{type(error).__name__}{': ' * bool(text)}{text} ({place})"
    return ClientError(f"{client}: expected {WHAT} to train; got {got}; this client's own log says more")


@contextmanager
def stepping(model: Any, terms: Sequence[Term], steps: int, on_step: OnStep) -> Iterator[tuple[Watch, Hooks]]:
    """Count, inside the block, optimizer steps on the model's adapter and tokens, and add the objective's terms."""
    watch = Watch(model)
    hooks = Hooks(model, terms, pairs=lambda _: factor_pairs(watch.model))
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if any(id(parameter) in trained for group in optimizer.param_groups for parameter in group["params"]):
            with torch.enable_grad():
                hooks.after_backward(optimizer)
            watch.steps += 1
            on_step(watch.steps, steps)

    def before_forward(module: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            mask, ids = options.get("attention_mask"), options.get("input_ids")
            # Kept as tensors: reading a number here would have a GPU wait at each step.
            if isinstance(mask, torch.Tensor) and mask.dim() == 2:
                watch.tokens.append(mask.sum())
            elif isinstance(ids, torch.Tensor):
                watch.tokens.append(ids.numel())

    counted = model.get_base_model().register_forward_pre_hook(before_forward, with_kwargs=True)
    stepped = register_optimizer_step_pre_hook(before_step)
    try:
        yield watch, hooks
    finally:
        stepped.remove()
        counted.remove()


def factor_pairs(model: nn.Module) -> Pairs:
    """Return the factors of a PEFT model's layers."""
    pairs = []
    for layer in lora_layers(model).values():
        [adapter] = layer.active_adapters
        pairs.append((layer.lora_A[adapter].weight, layer.lora_B[adapter].weight))
    return pairs


def check_trained(final: Adapter, initial: Adapter, watch: Watch, hooks: Hooks, assignment: Assignment) -> None:
    """Refuse what would be summed up wrongly, or be lost: A where all clients share it, and an objective without terms.

    Raises:
        ClientError: saying which.
    """
    client = assignment.plan.client
    if assignment.lora.train == "b":
        moved = [name for name, factors in final.items() if not np.array_equal(factors.a, initial[name].a)]
        if moved:
            got = f"another A at {moved[0]}"
            raise ClientError(f"{client}: expected {WHAT} to train B alone, as the order says; got {got}")
    if hooks.terms and not watch.steps:
        names = " and ".join(sorted(type(term).__name__ for term in hooks.terms))
        raise ClientError(
            f"{client}: expected steps of an optimizer of torch, to which the objective's {names} is added; got none; "
            "use one, or a method without that term"
        )


@contextmanager
def unchanged_base(base: Base, client: str) -> Iterator[None]:
    """Hold the base's weights against what they were before the block; what has changed is read again from its files.

    Raises:
        ClientError: if they have changed, also where the block fails.
    """
    before = base.checksums
    try:
        yield
    finally:
        # A Trainer moves a model to the device that it likes.
        base.model.requires_grad_(False).eval().to(base.device)
        if wrong := changed_names(base, before):
            mended = reread(base, before)
            if not mended:
                base.spoiled.append(f"the trainer of {client} has changed it")
            rest = "it was read again" if mended else "it could not be read again: start this process anew"
            raise ClientError(
                f"{client}: expected {WHAT} to leave the base as it was; got {len(wrong)} changed parameters, such as "
                f"{wrong[0]}; {rest}; train the adapter alone, and do not merge it"
            )
