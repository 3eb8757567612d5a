"""A recipe on this machine: loads data and base, binds clients to an engine, and scores global models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedtune.client.batched import LARGEST, Batched, Resident
from fedtune.client.named_trainer import own_trainer
from fedtune.client.own_trainer import OwnTrainer
from fedtune.client.perform import perform
from fedtune.client.personal_scoring import score_own
from fedtune.client.personal_state import client_folder
from fedtune.client.shared_work import SharedWork
from fedtune.client.site import load_site, simulated_site
from fedtune.client.worker_process import devices_of, payload
from fedtune.config import Recipe, render
from fedtune.config.checks import training_apart
from fedtune.config.personal_checks import check_scored
from fedtune.config.personal_requests import personal_request
from fedtune.config.plugins import import_function
from fedtune.config.preference_checks import rows_faults
from fedtune.config.recipe import (
    PYTHON,
    largest_rank,
    method_of,
    missing_object,
    possible_verbs,
    resources,
    sized_adapter,
    trainer_of,
)
from fedtune.config.trainer_checks import names_trainer
from fedtune.data.encode import Example, depends_on_date
from fedtune.data.federation import Federation, Shard, digest
from fedtune.data.given import given_rows
from fedtune.data.limits import longest
from fedtune.data.partition_file import write_division
from fedtune.errors import ConfigError, Fault
from fedtune.messages import Assignment, Blueprint, Client, ClientUpdate, ProbeSeeds, TrainLora
from fedtune.methods.method import GlobalModel, SeedModel
from fedtune.model import evaluate as scoring
from fedtune.model.base import Base, check_packing, load_tokenizer
from fedtune.model.base_paths import local_base
from fedtune.model.base_sizes import sized_base
from fedtune.model.device import choose_device, share_devices
from fedtune.model.libraries import threads
from fedtune.model.pruned_training import block_layout, with_pruned_model
from fedtune.model.repair import repair_of
from fedtune.model.samples import answers
from fedtune.model.seed_rebuild import with_rebuilt_weights
from fedtune.model.settings import same_everywhere
from fedtune.planning.planner import Planner
from fedtune.probing.replica import Replicas
from fedtune.pruning.structure import ModelStructure, cuts, slice_adapter
from fedtune.rounds import buffer
from fedtune.rounds.events import Watch
from fedtune.rounds.transport import Transport
from fedtune.runs.base_checks import check_kept, check_pruning, check_ranks
from fedtune.runs.context import ModelScores, RunContext
from fedtune.runs.fleet import Fleet, Lengths, fleet_of
from fedtune.runs.memory_guard import check_memory, plainly_fits
from fedtune.runs.samples import prompts, side_by_side
from fedtune.runs.start import check_start_base, first_round, start_adapter, start_state
from fedtune.simulation.fork_client import ForkServer
from fedtune.simulation.inprocess import InProcess
from fedtune.simulation.process_pool import ProcessPool
from fedtune.store import peft
from fedtune.store.pruning import read_moments, read_ranking


@dataclass(frozen=True)
class Experiment:
    """A recipe with its data and its base loaded."""

    recipe: Recipe
    federation: Federation
    base: Base
    personal: Path | None = None
    """Folder of the clients' own models; None where none of them can be stored."""
    trainers: Path | None = None
    """Folder in which the clients' own trainers may store something, likewise."""

    @property
    def fleet(self) -> Mapping[str, int]:
        """Training examples by client, sorted by name."""
        return {name: len(shard.train) for name, shard in sorted(self.federation.clients.items())}

    @property
    def blueprint(self) -> Blueprint:
        """Layers, shapes and settings of the base that methods and planners use."""
        return self._blueprint

    @cached_property
    def _blueprint(self) -> Blueprint:
        recipe, whole = self.recipe, method_of(self.recipe).task is ProbeSeeds
        blueprint = self.base.blueprint(max_rank=largest_rank(recipe), seed=recipe.seed, whole=whole)
        classes = len(self.federation.labels) if recipe.adapter.head == "lda" else 0
        own = pruning_of(recipe, self.base, self.federation.labels)
        return replace(blueprint, verbs=possible_verbs(recipe), classes=classes, **own)

    @property
    def planner(self) -> Planner:
        """Chooses each client's rank, pruning ratio, steps and batch."""
        return self.devices.planner(self.blueprint)

    @cached_property
    def devices(self) -> Fleet:
        """The devices of its clients, and what a round costs them."""
        shards = self.federation.clients
        return fleet_of(
            self.recipe,
            list(self.fleet),
            self.blueprint,
            parameters=self.base.num_parameters,
            tokens={
                name: lengths([len(text.input_ids) for text in texts_of(shard.train)])
                for name, shard in shards.items()
                if shard.train
            },
            absent=self.federation.sits_out,
        )

    @property
    def target(self) -> peft.Target:
        """The base as adapter_config.json describes it."""
        return peft_target(self.recipe, self.base)


