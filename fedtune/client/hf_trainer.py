"""A `transformers.Trainer`, or one of trl's, as a client's own trainer: each round it runs its own `train`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import Subset
from transformers import TrainerCallback

from fedtune.client.own_trainer import OwnTrainer, TrainingData, TrainingOrder
from fedtune.client.site import Site
from fedtune.data.loss_rows import num_loss_rows
from fedtune.errors import ConfigError, Fault, type_of
from fedtune.link.settings import Policy
from fedtune.model.base import Base, base_of
from fedtune.model.device import name_of
from fedtune.model.libraries import quiet
from fedtune.model.peft_model import ADAPTER, lora_layers
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.probing.order import batches

PYTHON = "<python>"
"""Name of a base that a Trainer holds."""


@dataclass
class Continued:
    """What one `train` leaves for the next: a Trainer begins each of them anew."""

    steps: int = 0
    """Taken in the rounds before, so that logs and checkpoints count on."""
    history: list[Any] = field(default_factory=list)
    optimizer: Mapping[Any, Any] = field(default_factory=dict)
    """The optimizer's state by parameter, where it is kept."""
    shapes: Sequence[torch.Size] = ()
    """Of the parameters that it belongs to."""
    output: Any = None
    """What `train` returned last."""
    config: Any = None
    """PEFT's configuration of the adapter that was trained last; None before the first round."""
    adapter: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Its tensors, as PEFT names them in a file."""


def check_trainer(trainer: Any) -> None:
    """Refuse a Trainer that cannot take part.

    Raises:
        ConfigError: saying what to change.
    """
    faults = []
    if missing := [name for name in ("train", "args", "model", "callback_handler") if not hasattr(trainer, name)]:
        expected = "a transformers.Trainer, or one of trl's"
        raise ConfigError(Fault("trainer", expected, f"{type_of(trainer)} without {missing[0]}"))
    if not hasattr(trainer.train_dataset, "__len__"):
        got = "none" if trainer.train_dataset is None else f"{type_of(trainer.train_dataset)} without a length"
        faults.append(Fault("trainer.train_dataset", "a data set with a length, by which clients count", got))
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        hint = "pass optimizer_cls_and_kwargs, or set args.optim and args.lr_scheduler_type"
        faults.append(Fault("trainer.optimizers", "none: each round trains another adapter", "an optimizer", hint))
    if getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", False):
        hint = "launch it with torchrun or accelerate, each process with the whole base"
        faults.append(Fault("trainer.args", "a launch without FSDP and DeepSpeed", "one of them", hint))
    if trainer.model_init is not None:
        faults.append(Fault("trainer.model_init", "none: the base stays from round to round", "one", "pass model"))
    if faults:
        raise ConfigError(faults)


def base_of_trainer(trainer: Any, targets: Sequence[str], *, seed: int = 0) -> Base:
    """Return the base that a Trainer's model stands on, its own adapter taken off.

    Args:
        trainer: its adapter must be as fresh as PEFT makes it: what it learned before would be lost.
        targets: of the federation's adapter; none: the layers of the Trainer's own.
        seed: the run's.

    Raises:
        ConfigError: if the model is of another kind, or its adapter has been trained.
    """
    model, modules = trainer.model, list(targets)
    if isinstance(model, PeftModel):
        layers = lora_layers(model)
        if any(bool(layer.lora_B[name].weight.detach().any()) for layer in layers.values() for name in layer.lora_B):
            hint = "merge it into the base at every site and at the server, or start the run from it"
            raise ConfigError(Fault("trainer.model", "an adapter as PEFT makes it", "one that has been trained", hint))
        modules = modules or sorted(layers)
        model = model.unload()
    if not modules:
        expected = "the layers that get an adapter, in the site's table adapter or by peft_config"
        raise ConfigError(Fault("adapter.targets", expected, "neither", 'for instance targets = ["q_proj", "v_proj"]'))
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config") or model.config.is_encoder_decoder:
        raise ConfigError(Fault("trainer.model", "a causal language model of transformers", type_of(model)))
    settings = ModelSettings(
        base=PYTHON, dtype=name_of(next(model.parameters()).dtype), device=str(trainer.args.device)
    )
    tokenizer, path = trainer.processing_class, str(model.name_or_path or PYTHON)
    adapter = AdapterSettings(rank=1, targets=tuple(modules))
    return base_of(settings, adapter, model, tokenizer, path=path, seed=seed)


def hf_training(
    trainer: Any, *, keep_optimizer: bool = False, steps_done: Callable[[], bool] = lambda: False
) -> tuple[OwnTrainer, Continued]:
    """Return a Trainer as a client's own trainer, and what it leaves from round to round.

    Args:
        trainer: whose `train` runs each round; its arguments are what they were, but for steps and seeds.
        keep_optimizer: whether the optimizer's state goes on in the next round, where the shapes are the same.
        steps_done: asked after each step; true ends the round's training early, for its result is of no use.
    """
    train, left = trainer.train, Continued()
    callback = between_rounds(left, trainer, keep_optimizer=keep_optimizer, steps_done=steps_done)

    def function(model: Any, data: TrainingData, order: TrainingOrder) -> None:
        args = {"max_steps": order.steps, "seed": order.seed, "data_seed": order.seed}
        with (
            hold_model(trainer, model),
            set_arguments(trainer.args, args),
            # Accelerate has a copy of the seed, by which each round would draw the same rows again.
            set_arguments(trainer.accelerator.dataloader_config, {"data_seed": order.seed}),
            first(trainer.callback_handler.callbacks, callback),
        ):
            left.output = train()
            left.steps, left.history = trainer.state.global_step, list(trainer.state.log_history)
        tensors = get_peft_model_state_dict(model)
        left.adapter = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        left.config = model.peft_config[ADAPTER]

    def losses(model: Any, steps: int) -> float | None:
        return mean_loss(trainer, model, steps)

    return OwnTrainer(function, losses=losses, preference=preference_of(trainer)), left


def give_model(trainer: Any, base: Base, left: Continued, result: str) -> bool:
    """Leave a Trainer with the adapter of a run: the result of all clients, or what it has trained last itself.

    Returns: whether it is the result of all clients.

    Args:
        trainer: whose `model` is afterwards a `peft.PeftModel` on the base, as after a training without others.
        base: its base.
        left: of its rounds.
        result: folder of the run's result at this site; empty, or no adapter of factors, where there is none.
    """
    of_all = bool(result) and (Path(result) / "adapter_config.json").is_file()
    with quiet(), warnings.catch_warnings(action="ignore", category=FutureWarning):
        if of_all:
            model: Any = PeftModel.from_pretrained(base.model, result, is_trainable=True)
            # The result names the base as the server's recipe does, and PEFT would look that name up on the hub.
            model.peft_config[ADAPTER].base_model_name_or_path = base.model.name_or_path
        elif left.config is not None:
            model = get_peft_model(base.model, left.config)
            set_peft_model_state_dict(model, dict(left.adapter))
        else:
            return of_all
    trainer.model = trainer.model_wrapped = model
    return of_all


def adapter_of(trainer: Any) -> Any:
    """Return PEFT's configuration of the adapter that a Trainer has; None if it has none."""
    return next(iter(trainer.model.peft_config.values()), None) if isinstance(trainer.model, PeftModel) else None


