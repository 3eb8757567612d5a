"""A Trainer of transformers or trl as one site of a federation: its own `train` takes part until the run is over."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedtune.config import Recipe
from fedtune.config.site import SiteSettings, bind_site
from fedtune.deployment.join import join, suits_trainer
from fedtune.errors import ConfigError, Fault, FedtuneError
from fedtune.link.audit_log import RecordEvent
from fedtune.link.client.client import Client
from fedtune.link.client.local_trainer import LocalTrainer
from fedtune.probing.steps import OnStep

if TYPE_CHECKING:
    from fedtune.client.site import Site

AnyTrainer = TypeVar("AnyTrainer")

TEXTS: Mapping[str, str] = {
    "hello": "connected to {server}, run {run}",
    "trained": "round {round}: {work}: {verdict}",
    "declined": "round {round}: this site declines: {reason}",
    "failed": "round {round}: {reason}",
    "unreached": "no connection to {server}: {reason}; trying again",
    "reached": "connected again",
    "result": "the model of round {round} is in {path}",
    "finished": "the run is complete",
    "warning": "warning: {text}",
}
"""What standard error shows of the events; all of them are in the site's audit log."""

NO_RESULT = (
    "expected the run's result as an adapter; got none; the Trainer's model has what it trained last itself, without "
    "what other sites learned"
)
"""What is said of a Trainer whose site gets no result, for instance since its policy declines it."""


def patch(
    trainer: AnyTrainer,
    site: str | Path | Mapping[str, Any],
    *,
    server: str | None = None,
    keep_optimizer: bool = False,
    agree: Callable[[str], bool] = lambda recipe: False,
    record: RecordEvent | None = None,
) -> AnyTrainer:
    """Have a Trainer's `train` take part in a federation, and return the Trainer.

    Each round it runs its own `train` with the round's rank, steps and start; batch size, learning rate, optimizer,
    callbacks, logs and checkpoints are its own. Afterwards its `model` is a `peft.PeftModel` with the run's result.
    Under torchrun or accelerate every process calls this, and the first one talks to the server.

    Args:
        trainer: a `transformers.Trainer`, `trl.SFTTrainer` or `trl.DPOTrainer`. An adapter that it has is made anew in
            each round, with the round's rank.
        site: the site's file, or its tables: name, link and policy. Model and data are the Trainer's own; so are the
            layers of the adapter, if it has one, else the table adapter names them.
        server: HOST:PORT instead of the file's.
        keep_optimizer: let the optimizer's state go on in the next round, wherever the adapter has the same shapes.
        agree: asked with the recipe before the site takes part in a run, if its policy has `ask`.
        record: receives the link's events; without it they are written to standard error.

    Raises:
        ConfigError: if the Trainer or the site's file cannot be used; of the run, when `train` is called.
    """
    from fedtune.client.hf_trainer import check_trainer

    check_trainer(trainer)
    tables = site if isinstance(site, Mapping) else Path(site)
    settings = bind_site(tables, loaded=True)
    federated = partial(train_in_rounds, trainer, settings, server, keep_optimizer, agree, record or write_event)
    vars(trainer)["train"] = federated  # of this object alone; its class stays as it is
    return trainer


def train_in_rounds(
    trainer: Any,
    settings: SiteSettings,
    server: str | None,
    keep_optimizer: bool,
    agree: Callable[[str], bool],
    record: RecordEvent,
    *args: Any,
    **options: Any,
) -> Any:
    """Take part in a federation's run with a Trainer, and return what its `train` returned in the last round.

    Raises:
        ConfigError: if the run asks for what no Trainer can do, or something must be changed to connect.
    """
    from fedtune.client.hf_trainer import (
        adapter_of,
        base_of_trainer,
        give_back,
        give_model,
        hf_training,
        site_of_trainer,
    )
    from fedtune.client.ranks import ranks_here

    if args or any(value is not None for value in options.values()):
        hint = "call train() alone: a run that was cut off is resumed by the server"
        raise ConfigError(Fault("trainer.train", "no argument in a federation", ", ".join(options) or "one", hint))
    ranks = ranks_here()
    targets, given = settings.adapter.targets if settings.adapter else (), adapter_of(trainer)
    base = base_of_trainer(trainer, targets, seed=settings.seed)
    trainer.model = trainer.model_wrapped = base.model
    patched = vars(trainer).pop("train")
    try:
        own, left = hf_training(trainer, keep_optimizer=keep_optimizer)
        own = replace(own, announce=ranks.announce if ranks.rank == 0 else own.announce)
        site = site_of_trainer(trainer, settings.name, settings.policy, base, own)
        if ranks.rank:
            result = ranks.follow(site.perform)
        else:
            result = ""
            try:
                result = take_part(site, settings, server, agree, record, own.preference, alone=ranks.size == 1)
            finally:
                ranks.end(result)
        if not give_model(trainer, base, left, result) and ranks.rank == 0:
            record("warning", text=NO_RESULT)
    except BaseException:
        give_back(trainer, base, given)  # `train` may be called again, once the cause is gone
        raise
    finally:
        vars(trainer)["train"] = patched
    return left.output


@dataclass
class Outcome:
    """What the thread of the link leaves for the one that trains."""

    result: str = ""
    """Folder of the run's result at this site; empty without one."""
    error: BaseException | None = None
    stop: Callable[[], object] = field(default=lambda: None)


def take_part(
    site: Site,
    settings: SiteSettings,
    server: str | None,
    agree: Callable[[str], bool],
    record: RecordEvent,
    preference: float | None = None,
    *,
    alone: bool = True,
) -> str:
    """Connect in a thread, do the work in this one until the run is over, and return the folder of its result."""

    def load(on_step: OnStep) -> Site:
        return replace(site, on_step=on_step)

    outcome, local = Outcome(), LocalTrainer(load, interrupts=alone)

    def hear(kind: str, **fields: int | str) -> None:
        if kind == "result":
            outcome.result = str(fields["path"])
        record(kind, **fields)

    def begin(client: Client) -> None:
        outcome.stop = client.stop

    def run() -> None:
        try:
            join(
                settings,
                server=server,
                record=hear,
                agree=agree,
                suits=partial(suits_objective, preference),
                trainer=local,
                started=begin,
            )
        except FedtuneError as error:
            outcome.error = error
        except BaseException as error:  # the thread that trains would take the run for complete
            outcome.error = error
            raise
        finally:
            local.close()

    thread = threading.Thread(target=run, name="fedtune link", daemon=True)
    thread.start()
    try:
        local.work()
    finally:
        outcome.stop()
        thread.join()
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


def suits_objective(preference: float | None, recipe: Recipe, client: str) -> None:
    """Refuse a run that asks for another objective than a Trainer has; see `suits_trainer`.

    Raises:
        ConfigError: naming all that differs.
    """
    suits_trainer(recipe, client)
    wanted = recipe.client.dpo_beta if recipe.client.objective == "dpo" else None
    if wanted != preference:
        expected, got = (
            "one that compares no answers" if beta is None else f"'dpo' with beta {beta:g}"
            for beta in (preference, wanted)
        )
        hint = "patch a DPOTrainer with that beta for 'dpo', and an SFTTrainer or a Trainer otherwise"
        raise ConfigError(Fault("client.objective", f"{expected}, as this site's Trainer has it", got, hint))


def write_event(kind: str, **fields: int | str) -> None:
    """Write an event of the link to standard error, if people need to see it."""
    if (text := TEXTS.get(kind)) is not None:
        sys.stderr.write(f"fedtune: {' '.join(text.format_map(fields).split())}\n")
        sys.stderr.flush()