def with_personal_folder(experiment: Experiment, run: Path) -> Experiment:
    """Return an experiment whose simulated clients store what is their own below a run's directory, if they do."""
    if names_trainer(experiment.recipe):
        experiment = replace(experiment, trainers=run / "trainers")
    return experiment if experiment.recipe.personal is None else replace(experiment, personal=run / "personal")


def peft_target(recipe: Recipe, base: Base) -> peft.Target:
    """Return a base as adapter_config.json describes it."""
    return peft.Target(
        base=base.path,
        revision=recipe.model.revision,
        task=base.task,
        fan_in_fan_out=base.transposed,
        saved_modules=base.saved_modules,
    )


def texts_of(examples: Sequence[Example]) -> Iterator[Example]:
    """Yield what of each example goes through the model: of one with two answers both."""
    for example in examples:
        yield example
        if example.rejected is not None:
            yield example.rejected


def lengths(tokens: Sequence[int]) -> Lengths:
    return Lengths(mean=sum(tokens) / len(tokens), longest=float(max(tokens)))


def prepare(
    recipe: Recipe,
    watch: Watch = lambda event: None,
    *,
    sizes_alone: bool = False,
    loaded: Experiment | None = None,
) -> Experiment:
    """Load data and base, and check what can only be checked against them; `watch` hears of each step.

    With `sizes_alone` no weights are loaded, and what is checked against them is not. With `loaded`, the data and the
    base are those of an experiment whose recipe has the same tables for them.

    Where a chat template writes the day, the recipe of the experiment names it: today's, if it names none yet.

    Raises:
        ConfigError: if a file, column, module or client that the recipe names does not exist, or a rank does not fit.
    """
    if recipe.asynchronous is not None and recipe.fleet is None:
        # Before anything is loaded; over a network updates come when they come.
        raise buffer.no_clock()
    check_scored(recipe)
    import_trainers(recipe)
    data = replace(recipe.data, date=recipe.data.date or date.today().isoformat())
    if loaded is not None:
        federation, base = loaded.federation, loaded.base
    else:
        federation, base = load_site(
            recipe.model,
            sized_adapter(recipe),
            data,
            seed=recipe.seed,
            root=recipe.root,
            objects=recipe.objects,
            watch=watch,
            load_base=sized_base if sizes_alone else None,
            check=partial(refuse_too_large, recipe) if recipe.engine.memory_check and not sizes_alone else no_check,
        )
    # Only where it matters: all other recipes, and their digests, are the same on every day.
    if recipe.model.task == "causal" and depends_on_date(data, base.tokenizer, form=federation.form):
        recipe = replace(recipe, data=data)
    # As it was loaded: what is recorded and given to other processes must not depend on their devices.
    recipe = replace(recipe, model=replace(recipe.model, dtype=base.dtype))
    names = list(federation.clients)
    few = f"({', '.join(names[:8])}{', ...' * (len(names) > 8)})"
    faults = [
        Fault(
            path="override.clients",
            expected=f"names or patterns of clients {few}",
            got=f"{list(override.clients)}, which match none",
        )
        for override in recipe.override
        # A client without examples is named rightly, in a recipe that may give it some with another seed.
        if not any(override.covers(name) for name in (*names, *federation.sits_out))
    ]
    if isinstance(trainers := recipe.objects.trainer, Mapping):
        others = sorted(str(name) for name in trainers if name not in (*names, *federation.sits_out))
        faults += [Fault("trainer", f"functions by names of clients {few}", repr(name)) for name in others]
    if faults:
        raise ConfigError(faults)
    if (recipe.rounds.keep == "best" or recipe.rounds.patience is not None) and not federation.test:
        expected = "test data, or rows that clients hold out, to find the best round by"
        hint = "name them in data.test, or set data.held_out"
        raise ConfigError(Fault("rounds", expected, "neither", hint))
    if mismatch := rows_faults(recipe, compared=federation.compared):
        raise ConfigError(mismatch)
    if recipe.client.packing and not sizes_alone:
        check_packing(base)
    check_ranks(recipe, base.modules)
    experiment = Experiment(recipe=recipe, federation=federation, base=base)
    check_pruning(experiment.blueprint)
    check_kept(recipe, experiment.blueprint)
    if not sizes_alone:
        check_start_base(start_adapter(recipe), base.digest)
    start_state(recipe, experiment.blueprint)  # a base that the method refuses is refused before anything is written
    first_round(recipe, experiment.blueprint, federation.labels)
    experiment.devices.planner(experiment.blueprint)
    return experiment


