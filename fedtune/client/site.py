"""One client: its base and examples, loaded once per process, its profile, and its answers to assignments."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from fedtune.client.data_checks import check_examples
from fedtune.client.named_trainer import own_trainer
from fedtune.client.own_trainer import OwnTrainer
from fedtune.client.perform import perform
from fedtune.client.personal_state import StateFolder, client_folder
from fedtune.client.scoring import score
from fedtune.client.shared_work import SharedWork
from fedtune.client.speed import seconds_per_tflop
from fedtune.client.worker_process import payload
from fedtune.config import Recipe, bind
from fedtune.config.plugins import plugin_rows
from fedtune.config.recipe import PYTHON, Objects, missing_object, resources, sized_adapter, trainer_of
from fedtune.config.site import bind_site, own_shard, targeted_layers
from fedtune.data.encode import Example, depends_on_date
from fedtune.data.federation import Federation, federate, with_class_order
from fedtune.data.limits import cut_to_positions
from fedtune.data.settings import DataSettings
from fedtune.data.templates import DAY
from fedtune.errors import ClientError, ConfigError, Fault
from fedtune.link.client.order_limits import EMBEDDINGS, limit_violations
from fedtune.link.client.training_server import without_losses
from fedtune.link.settings import Policy, ScorePolicy
from fedtune.messages import Assignment, ClientScores, ClientUpdate, ScoreRequest
from fedtune.methods import METHODS
from fedtune.model import embedded, libraries
from fedtune.model.base import Base, base_from_object, load, load_tokenizer
from fedtune.model.base_config import class_order
from fedtune.model.base_sizes import sized_base
from fedtune.model.classes import match_classes, named_rows, shorten
from fedtune.model.device import memory_bytes, share_devices
from fedtune.model.pruned_training import block_layout
from fedtune.model.settings import AdapterSettings, ModelSettings, same_everywhere
from fedtune.model.token_layers import token_layers
from fedtune.probing.replica import Replicas
from fedtune.probing.steps import OnStep, no_steps
from fedtune.pruning.structure import BlockLayout
from fedtune.rounds.events import Phase, Watch
from fedtune.wire.profile import ClientProfile, Device, ModelSpec

OPEN = Policy(min_examples=1, allow_embeddings=True)
"""Of a client whose data are the coordinator's own, as in a simulation."""