def give_back(trainer: Any, base: Base, config: Any) -> None:
    """Leave a Trainer with an adapter of its own, as fresh as the one that was taken off; None: without one."""
    if config is not None:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            trainer.model = trainer.model_wrapped = get_peft_model(base.model, config)


def site_of_trainer(trainer: Any, name: str, policy: Policy, base: Base, own: OwnTrainer) -> Site:
    """Return the site whose data and training are a Trainer's."""
    return Site(
        name,
        base,
        range(len(trainer.train_dataset)),  # type: ignore[arg-type]  # counted, and never read
        labels=(),
        threads=torch.get_num_threads(),
        scores=policy.scores,
        policy=policy,
        measures_speed=True,
        own=own,
    )


def preference_of(trainer: Any) -> float | None:
    """Return DPO's beta, where a Trainer compares answers."""
    names = {kind.__name__ for kind in type(trainer).__mro__}
    return float(trainer.args.beta) if "DPOTrainer" in names else None


def between_rounds(
    left: Continued, trainer: Any, *, keep_optimizer: bool, steps_done: Callable[[], bool]
) -> TrainerCallback:
    """Return what hears of a Trainer's steps before its other callbacks, and lets them count on from round to round."""

    class Between(TrainerCallback):  # type: ignore[misc]  # a base class of transformers, without types
        def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            state.global_step, state.max_steps = left.steps, left.steps + state.max_steps
            state.log_history = list(left.history)
            # Averages of the logs are over the steps since then.
            trainer._globalstep_last_logged = trainer._initial_global_step = left.steps
            if keep_optimizer and left.optimizer and left.shapes == shapes_of(options["optimizer"]):
                fresh = options["optimizer"].state_dict()
                options["optimizer"].load_state_dict({**fresh, "state": left.optimizer})

        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            if steps_done():
                control.should_training_stop = True

        def on_train_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            if keep_optimizer:
                optimizer = options["optimizer"]
                left.optimizer, left.shapes = optimizer.state_dict()["state"], shapes_of(optimizer)

    return Between()