def import_trainers(recipe: Recipe) -> None:
    """Import every function that trains clients in place of fedtune, before data and base are loaded.

    Raises:
        ConfigError: if Python cannot import one, or it was a Python object that is not given again.
    """
    if recipe.client.trainer == PYTHON and recipe.objects.trainer is None:
        raise ConfigError(missing_object("trainer"))
    for path, name in [("client", recipe.client.trainer)] + [
        (f"override.{place}", override.training.get("trainer")) for place, override in enumerate(recipe.override)
    ]:
        if name is not None and name != PYTHON:
            import_function(name, path=f"{path}.trainer")


def no_check(federation: Federation, sizes: Callable[[], Base]) -> None:
    """Refuse nothing."""


def refuse_too_large(recipe: Recipe, federation: Federation, sizes: Callable[[], Base]) -> None:
    """Refuse a run that needs more memory than this machine has free, before its base is loaded.

    Only on the CPU, where the memory is counted, and of bases in a folder: the others' sizes are not known before.
    """
    folder = local_base(recipe.model, recipe.root) if recipe.model.base != "embedded" else None
    if folder is None or not folder.is_dir() or choose_device(recipe.model.device).type != "cpu":
        return
    file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if plainly_fits(file_bytes, longest(federation), recipe):
        return
    alone = Experiment(replace(recipe, fleet=None, device=()), federation, sizes())
    check_memory(alone.devices, alone.fleet)


def sites_experiment(recipe: Recipe) -> Experiment:
    """Return a recipe for sites with the sizes of its base, and as many clients as its first round waits for.

    Their data are not here: each is taken to have one example, as long as `data.max_tokens` lets it be.

    Raises:
        ConfigError: if the base does not exist, or a module that the recipe names.
    """
    tokenizer = load_tokenizer(recipe.model, recipe.root, weights=False)
    labels = tuple(recipe.data.labels or ("0", "1"))
    classifies = recipe.model.task == "classification"
    model = same_everywhere(recipe.model)
    base = sized_base(
        model,
        sized_adapter(recipe),
        tokenizer=tokenizer,
        root=recipe.root,
        seed=recipe.seed,
        labels=labels if classifies else (),
    )
    ids = np.zeros(min(recipe.data.max_tokens, base.positions), np.int64)
    example = Example(ids, 0 if classifies else ids, 0, "", "", 0)
    cohort = recipe.rounds.cohort
    number = max(recipe.rounds.min_clients, cohort if isinstance(cohort, int) else 0)
    clients = {f"site-{place}": Shard([example], []) for place in range(1, number + 1)}
    federation = Federation(clients, test=(), labels=labels if classifies else (), notes=())
    return Experiment(replace(recipe, model=replace(model, dtype=base.dtype)), federation, base)