@dataclass(frozen=True)
class Site:
    """A client with everything that it needs to answer, the same for every network."""

    client: str
    base: Base
    examples: Sequence[Example]
    """For training."""
    labels: Sequence[str]
    threads: int
    replicas: Replicas = field(default_factory=Replicas)
    """The accumulators that this process remembers between rounds."""
    held_out: Sequence[Example] = ()
    """Never trained on; the client's losses before and after training, and the scores of global models, are of them."""
    scores: ScorePolicy = "send"
    """What the site's policy says of scores, and of the losses before and after training."""
    policy: Policy = OPEN
    """What the site allows of the work that an order asks for; the rest of it is for the link."""
    date: str = ""
    """The day that the chat template has written into the examples; empty where they depend on none."""
    reload: Callable[[Sequence[str], str], Site] | None = None
    """Loads the same client with other class names or another day; None where all clients have the same anyhow."""
    on_step: OnStep = no_steps
    """Hears of each step of a training."""
    measures_speed: bool = False
    """Whether it measures how fast it computes when it checks in, for planners that ask; simulated devices do not."""
    personal: StateFolder | None = None
    """Of its own models in the run that it works for; None where none can be stored."""
    shared: SharedWork | None = None
    """The processes beside this one that its training is divided among."""
    own: OwnTrainer | None = None
    """Trains its adapter in place of fedtune."""

    @property
    def max_bytes(self) -> int | None:
        """The main memory that the process may take in all; None where the site's policy has no limit."""
        limit = self.policy.max_memory_gib
        return None if limit is None else int(limit * 2**30)

    def with_labels(self, labels: Sequence[str], date: str = "") -> Site:
        """Return the client with the class names, and the day, that all clients of a run use; empty: its own."""
        same_labels = not labels or tuple(labels) == tuple(self.labels)
        if self.reload is None or (same_labels and (not self.date or date in ("", self.date))):
            return self
        return self.reload(labels, date)

    def profile(self) -> ClientProfile:
        """Return what the client tells a server about itself."""
        base = self.base
        return ClientProfile(
            client=self.client,
            num_examples=len(self.examples),
            foundation=ModelSpec(
                base=base.digest,
                modules=base.modules,
                saved=base.saved_tensors(),
                saved_modules=tuple(base.saved_modules),
                labels=tuple(self.labels),
                transposed=base.transposed,
                parameters=base.num_parameters,
                manifest=manifest(base),
                anatomy=blocks(base),
            ),
            methods=tuple(METHODS),
            device=self._device(),
            held_out=0 if self.scores == "refuse" else len(self.held_out),
        )

    def _device(self) -> Device:
        own = device(self.base)
        if not self.measures_speed:
            return own
        with libraries.threads(self.threads):
            return replace(own, s_per_tflop=seconds_per_tflop(self.base.device))

    def perform(self, assignment: Assignment) -> ClientUpdate:
        """Return the client's update for an assignment.

        Raises:
            ClientError: if it is for another client, or cannot be done.
        """
        if assignment.plan.client != self.client:
            raise ClientError(
                f"{self.client}: expected an assignment of its own; got one for {assignment.plan.client!r}; "
                "check the names that the clients are registered under"
            )
        site = self.with_labels(assignment.labels, assignment.date)
        # Over the link this was checked before the download; over Flower nothing else does.
        for _, reason in limit_violations(site.policy, assignment, len(site.examples)):
            raise ClientError(f"{self.client}: {reason}")
        work = partial(
            perform,
            site.base,
            site.examples,
            assignment,
            threads=site.threads,
            replicas=site.replicas,
            held_out=site.held_out,
            on_step=self.on_step,
            max_bytes=site.max_bytes,
            personal=self.personal,
            own=self.own,
        )
        shared = site.shared
        update = shared.perform(assignment, lambda s: work(shares=s), threads=site.threads) if shared else work()
        # A site that keeps its losses has a log to write them to: there the caller takes them out.
        return without_losses(update) if self.scores == "refuse" else update

    def score(self, request: ScoreRequest) -> ClientScores:
        """Return what a global model scores on the rows that the client holds out.

        Raises:
            ClientError: if the request is for another client, the site's policy forbids it, or it cannot be done.
        """
        if request.client != self.client:
            raise ClientError(f"{self.client}: expected a request of its own; got one for {request.client!r}")
        if self.scores == "refuse":
            raise ClientError(f"{self.client}: expected no request for scores; this site's policy.scores refuses them")
        site = self.with_labels(request.labels, request.date)
        return score(
            site.base, site.held_out, request, threads=site.threads, examples=site.examples, folder=self.personal
        )

    def in_run(self, folder: Path) -> Site:
        """Return the client with the folder of a run at this site, where it stores models of its own."""
        own = replace(self.own, folder=folder / "trainer") if self.own else None
        return replace(self, personal=StateFolder(folder / "personal"), own=own)