def shapes_of(optimizer: Any) -> Sequence[torch.Size]:
    return [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]


def mean_loss(trainer: Any, model: Any, steps: int) -> float | None:
    """Return the Trainer's own loss, per row, on a few rows of its eval_dataset, or of what it trains on."""
    held_out: Any = trainer.eval_dataset
    held_out = next(iter(held_out.values()), None) if isinstance(held_out, dict) else held_out
    rows: Any = held_out if hasattr(held_out, "__len__") else trainer.train_dataset
    arguments = trainer.args
    seen = steps * arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    count = min(len(rows), num_loss_rows(seen))
    # The same rows in every round, and not the first ones: the order of a file may be that of its classes.
    places = next(batches(len(rows), size=count, key=0))
    some = rows.select(places) if hasattr(rows, "select") else Subset(rows, places)
    total, parts = 0.0, 0
    was_training = model.training
    # Workers that persist belong to a loader that the Trainer keeps, in place of its own of eval_dataset.
    passing = set_arguments(arguments, {"dataloader_persistent_workers": False})
    with hold_model(trainer, model), count_nothing(trainer), passing, torch.no_grad():
        model.eval()
        for inputs in trainer.get_eval_dataloader(some):
            with trainer.compute_loss_context_manager():
                total += float(trainer.compute_loss(model, trainer._prepare_inputs(inputs)).mean())
            parts += 1
    model.train(was_training)
    return total / parts if parts else None


@contextmanager
def hold_model(trainer: Any, model: Any) -> Iterator[None]:
    """Have a Trainer hold a model inside the block, and no optimizer of another one."""
    names = ("model", "model_wrapped", "optimizer", "lr_scheduler")
    before = {name: getattr(trainer, name) for name in names}
    for name in names:
        setattr(trainer, name, model if name.startswith("model") else None)
    try:
        yield
    finally:
        trainer.is_in_train = False
        for name, value in before.items():
            setattr(trainer, name, value)


@contextmanager
def set_arguments(arguments: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Give arguments of a Trainer other values inside the block."""
    before = {name: getattr(arguments, name) for name in values}
    for name, value in values.items():
        setattr(arguments, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(arguments, name, value)


@contextmanager
def first(callbacks: list[Any], callback: Any) -> Iterator[None]:
    """Put a callback before all others inside the block: a progress bar reads the steps that it sets."""
    callbacks.insert(0, callback)
    try:
        yield
    finally:
        callbacks.remove(callback)


@contextmanager
def count_nothing(trainer: Any) -> Iterator[None]:
    """Have a Trainer of trl count nothing inside the block for its next log."""
    metrics: Any = getattr(trainer, "_metrics", {})
    before = {mode: {key: list(numbers) for key, numbers in own.items()} for mode, own in metrics.items()}
    tokens = getattr(trainer, "_total_train_tokens", None)
    try:
        yield
    finally:
        for mode, numbers in before.items():
            metrics[mode].clear()
            metrics[mode].update(numbers)
        if tokens is not None:
            trainer._total_train_tokens = tokens