def pruning_of(recipe: Recipe, base: Base, labels: Sequence[str]) -> Mapping[str, Any]:
    """Return the fields of a blueprint for pruning and planning.

    Raises:
        ConfigError: if the recipe prunes a base that cannot be pruned, or its ranking is of another base.
    """
    settings = recipe.pruning
    try:
        layout = block_layout(base)
    except ConfigError:
        if settings is not None:
            raise
        return {}  # without [pruning] the layout is only used for costs
    # Without weights there is no digest to hold the ranking's against.
    if settings is None or settings.ranking is None or not base.digest:
        return {"anatomy": layout, "pruning": settings, "ranking": {}}
    return {
        "anatomy": layout,
        "pruning": settings,
        "ranking": read_ranking(settings.ranking, recipe.root, layout, base.digest),
        "moments": read_moments(settings.ranking, recipe.root, settings, layout, base.digest),
    }


def score(
    experiment: Experiment,
    tuned: GlobalModel,
    *,
    test: bool,
    clients: bool,
    round: int = 0,
    structure: ModelStructure | None = None,
) -> ModelScores:
    """Score a global model on the test data (also pruned to `structure`), on clients' held-out rows, or on both."""
    recipe, federation = experiment.recipe, experiment.federation
    settings = recipe.evaluate
    preference = experiment.recipe.client.preference
    measure = partial(
        scoring.evaluate, experiment.base, tuned.adapter, tuned.saved, batch=settings.batch, preference=preference
    )
    shards = sorted(federation.clients.items()) if clients and settings.clients else []
    with threads(experiment.recipe.model.threads), with_seeds(experiment.base, tuned.seeds):
        on_test = measure(
            {"test": federation.test[: settings.examples]} if test else {},
            generate=settings.generate,
            new_tokens=settings.new_tokens,
        )
        held_out = measure({name: shard.held_out[: settings.client_examples] for name, shard in shards})
        small = score_pruned(experiment, tuned, structure) if test and structure else None
        own = {name: score_client(experiment, name, tuned, round) for name in held_out if has_own_model(recipe, round)}
    return ModelScores(test=on_test.get("test"), held_out=held_out, personal=own, deployed=small)


def has_own_model(recipe: Recipe, round: int) -> bool:
    """Return whether clients have models of their own that can be scored after a round: before round 1 none has."""
    return recipe.personal is not None and round > 0


def score_client(experiment: Experiment, name: str, tuned: GlobalModel, round: int) -> Mapping[str, float]:
    """Return what one client's own model scores on the rows that the client holds out."""
    recipe, shard = experiment.recipe, experiment.federation.clients[name]
    request = personal_request(recipe, name, len(shard.train), round)
    assert request is not None  # for there are such models
    return score_own(
        experiment.base,
        shard.train,
        shard.held_out[: recipe.evaluate.client_examples],
        request,
        client=name,
        round=round,
        adapter=tuned.adapter,
        saved=tuned.saved,
        folder=client_folder(experiment.personal, name) if experiment.personal else None,
        batch=recipe.evaluate.batch,
    )


def score_pruned(experiment: Experiment, tuned: GlobalModel, structure: ModelStructure) -> Mapping[str, float] | None:
    """Score a global model on the test data, pruned to a structure; None without test data."""
    base, settings, body = experiment.base, experiment.recipe.evaluate, experiment.blueprint.anatomy
    assert body is not None  # a base without one is not pruned
    adapter = slice_adapter(tuned.at(structure), cuts(structure, body))
    test = experiment.federation.test[: settings.examples]
    pruning = experiment.recipe.pruning
    repair = repair_of(base.model, tuned.moments, pruning, body) if pruning else None
    with with_pruned_model(base, structure, body, repair) as small:
        return scoring.evaluate(small, adapter, tuned.saved, {"test": test}, batch=settings.batch).get("test")


def with_seeds(base: Base, seeds: SeedModel | None) -> AbstractContextManager[None]:
    """Give the base the weights rebuilt from seeds while the block runs."""
    return with_rebuilt_weights(base, seeds.ledger, seeds.trainable, seeds.head) if seeds else nullcontext()