# Cached in this module and not in an app object: Ray pickles the app with every message, and a base inside of it would
# be loaded as often.
# Two of them: with class names and day of its own, by which a client says hello, and with those of the federation.
@lru_cache(maxsize=2)
def from_file(path: str, labels: tuple[str, ...] = (), date: str = "") -> Site:
    """Return the site that a local file describes.

    Args:
        path: of the file.
        labels: class names to use, by class; none: those of its own file or data.
        date: the day that a chat template writes; empty: that of its own file.

    Raises:
        ConfigError: if the file, or anything that it names, is wrong; or its data have a class that is none of these.
    """
    settings = bind_site(Path(path))
    layers = targeted_layers(settings, source=path)
    data = replace(settings.data, labels=labels or settings.data.labels, date=date or settings.data.date)
    # The names of classes say what a site has: without a list that was agreed on they would be taken from its data.
    if settings.model.task == "classification" and settings.policy.labels == "keep" and not data.labels:
        expected = "the classes that the federation has agreed on, where policy.labels is 'keep'"
        raise ConfigError(Fault("data.labels", expected, "none", "copy them from the recipe"), source=path)
    federation, base = load_site(
        same_everywhere(settings.model),
        layers.settings,
        data,
        seed=settings.seed,
        root=settings.root,
        # Another day changes the texts alone: a second base would take as much memory again.
        objects=Objects(model=from_file(path).base) if date else None,
        # A site may lack a class, also the only other one: the federation knows it.
        least_classes=1,
    )
    if not settings.policy.allow_embeddings and (rows := token_layers(base)):
        hint = f"{EMBEDDINGS}; leave them out of table adapter, or set it to true"
        expected = "true, where a layer with a row for each token is trained"
        raise ConfigError(Fault("policy.allow_embeddings", expected, f"false, and {rows[0]}", hint), source=path)
    shard = own_shard(settings, federation, source=path)
    shared = None
    if settings.model.processes > 1:
        spec = payload(
            same_everywhere(settings.model),
            layers.settings,
            {settings.name: shard.train},
            held_out={settings.name: shard.held_out},
            root=settings.root,
            seed=settings.seed,
            labels=federation.labels,
        )
        shared = SharedWork(*spec, share_devices(settings.model), base=base.digest)
    return Site(
        settings.name,
        base,
        shard.train,
        federation.labels,
        settings.model.threads,
        held_out=shard.held_out,
        scores=settings.policy.scores,
        policy=settings.policy,
        measures_speed=True,
        shared=shared,
        date=written_day(settings.model, data, federation, base),
        reload=lambda names, day: from_file(path, tuple(names), day),
        own=own_trainer(settings.client.trainer) if settings.client else None,
    )


def simulated_site(
    recipe: str,
    node_config: Mapping[str, Any],
    run_config: Mapping[str, Any],
    personal: str = "",
    trainers: str = "",
) -> Site:
    """Return the client of a recipe, in TOML or as a path, for a node of Flower's simulation engine.

    `personal` is the folder of the clients' own models, and `trainers` that of what their own trainers store; empty
    where none can be stored.

    Raises:
        ConfigError: if the recipe is wrong, or has fewer clients than there are nodes.
    """
    site = simulated_client(recipe, int(node_config["partition-id"]), "")
    if site.own is not None and trainers:
        site = replace(site, own=replace(site.own, folder=client_folder(Path(trainers), site.client).path))
    return replace(site, personal=client_folder(Path(personal), site.client)) if personal else site


def simulated_client(recipe: str, place: int, date: str) -> Site:
    """Return the client at a place in the order of the names, with the day that its chat template writes."""
    bound, federation, base, replicas = cached_recipe(recipe, date)
    # By position, not node id: ids are new in every run, and a client would get other data when it resumes.
    names = sorted(federation.clients)
    if place >= len(names):
        raise ConfigError(
            Fault("num-supernodes", f"{len(names)}, the clients of the recipe", f"at least {place + 1}", "lower it")
        )
    name = names[place]
    shard, threads = federation.clients[name], resources(bound, name).threads
    return Site(
        name,
        base,
        shard.train,
        federation.labels,
        threads,
        replicas,
        shard.held_out,
        date=written_day(bound.model, bound.data, federation, base),
        reload=lambda labels, day: simulated_client(recipe, place, day),
        own=own_trainer(trainer_of(bound, name), quotes=True),
    )


@lru_cache(maxsize=2)
def cached_recipe(recipe: str, date: str) -> tuple[Recipe, Federation, Base, Replicas]:
    """Return a recipe with its data, its base and the memory of its clients, loaded once per process and day."""
    bound = bind(recipe)
    bound = replace(bound, data=replace(bound.data, date=date or bound.data.date))
    model, objects = same_everywhere(bound.model), Objects(model=cached_recipe(recipe, "")[2]) if date else None
    federation, base = load_site(
        model, sized_adapter(bound), bound.data, seed=bound.seed, root=bound.root, objects=objects
    )
    return bound, federation, base, Replicas()


