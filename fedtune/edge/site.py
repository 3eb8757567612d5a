"""A device as a client: its bundle and examples, its profile, and its answers to assignments."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from math import isqrt
from pathlib import Path
from typing import Self

import numpy as np

from fedtune.config.site import SiteSettings, bind_site, own_shard
from fedtune.data.encode import Example, depends_on_date
from fedtune.data.federation import Federation, federate
from fedtune.data.limits import Limits, check_limits, cut_to_positions
from fedtune.data.paths import places
from fedtune.data.settings import DataSettings
from fedtune.data.templates import DAY
from fedtune.directions.kron import Kron
from fedtune.directions.rebuild_numpy import EXPONENTS
from fedtune.directions.seed_ledger import SeedLedger, decode_ledger
from fedtune.directions.trainable import TensorSelection, trainable_ordinals
from fedtune.edge.base import Opened, open_base
from fedtune.edge.bundle import BANK
from fedtune.edge.current_model import CurrentModel, read_model, store_model
from fedtune.edge.memory import check_memory, step_bytes
from fedtune.errors import ClientError, ConfigError, Fault, StoreError
from fedtune.link.client.order_limits import limit_violations
from fedtune.link.client.training_server import without_losses
from fedtune.link.settings import Policy, ScorePolicy
from fedtune.messages import (
    OUT_OF_MEMORY,
    Assignment,
    ClientScores,
    ClientUpdate,
    DescendSeeds,
    ProbeSeeds,
    ScoreRequest,
)
from fedtune.probing.answer import Prober, measure_seeds
from fedtune.probing.measure import Position
from fedtune.probing.replica import Replicas
from fedtune.probing.rows import PaddedRows, pad
from fedtune.probing.scores import likelihood_at
from fedtune.probing.steps import OnStep, no_steps
from fedtune.wire.profile import ClientProfile, Device, ModelSpec

METHOD = "fedkseed"


@dataclass(frozen=True)
class EdgeSite:
    """A device with everything that it needs to answer."""

    client: str
    opened: Opened
    examples: Sequence[Example]
    """For training."""
    held_out: Sequence[Example]
    """Never trained on; the losses before and after training, and the scores of global models, are of them."""
    state: Path
    """Folder of the model that it has last received."""
    policy: Policy
    replicas: Replicas = field(default_factory=Replicas)
    """The accumulators that this process remembers between rounds."""
    date: str = ""
    """The day that the chat template has written into the examples; empty where they depend on none."""
    reload: Callable[[str], EdgeSite] | None = None
    """Reads the same data with another day."""
    notes: Sequence[str] = ()
    """What the owner should know of the data and the bundle."""
    on_step: OnStep = no_steps
    """Hears of each step of a training."""

    @property
    def scores(self) -> ScorePolicy:
        return self.policy.scores

    def with_labels(self, labels: Sequence[str], date: str = "") -> EdgeSite:
        """Return the device with the day that all clients of a run use; empty: its own. It has no classes."""
        if self.reload is None or not self.date or date in ("", self.date):
            return self
        return replace(self.reload(date), on_step=self.on_step, replicas=self.replicas)

    def profile(self) -> ClientProfile:
        """Return what the device tells a server about itself: the same of base and layers as a client with torch."""
        bundle = self.opened.bundle
        return ClientProfile(
            client=self.client,
            num_examples=len(self.examples),
            foundation=ModelSpec(
                base=bundle.base_digest,
                modules=self.opened.modules,
                transposed=bundle.facts.transposed,
                parameters=bundle.facts.parameters,
                manifest=bundle.manifest.encode(),
                anatomy=bundle.facts.anatomy,
            ),
            methods=(METHOD,),
            device=device(),
            held_out=0 if self.scores == "refuse" else len(self.held_out),
        )

    def perform(self, assignment: Assignment) -> ClientUpdate:
        """Return the device's update for an assignment.

        Raises:
            ClientError: if it is for another client, or cannot be done.
            WireError: if accumulators that were sent are not those that they are said to be.
        """
        name = self.client
        if assignment.plan.client != name:
            raise ClientError(f"{name}: expected an assignment of its own; got one for {assignment.plan.client!r}")
        # A runtime of forward passes alone has no gradients: it does what the order allows in their place.
        assignment = assignment.probed_instead() or assignment
        task = assignment.task
        if isinstance(task, DescendSeeds):
            raise ClientError(
                f"{name}: expected an order that a device can follow; got one to descend and not to probe; "
                "run fedtune-client, or ask for method.verb = 'auto'"
            )
        if not isinstance(task, ProbeSeeds):
            raise ClientError(
                f"{name}: expected an order of the method {METHOD!r}; got one to train LoRA factors, which needs "
                f"torch; run fedtune-client, or ask for method = {METHOD!r}"
            )
        refuse_probe(name, task)
        site = self.with_labels((), assignment.date)
        # Over the link this was checked before the download.
        for _, reason in limit_violations(site.policy, assignment, len(site.examples)):
            raise ClientError(f"{name}: {reason}")
        moves = 2 if task.estimator == "two-sided" else task.queries + 1
        site.check_memory(isqrt(task.seeds), assignment.plan.training.batch, moves, setting="client.batch")
        update = measure_seeds(
            site.prober(), site.examples, assignment, task, site.replicas, site.held_out, site.on_step
        )
        # A device that keeps its losses has a log to write them to: there the caller takes them out.
        return without_losses(update) if self.scores == "refuse" else update

    def prober(self) -> Prober[PaddedRows]:
        """Return the base, on which the runtime measures losses along seeds."""
        opened = self.opened
        return Prober(
            opened.bundle.manifest,
            opened.layers,
            collate=partial(pad, pad_id=opened.bundle.facts.pad_id),
            at=partial(position, opened, self.state),
        )

    def check_memory(self, rank: int, batch: int, moves: int, *, setting: str) -> None:
        """Check that the largest step of an order, or batch of a request, fits into the memory that is free.

        Raises:
            ClientError: in the words by which a planner asks for less.
        """
        opened, rows = self.opened, [*self.examples, *self.held_out]
        longest = sorted(rows, key=lambda example: len(example.input_ids))[-batch:]
        more = step_bytes(opened.bundle, rank, longest, moves)
        try:
            check_memory(opened.bundle, opened.max_bytes, loaded=opened.is_loaded, more=more)
        except ConfigError as error:
            raise ClientError(f"{self.client}: {OUT_OF_MEMORY}: {error}; or lower {setting}") from error

    def in_run(self, folder: Path) -> Self:
        """Return the device as it is: it stores no model of its own."""
        return self

    def score(self, request: ScoreRequest) -> ClientScores:
        """Return what a global model scores on the rows that the device holds out.

        Raises:
            ClientError: if the request is for another client, the device's policy forbids it, or it cannot be done.
            WireError: if the seeds are none.
        """
        began, name, bundle = time.perf_counter(), self.client, self.opened.bundle
        if request.client != name:
            raise ClientError(f"{name}: expected a request of its own; got one for {request.client!r}")
        if self.scores == "refuse":
            raise ClientError(f"{name}: expected no request for scores; this site's policy.scores refuses them")
        if request.base != bundle.base_digest:
            hint = "get the bundle of the run's base"
            raise ClientError(
                f"{name}: expected base {request.base[:12]}; has {bundle.base_digest[:12]} ({bundle.base_name}); {hint}"
            )
        if any(request.blobs.values()):
            raise ClientError(f"{name}: expected a model of seeds; got LoRA factors; run fedtune-client for them")
        site = self.with_labels((), request.date)
        rows = site.held_out[: request.examples or None]
        if not rows:
            raise ClientError(f"{name}: expected rows that are held out; got none; set data.held_out above 0")
        ledger, trainable = request_model(self.opened, request, name)
        site.check_memory(isqrt(ledger.bank.size), request.batch, 1, setting="evaluate.batch")
        prober = site.prober()
        with prober.at(ledger, trainable) as there:
            metrics = likelihood_at(there, prober.collate, rows, batch=request.batch)
        return ClientScores(name, request.round, bundle.base_digest, metrics, time.perf_counter() - began)


@contextmanager
def position(
    opened: Opened, state: Path, ledger: SeedLedger, trainable: Sequence[int]
) -> Iterator[Position[PaddedRows]]:
    """Give the position of a global model inside a block; the device has it on its disk from then on."""
    if ledger.round:
        remember(state, CurrentModel(ledger, tuple(trainable)))
    with opened.runtime.at(ledger, trainable) as there:
        yield there


def remember(state: Path, model: CurrentModel) -> None:
    """Store the model that has come; that this fails costs the owner a newer model to talk to, and no round."""
    try:
        if (stored := stored_model(state)) is None or stored.ledger.digest != model.ledger.digest:
            store_model(state, model)
    except StoreError as error:
        print(f"fedtune-edge: {error}", file=sys.stderr)


def stored_model(state: Path) -> CurrentModel | None:
    """Return the model that was stored last; None if there is none that can be read."""
    try:
        return read_model(state)
    except StoreError:
        return None


def refuse_probe(client: str, task: ProbeSeeds) -> None:
    """Raise ClientError for what an order along seeds may ask and a bundle has no graph for."""
    asked = {
        f"the bank {task.bank!r}": task.bank != BANK,
        "biases and norms to be moved (method.vectors)": task.vectors,
        "embeddings to be moved (method.embeddings)": task.embeddings,
        "numbers for groups of weights (method.groups)": task.groups != 1,
        "directions of several banks (method.redraw)": bool(task.earlier),
    }
    if unsupported := [what for what, is_asked in asked.items() if is_asked]:
        raise ClientError(
            f"{client}: expected an order that a device can follow; got one that asks for {' and '.join(unsupported)}; "
            f"run fedtune-client, or ask for method.bank = {BANK!r} alone"
        )


def request_model(opened: Opened, request: ScoreRequest, client: str) -> tuple[SeedLedger, Sequence[int]]:
    """Return the model that a request asks for; without seeds it is the base, which no seed has moved.

    Raises:
        ClientError: if it is of another base, or moves what the bundle has no graph for.
        WireError: if the seeds are none.
    """
    manifest = opened.bundle.manifest
    own = trainable_ordinals(manifest, TensorSelection(BANK), opened.layers)
    if not request.ledger:
        bank = Kron(4, 0)
        return SeedLedger(bank, EXPONENTS.start, 0, manifest.digest, np.zeros(bank.size, np.int32)), own
    ledger = decode_ledger(request.ledger)
    if not isinstance(ledger.bank, Kron) or not set(request.trainable) <= set(own):
        raise ClientError(f"{client}: expected a model of the bank {BANK!r} over its own layers; got another")
    if ledger.manifest != manifest.digest:
        expected, got = manifest.digest.hex()[:16], ledger.manifest.hex()[:16]
        raise ClientError(f"{client}: expected seeds over the base {expected}; got {got}; get the bundle of that base")
    return ledger, request.trainable


def device() -> Device:
    """Return memory and cores of this machine."""
    return Device(
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
    )


# Two of them: with the day of its own file, by which a device says hello, and with that of the federation.
@lru_cache(maxsize=2)
def from_file(path: str, date: str = "") -> EdgeSite:
    """Return the device that a local file describes.

    Args:
        path: of the file.
        date: the day that a chat template writes; empty: that of its own file.

    Raises:
        ConfigError: if the file, or anything that it names, is wrong.
        StoreError: if the bundle is damaged.
    """
    settings = bind_site(Path(path))
    # Another day changes the texts alone: a second base would take as much memory again.
    opened = from_file(path).opened if date else open_base(settings, source=path)
    data = replace(settings.data, date=date or settings.data.date)
    federation = read_data(settings, data, opened)
    shard = own_shard(settings, federation, source=path)
    dated = depends_on_date(data, opened.tokenizer, form=federation.form)
    replicas = Replicas()
    if (stored := stored_model(settings.state)) is not None:
        # From before a restart: the server need not send everything again.
        replicas.store(stored.ledger)
    return EdgeSite(
        settings.name,
        opened,
        shard.train,
        shard.held_out,
        settings.state,
        settings.policy,
        replicas,
        date=(data.date or DAY) if dated else "",
        reload=lambda day: from_file(path, day),
        notes=(*opened.bundle.warnings, *federation.notes),
    )


def check_local(data: DataSettings, root: Path) -> None:
    """Check that the data lie on the device: to look for a mistyped path on a hub would tell the hub of it.

    Raises:
        ConfigError: if they do not.
    """
    for key, source in (("data.source", data.source), ("data.test", data.test or ())):
        named, _ = places([source] if isinstance(source, str) else source, data.format, root, key)
        for place in named:
            if place.form == "hub":
                hint = f"paths start from {root}; a device reads nothing from elsewhere"
                raise ConfigError(Fault(key, "a file or folder on this device", repr(place.name), hint))


def read_data(settings: SiteSettings, data: DataSettings, opened: Opened) -> Federation:
    """Return the device's examples, which its base can read.

    Raises:
        ConfigError: if data cannot be read or encoded, or the base has no room or no embedding for them.
    """
    check_local(data, settings.root)
    facts, name = opened.bundle.facts, opened.bundle.base_name
    encode = partial(
        federate,
        tokenizer=opened.tokenizer,
        task="causal",
        seed=settings.seed,
        root=settings.root,
        # A device may lack a class, also the only other one: the federation knows it.
        least_classes=1,
    )
    federation = cut_to_positions(encode(data), data, encode, base=name, positions=facts.positions)
    if federation.compared:
        expected = "rows of one answer for a device, which measures likelihoods alone"
        hint = "map the preferred answer as output, or take part with fedtune-client, which has torch"
        raise ConfigError(Fault("data.fields.rejected", expected, "rows with a rejected answer", hint))
    check_limits(federation, Limits(name, facts.positions, facts.vocabulary), opened.tokenizer.convert_ids_to_tokens)
    return federation