def run_context(experiment: Experiment) -> RunContext:
    """Return what a run of this experiment is given."""
    recipe, base = experiment.recipe, experiment.base
    start = start_adapter(recipe)
    return RunContext(
        recipe=recipe,
        blueprint=experiment.blueprint,
        planner=experiment.planner,
        clock=experiment.devices.clock(),
        expected=experiment.devices.planned_costs,
        prober=experiment.devices.prober(),
        devices=experiment.devices.summary(),
        base={
            "name": base.name,
            "digest": base.digest,
            "parameters": base.num_parameters,
        },
        target=experiment.target,
        fleet=experiment.fleet,
        machine={"device": str(base.device), "threads": recipe.model.threads, "engine": recipe.engine.name},
        data=digest(experiment.federation),
        partition=write_division(division) if (division := experiment.federation.division) else "",
        start=start.digest if start else "",
        form=experiment.federation.form,
        labels=experiment.federation.labels,
        notes=[
            *experiment.federation.notes,
            *base.notes,
            *([start.remark] if start and start.remark else []),
            *apart_notes(recipe, base.device.type, saved=base.saved_modules or base.saved),
        ],
        score=partial(score, experiment),
        sample=partial(sample, experiment),
    )


@contextmanager
def transport(experiment: Experiment, fork_server: ForkServer | None = None) -> Iterator[Transport]:
    """Give the engine that the recipe names, with every client bound to its examples; it is closed at the end.

    A fork server that was started earlier, while the experiment was prepared, saves the engine `processes` seconds.

    Raises:
        ConfigError: if the engine cannot run on this machine.
        ExtraError: if it needs a package that is not installed.
        RoundError: if it does not start.
    """
    match experiment.recipe.engine.name:
        case "processes":
            with nullcontext(fork_server) if fork_server else ForkServer() as started:
                yield pool(experiment, started)
        case "ray":
            with ray(experiment) as engine:
                yield engine
        case _:
            with shared_work(experiment) as shared:
                yield in_process(experiment, shared)


def clients(experiment: Experiment) -> Sequence[Client]:
    return [Client(name=name, num_examples=count) for name, count in experiment.fleet.items()]


def in_process(experiment: Experiment, shared: SharedWork | None = None) -> InProcess:
    """Return the engine that runs clients over this process's base: one after the other, or several at once."""
    recipe, shards = experiment.recipe, experiment.federation.clients
    replicas = Replicas()
    own_trainers = {name: own_trainer_of(experiment, name) for name in shards}

    def work(name: str, assignment: Assignment) -> ClientUpdate:
        shard, threads = shards[name], resources(recipe, name).threads
        own = partial(
            perform,
            experiment.base,
            shard.train,
            assignment,
            threads=threads,
            replicas=replicas,
            held_out=shard.held_out,
            personal=client_folder(experiment.personal, name) if experiment.personal else None,
            own=own_trainers[name],
        )
        return shared.perform(assignment, lambda shares: own(shares=shares), threads=threads) if shared else own()

    works = {name: partial(work, name) for name in shards}
    at_once = (
        1
        if shared or any(own_trainers.values())
        else batched_clients(recipe.engine.batch_clients, experiment.base.device.type)
    )
    if at_once == 1:
        return InProcess(fleet=clients(experiment), work=works)
    residents = {
        name: Resident(shard.train, shard.held_out, resources(recipe, name).threads) for name, shard in shards.items()
    }
    together = Batched(experiment.base, residents, most=at_once)
    return InProcess(fleet=clients(experiment), work=works, together=together, at_once=at_once)


def own_trainer_of(experiment: Experiment, client: str) -> OwnTrainer | None:
    """Return what trains a client's adapter in place of fedtune; None where fedtune does."""
    recipe, folder = experiment.recipe, experiment.trainers
    given = recipe.objects.data
    return own_trainer(
        trainer_of(recipe, client),
        rows=None if given is None else given_rows(given).by_client.get(client),
        folder=client_folder(folder, client).path if folder else None,
        quotes=True,
    )


def batched_clients(setting: Literal["auto"] | int, device: str) -> int:
    """Return how many clients train at the same time, at most: by itself only on a GPU, which few rows leave idle."""
    # On a CPU it gave 0.98 to 1.17 of the time of one after the other.
    return setting if isinstance(setting, int) else LARGEST if device == "cuda" else 1