def written_day(model: ModelSettings, data: DataSettings, federation: Federation, base: Base) -> str:
    """Return the day that the chat template has written into a federation's examples; empty if it has written none."""
    dated = model.task == "causal" and depends_on_date(data, base.tokenizer, form=federation.form)
    return (data.date or DAY) if dated else ""


def load_site(
    model: ModelSettings,
    adapter: AdapterSettings,
    data: DataSettings,
    *,
    seed: int,
    root: Path,
    objects: Objects | None = None,
    least_classes: int = 2,
    watch: Watch = lambda event: None,
    load_base: Callable[..., Base] | None = None,
    check: Callable[[Federation, Callable[[], Base]], None] = lambda federation, sizes: None,
) -> tuple[Federation, Base]:
    """Load data and base, or take them from the Python objects that stand in for them; `watch` hears of each step.

    `load_base` loads the base in place of `base.load`, or its sizes alone: see `base_sizes.sized_base`. Before that
    `check` gets the data and what returns these sizes, unless an object stands in for the base.

    Raises:
        ConfigError: if a file, column, module or object that the settings name does not exist.
    """
    objects = objects or Objects()
    for argument, name, given in (("model", model.base, objects.model), ("data", data.source, objects.data)):
        if name == PYTHON and given is None:
            raise ConfigError(missing_object(argument))
    if model.base == "embedded" and not (embedded.path() / "config.json").is_file():
        expected, hint = "the model inside the package", "run the app in server/superlink, which ships no code"
        raise ConfigError(Fault("model.base", expected, "Flower's bundle of the package, which holds code alone", hint))
    rows = plugin_rows(data) if data.format == "plugin" and objects.data is None else objects.data
    given = None if objects.model is None else base_from_object(model, adapter, objects.model, seed=seed)
    watch(Phase("reading the data, tokenizing"))
    tokenizer = load_tokenizer(model, root, weights=load_base is None) if given is None else given.tokenizer
    encode = partial(
        federate, tokenizer=tokenizer, task=model.task, seed=seed, root=root, rows=rows, least_classes=least_classes
    )
    federation = encode(data)
    order = federation.labels
    if model.task == "classification":
        order = class_order(model, root, order) if given is None else own_order(given, order)
    watch(Phase("loading the base"))
    options: Any = {"tokenizer": tokenizer, "root": root, "seed": seed, "labels": order}
    if given is None:
        check(federation, partial(sized_base, model, adapter, **options))
    base = given or (load_base or load)(model, adapter, **options)
    federation = cut_to_positions(federation, data, encode, base=base.name, positions=base.positions)
    if model.task == "classification":
        federation = with_class_order(federation, order)
    check_examples(federation, base)
    return federation, base


def own_order(base: Base, labels: Sequence[str]) -> Sequence[str]:
    """Return the classes of data with these labels by row of the head of a base that Python code gave.

    Raises:
        ConfigError: if the head is of other classes.
    """
    own = named_rows(base.model.config)
    if not (classes := match_classes(own, labels)).fits:
        expected = f"a classifier whose id2label names the classes of the data ({shorten(labels)})"
        raise ConfigError(Fault("model", expected, shorten(own) or "none", "create it with these labels"))
    return classes.labels


def manifest(base: Base) -> bytes:
    """Return the encoded manifest of the base; empty if it has none, for LoRA can train such a base all the same."""
    with suppress(ConfigError):
        return base.manifest.encode()
    return b""


def blocks(base: Base) -> BlockLayout | None:
    """Return the blocks of the base; None for a family that cannot be pruned, for only pruning needs them."""
    with suppress(ConfigError):
        return block_layout(base)
    return None


def device(base: Base) -> Device:
    """Return memory, cores and accelerator of this process."""
    return Device(
        memory_bytes=memory_bytes(base.device),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        accelerator="" if base.device.type == "cpu" else str(base.device),
    )
