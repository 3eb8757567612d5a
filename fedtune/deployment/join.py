"""One site's part in a federation: its own file, identity and rules bound to a client of the link."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fedtune.config import Recipe, bind, planned_training
from fedtune.config.recipe import method_of
from fedtune.config.site import SiteSettings, bind_site
from fedtune.errors import ConfigError, Fault
from fedtune.link.audit_log import Audit, RecordEvent, both, silent
from fedtune.link.client import policy
from fedtune.link.client.client import Client, End, Greeting
from fedtune.link.client.policy import TaskDemand, Usage
from fedtune.link.client.training_process import ProcessTrainer, Trainer
from fedtune.link.pki.identity import Identity, load, renewal
from fedtune.link.pki.roster import RosterFile
from fedtune.link.settings import JoinSettings
from fedtune.messages import ProbeSeeds
from fedtune.store.files import store_errors
from fedtune.store.lock import lock_run

AUDIT = "audit"


@dataclass(frozen=True)
class JoinSetup:
    """A site with everything that it needs to dial."""

    settings: SiteSettings
    link: JoinSettings
    identity: Identity
    roster: RosterFile
    state: Path


def load_join_setup(site: Path, *, server: str | None = None) -> JoinSetup:
    """Return the site of a file, checked as far as can be without a network.

    Raises:
        ConfigError: with what is wrong.
    """
    settings = bind_site(site)
    link = settings.link
    if link is None:
        if server is None:
            hint = 'add [link] with address = "HOST:9000", or give --server'
            raise ConfigError(Fault("link", "the table [link]", "none", hint), source=str(site))
        link = JoinSettings(address=server)
    elif server is not None:
        link = replace(link, address=server)
    host, _, port = link.address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(Fault("link.address", "HOST:PORT", repr(link.address)), source=str(site))
    identity = load((settings.root / link.identity).resolve(), role="client", now=int(time.time()))
    if settings.name != identity.name:
        hint = f'set name = "{identity.name}", or enrol under the other name'
        raise ConfigError(Fault("name", f"{identity.name!r}, as this site is enrolled", repr(settings.name), hint))
    return JoinSetup(
        settings,
        link,
        identity,
        RosterFile(identity.folder / "roster", identity.root),
        (settings.root / link.state).resolve(),
    )


def join(
    site: Path,
    *,
    server: str | None = None,
    tell: RecordEvent,
    agree: Callable[[str], bool] = lambda recipe: False,
    trainer: Trainer | None = None,
) -> End:
    """Dial, and do what is asked and allowed until the run is complete.

    Args:
        site: the site's own file.
        server: address instead of the file's.
        tell: told what happens, beside the audit log.
        agree: asked with the recipe before the site takes part in a run, if its policy says so.
        trainer: does the work; a process of its own without one.

    Raises:
        ConfigError: if something must be changed before this can succeed.
        StoreError: if the state folder cannot be written.
    """
    made = load_join_setup(site, server=server)
    with store_errors(made.state):
        made.state.mkdir(parents=True, exist_ok=True)
        made.state.chmod(0o700)
    with lock_run(made.state), open_audit_log(made.state / AUDIT, tell) as log:
        told = both(log.tell, tell)
        if warning := renewal(made.identity, int(time.time())):
            told("warning", text=warning)
        own = None if trainer is not None else process(site, told)
        client = Client(
            made.identity,
            made.roster,
            made.link,
            made.settings.policy,
            made.state,
            trainer or own or process(site, told),
            tell=told,
            agree=lambda greeting: not made.settings.policy.ask or agree(greeting.recipe.decode()),
        )
        try:
            return client.run()
        finally:
            if own is not None:
                own.close()


def process(site: Path, tell: RecordEvent) -> ProcessTrainer:
    command = [sys.executable, "-m", "fedtune.client.site_process", str(site.resolve())]
    return ProcessTrainer(command, died=lambda reason: tell("died", reason=reason))


@contextmanager
def open_audit_log(path: Path, tell: RecordEvent) -> Iterator[Audit]:
    log = Audit(path, failed=lambda error: tell("warning", text=str(error)))
    try:
        yield log
    finally:
        log.close()


@dataclass(frozen=True)
class DryRun:
    """What a server's run would ask of a site, and what the site's policy says of it."""

    server: str
    run: str
    recipe: str
    """TOML."""
    recipe_digest: str
    demand: TaskDemand
    rounds: int
    refusals: Sequence[policy.Refusal]
    columns: Mapping[str, str]
    """Columns of the site's files, by what they are used for."""

    @property
    def allowed(self) -> bool:
        return not self.refusals

    @property
    def facts(self) -> Mapping[str, Any]:
        """The same for a program."""
        told = {key: value for key, value in asdict(self).items() if key != "refusals"}
        return {**told, "allowed": self.allowed, "refusals": [one.note for one in self.refusals]}


def dry_run(site: Path, *, server: str | None = None) -> DryRun:
    """Ask the server what it runs, and hold that against the site's policy; nothing is loaded, trained or sent.

    Raises:
        ConfigError: if the server cannot be reached or does not take this site.
    """
    made = load_join_setup(site, server=server)
    client = Client(made.identity, made.roster, made.link, made.settings.policy, made.state, NullTrainer(), tell=silent)
    try:
        greeting = client.greet()
    finally:
        client.stop()
    return planned_requests(made, greeting)


def planned_requests(made: JoinSetup, greeting: Greeting) -> DryRun:
    recipe = bind(greeting.recipe.decode())
    asked = asks(recipe, made.identity.name)
    refusals = policy.check_policy(
        made.settings.policy, asked, greeting.recipe_digest.hex(), Usage(), now=datetime.now().time()
    )
    return DryRun(
        server=made.link.address,
        run=greeting.run,
        recipe=greeting.recipe.decode(),
        recipe_digest=greeting.recipe_digest.hex(),
        demand=asked,
        rounds=recipe.rounds.count,
        refusals=refusals,
        columns={str(part): column for part, column in made.settings.data.fields.items()},
    )


def asks(recipe: Recipe, client: str) -> TaskDemand:
    """Return what a recipe asks of a client in a round, as far as it says so; bytes and base it leaves open."""
    rank, training = planned_training(recipe, client)
    probe = method_of(recipe).task is ProbeSeeds
    return TaskDemand(
        method=recipe.method.name,
        round=1,
        rank=None if probe else rank,
        steps=training.steps or 0,
        cohort=recipe.rounds.cohort if isinstance(recipe.rounds.cohort, int) else recipe.rounds.min_clients,
        num_bytes=0,
        base="",
    )


class NullTrainer:
    """The trainer of a site that does nothing."""

    def profile(self, into: Path) -> None: ...

    def perform(self, folder: Path, bodies: Sequence[str], into: Path) -> None: ...

    def kill(self) -> None: ...