def apart_notes(recipe: Recipe, device: str, *, saved: Sequence[str]) -> Sequence[str]:
    """Return a note where this engine would train several clients in one forward pass, and the recipe prevents it."""
    engine, model = recipe.engine, recipe.model
    if engine.name != "inprocess" or model.processes > 1 or batched_clients(engine.batch_clients, device) == 1:
        return []
    reasons = [f"{path} ({got})" for path, got in training_apart(recipe).items()]
    if saved:
        reasons.append(f"{', '.join(saved)}, trained in full")
    if not reasons or method_of(recipe).task is not TrainLora:
        return []
    return [f"engine.batch_clients: clients train one after the other, because of {'; '.join(reasons)}"]


def shared_work(experiment: Experiment) -> AbstractContextManager[SharedWork | None]:
    """Return the processes beside this one that each client's steps are divided among; None where there are none."""
    model = experiment.recipe.model
    if model.processes == 1:
        return nullcontext()
    return SharedWork(*payload_of(experiment), share_devices(model), base=experiment.base.digest)


def payload_of(experiment: Experiment) -> tuple[Mapping[str, Any], Mapping[str, bytes]]:
    """Return what other processes load to do the work of clients."""
    recipe, shards = experiment.recipe, experiment.federation.clients
    return payload(
        recipe.model,
        sized_adapter(recipe),
        {name: shard.train for name, shard in shards.items()},
        root=recipe.root,
        seed=recipe.seed,
        labels=experiment.federation.labels,
        base=experiment.base.digest,
        held_out={name: shard.held_out for name, shard in shards.items()},
        personal=experiment.personal,
        trainers={name: given for name in shards if isinstance(given := trainer_of(recipe, name), str)},
        trainer_folder=experiment.trainers,
    )


def pool(experiment: Experiment, fork_server: ForkServer) -> ProcessPool:
    """Return the engine of worker processes, and have their fork server load base and data."""
    recipe, shards = experiment.recipe, experiment.federation.clients
    fork_server.load(*payload_of(experiment))
    return ProcessPool(
        fork_server,
        clients(experiment),
        {name: resources(recipe, name) for name in shards},
        workers=workers(experiment),
        timeout_s=recipe.engine.timeout_s,
    )


def ray(experiment: Experiment) -> AbstractContextManager[Transport]:
    """Return Flower's simulation engine, whose workers load data and base from the recipe, once each."""
    from fedtune.flower.client_app import client_app
    from fedtune.flower.engine import Share, ray_transport

    recipe, number = experiment.recipe, min(workers(experiment), len(experiment.fleet))
    gpus = 0.0 if experiment.base.device.type == "cpu" else min(1.0, len(devices_of(experiment.base.device)) / number)
    folders = (str(experiment.personal or ""), str(experiment.trainers or ""))
    return ray_transport(
        client_app(partial(simulated_site, render(recipe), personal=folders[0], trainers=folders[1])),
        clients=len(experiment.fleet),
        workers=number,
        share=Share(threads=recipe.model.threads, gpus=gpus),
    )


def workers(experiment: Experiment) -> int:
    """Return the number of worker processes: the recipe's, or one per GPU, or as many as the cores have threads for."""
    recipe = experiment.recipe
    if recipe.engine.workers is not None:
        return recipe.engine.workers
    if experiment.base.device.type != "cpu":
        return len(devices_of(experiment.base.device))
    return max(1, len(os.sched_getaffinity(0)) // recipe.model.threads)


def sample(experiment: Experiment, tuned: GlobalModel) -> Mapping[str, Any]:
    """Return what summary.json says of samples: the recipe's prompts, answered by the base and by the global model."""
    recipe, base = experiment.recipe, experiment.base
    asked = prompts(recipe, base.tokenizer, experiment.federation.form)
    answered = partial(answers, base, prompts=asked, new_tokens=recipe.evaluate.new_tokens)
    with threads(recipe.model.threads):
        before = answered({}, {}) if asked else []
        with with_seeds(base, tuned.seeds):
            after = answered(tuned.adapter, tuned.saved) if asked else []
    return side_by_side(recipe.evaluate, asked, before, after)
