"""A site that joins a federation: its own file, identity and policy bound to a client of the link."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any, TypeAlias

from fedtune.config import Recipe, planned_training
from fedtune.config.consent import first_order, permission_texts
from fedtune.config.recipe import method_of, probing_training, requested_verb
from fedtune.config.site import SiteSettings, bind_site
from fedtune.config.trainer_checks import own_training_faults
from fedtune.deployment.consent import accepted_recipe, order_check
from fedtune.errors import ConfigError, Fault
from fedtune.link.audit_log import AuditLog, RecordEvent, log_event, record_to_all
from fedtune.link.client import outbox, policy
from fedtune.link.client.client import Client, End
from fedtune.link.client.conditions import Conditions
from fedtune.link.client.http_proxy import settle_proxy
from fedtune.link.client.order_limits import limit_violations
from fedtune.link.client.policy import PolicyViolation, TaskDemand, Usage
from fedtune.link.client.session import Greeting
from fedtune.link.client.site_status import StatusFile
from fedtune.link.client.socket_bytes import SocketMeter, dialled_port
from fedtune.link.client.training_process import ProcessTrainer, Trainer, WorkProgress
from fedtune.link.pki.identity import Identity, load_identity
from fedtune.link.pki.roster import RosterFile
from fedtune.link.settings import GIB, JoinSettings, Policy, ScorePolicy
from fedtune.messages import ProbeSeeds
from fedtune.store.files import make_private, store_errors
from fedtune.store.lock import lock_run

AUDIT = "audit"
CheckRecipe: TypeAlias = Callable[[Recipe, str], None]
"""Of a recipe and the name of this client."""
"""Raises ConfigError where a program cannot do what a recipe asks of its clients."""
TORCH_PROCESS = (sys.executable, "-m", "fedtune.client.site_process")
"""Starts the process that trains with torch."""
MANY_EXAMPLES = 10_000
"""Of a site whose data are not loaded."""


@dataclass(frozen=True)
class JoinSetup:
    """A site with everything that it needs to connect."""

    settings: SiteSettings
    link: JoinSettings
    identity: Identity
    roster: RosterFile
    state: Path
    conditions: Conditions


def load_join_setup(site: Path | SiteSettings, *, server: str | None = None) -> JoinSetup:
    """Return the site of a file, or of settings that were read already, after every check that needs no network.

    Raises:
        ConfigError: naming what is missing or wrong.
    """
    settings = site if isinstance(site, SiteSettings) else bind_site(site)
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
    link = settle_proxy(link, settings.root, os.environ)
    identity = load_identity((settings.root / link.identity).resolve(), role="client", now=int(time.time()))
    # The roster knows the client by this name; under another one its plan would never reach it.
    if settings.name != identity.name:
        hint = f'set name = "{identity.name}", or enrol under the other name'
        raise ConfigError(Fault("name", f"{identity.name!r}, as this site is enrolled", repr(settings.name), hint))
    roster = RosterFile(identity.folder / "roster", identity.root)
    state = (settings.root / link.state).resolve()
    conditions = Conditions(settings.policy, state)
    conditions.check()
    return JoinSetup(settings, link, identity, roster, state, conditions)


def join(
    site: Path | SiteSettings,
    *,
    server: str | None = None,
    record: RecordEvent,
    # Without somebody to ask, a site whose policy has `ask` takes part in nothing.
    agree: Callable[[str], bool] = lambda recipe: False,
    suits: CheckRecipe | None = None,
    command: Sequence[str] | None = None,
    idle_s: float | None = None,
    trainer: Trainer | None = None,
    started: Callable[[Client], object] = lambda client: None,
) -> End:
    """Connect, and do the tasks that the site's policy allows until the run is complete.

    Args:
        site: the site's own file; or its settings, beside a trainer.
        server: address instead of the file's.
        record: receives the events, beside the audit log.
        agree: asked with the recipe before the site takes part in a run, if its policy has `ask`.
        suits: checks before that whether this program can do what the recipe asks; None: it can do all.
        command: starts the process that trains, and gets the site's file and three descriptors as last arguments; None:
            that of the client with torch.
        idle_s: without work for so long that process is ended; None: never, since a client with torch would forget the
            state that short messages of `fedkseed` refer to.
        trainer: trains in place of such a process.
        started: called with the client before it runs, which can be stopped by it.

    Raises:
        ConfigError: if something must be changed before this can succeed.
        StoreError: if the state folder cannot be written.
    """
    setup = load_join_setup(site, server=server)
    if suits is None and setup.settings.client is not None:
        suits = suits_trainer
    with store_errors(setup.state):
        setup.state.parent.mkdir(parents=True, exist_ok=True)
        # Updates lie here, from which something of the data may be inferred.
        make_private(setup.state, below=setup.state)
    # Two clients with one outbox would both reply to the same task.
    with lock_run(setup.state), open_audit_log(setup.state / AUDIT, record) as log, ExitStack() as stack:
        outbox.sweep(setup.state)
        meter = SocketMeter(dialled_port(setup.link))
        status = StatusFile(setup.state, meter)
        stack.callback(status.look)
        record_all = record_to_all(log.record, log_event, status.record, record)
        for text in setup.conditions.unknown():
            record_all("warning", text=text)
        if trainer is None:
            process = make_trainer(
                command or TORCH_PROCESS,
                file_of(site),
                record_all,
                max_memory_gib=setup.settings.policy.max_memory_gib,
                idle_s=idle_s,
            )
            stack.callback(process.close)
            trainer = process
        client = Client(
            setup.identity,
            setup.roster,
            setup.link,
            setup.settings.policy,
            setup.state,
            trainer,
            check=order_check(setup.state, setup.settings.policy),
            record=record_all,
            conditions=setup.conditions,
            meter=meter,
            each_second=status.look,
            agree=partial(takes_part, suits, setup.identity.name, agree if setup.settings.policy.ask else None),
        )
        started(client)
        return client.run()


def suits_trainer(recipe: Recipe, client: str) -> None:
    """Refuse a run of which a site with a trainer of its own could not do a part.

    Raises:
        ConfigError: naming all of them.
    """
    if faults := list(own_training_faults(recipe, "a trainer of the site's own")):
        raise ConfigError(faults)


def file_of(site: Path | SiteSettings) -> Path:
    """Return the file that a process of its own reads.

    Raises:
        ConfigError: if there is none.
    """
    if isinstance(site, SiteSettings):
        raise ConfigError(Fault("site", "a file, which the process that trains reads", "settings"))
    return site


def takes_part(suits: CheckRecipe | None, client: str, agree: Callable[[str], bool] | None, greeting: Greeting) -> bool:
    """Return whether the operator agrees to a run, if asked; see `join`.

    Raises:
        ConfigError: if this program cannot do what the run's recipe asks.
    """
    if suits is not None:
        suits(accepted_recipe(greeting.recipe), client)
    return agree is None or agree(greeting.recipe.decode(errors="replace"))


def no_terminal() -> ConfigError:
    """Return the error of a site whose policy has `ask`, and that is started where no person can say yes."""
    hint = "start it once at a terminal, which a restart needs no more, or with --yes"
    return ConfigError(Fault("policy.ask", "your yes to the recipe", "no terminal to ask at", hint))


def make_trainer(
    command: Sequence[str],
    site: Path,
    record: RecordEvent,
    *,
    max_memory_gib: float | None = None,
    idle_s: float | None = None,
) -> ProcessTrainer:
    """Return a trainer in a process of its own, which loads base and data of a site's file."""
    # A process of its own: it may run out of memory and die without ending the connection.
    max_bytes = None if max_memory_gib is None else int(max_memory_gib * GIB)
    return ProcessTrainer(
        [*command, str(site.resolve())],
        max_bytes=max_bytes,
        on_exit=lambda reason: record("died", reason=reason),
        idle_s=idle_s,
    )


@contextmanager
def open_audit_log(path: Path, record: RecordEvent) -> Iterator[AuditLog]:
    log = AuditLog(path, on_failure=lambda error: record("warning", text=str(error)))
    try:
        yield log
    finally:
        log.close()


@dataclass(frozen=True)
class DryRun:
    """What a server's run would demand of a site, and which limits of the site's policy that exceeds."""

    server: str
    run: str
    recipe: str
    """TOML."""
    recipe_digest: str
    demand: TaskDemand
    rounds: int
    least_cohort: int
    """Updates without which a round is not completed."""
    refusals: Sequence[policy.PolicyViolation]
    remarks: Sequence[str]
    """What the recipe leaves open, and the site would decide in each round."""
    scores: ScorePolicy
    """What the site does with its scores of the global model."""
    permitted: Mapping[str, str]
    """In plain words all that the recipe permits to be asked of this site; other orders are vetoed."""
    columns: Mapping[str, str]
    """Columns of the site's files, by what they are used for."""

    @property
    def allowed(self) -> bool:
        return not self.refusals

    @property
    def facts(self) -> Mapping[str, Any]:
        """The same for a program."""
        fields = {key: value for key, value in asdict(self).items() if key != "refusals"}
        return {**fields, "allowed": self.allowed, "refusals": [violation.note for violation in self.refusals]}


def dry_run(site: Path, *, server: str | None = None, suits: CheckRecipe | None = None) -> DryRun:
    """Ask the server for its run, and compare it with the site's policy; nothing is loaded, trained or sent.

    Raises:
        ConfigError: if the server cannot be reached, does not take this site, or its recipe does not suit this program.
    """
    setup = load_join_setup(site, server=server)
    greeting = greet(setup.identity, setup.link, setup.settings.policy, setup.state)
    if suits is not None:
        suits(accepted_recipe(greeting.recipe), setup.identity.name)
    return compare_with_policy(setup, greeting)


def greet(identity: Identity, link: JoinSettings, rules: Policy, state: Path) -> Greeting:
    """Say hello to a server once, and return what it says of itself and its run; nothing is loaded or written.

    Raises:
        ConfigError: if the server cannot be reached, or does not take this site.
    """
    roster = RosterFile(identity.folder / "roster", identity.root)
    client = Client(identity, roster, link, rules, state, NullTrainer(), check=order_check(state, rules))
    try:
        return client.greet()
    finally:
        client.stop()


def compare_with_policy(setup: JoinSetup, greeting: Greeting) -> DryRun:
    """Return what the greeting's recipe demands of a site, compared with the site's policy."""
    recipe = accepted_recipe(greeting.recipe)
    demand = recipe_demand(recipe, setup.identity.name)
    refusals = policy.check_policy(
        setup.settings.policy, demand, greeting.recipe_digest.hex(), Usage(), now=datetime.now().time()
    )
    # Whatever the site holds, the order's own steps may be too few.
    rules, many = setup.settings.policy, max(MANY_EXAMPLES, 4 * setup.settings.policy.min_examples)
    first = first_order(recipe, setup.identity.name, many)
    refusals = [*refusals, *starmap(PolicyViolation, limit_violations(rules, first, many))]
    return DryRun(
        server=setup.link.address,
        run=greeting.run,
        recipe=greeting.recipe.decode(),
        recipe_digest=greeting.recipe_digest.hex(),
        demand=demand,
        rounds=recipe.rounds.count,
        least_cohort=recipe.rounds.min_clients,
        refusals=refusals,
        remarks=remarks(setup.settings.policy, recipe, demand),
        scores=setup.settings.policy.scores,
        permitted=permission_texts(recipe, setup.identity.name),
        columns={str(part): column for part, column in setup.settings.data.fields.items()},
    )


def recipe_demand(recipe: Recipe, client: str) -> TaskDemand:
    """Return what a recipe demands of a client in a round; it does not say how many bytes, and of which base."""
    rank, training = planned_training(recipe, client)
    probe = method_of(recipe).task is ProbeSeeds
    # A client that may be asked either is asked whichever takes more.
    either = probing_training(recipe, client) if requested_verb(recipe, client) == "auto" else None
    return TaskDemand(
        method=recipe.method.name,
        round=1,
        rank=None if probe else rank,
        steps=max(training.steps or 0, (either.steps or 0) if either else 0),
        cohort=known_cohort(recipe),
        num_bytes=0,
        base=None,
    )


def known_cohort(recipe: Recipe) -> int | None:
    """Return how many clients each round has; None where it takes a share of those that are there, or all of them.

    An asynchronous round promises none but the client itself: whose updates it ends with is known only then.
    """
    if recipe.asynchronous is not None:
        return 1
    cohort = recipe.rounds.cohort
    return cohort if isinstance(cohort, int) else None


def remarks(rules: Policy, recipe: Recipe, demand: TaskDemand) -> Sequence[str]:
    """Return what only the rounds will show: whether they have as many clients as the policy asks for."""
    least = recipe.rounds.min_clients
    if recipe.asynchronous is not None and rules.min_cohort > 1:
        return (
            f"policy.min_cohort: asynchronous rounds name no other client, so with {rules.min_cohort} this site "
            "declines every order; stay out of the run, or set it to 1",
        )
    if demand.cohort is not None or rules.min_cohort <= max(1, least):
        return ()
    # `min_clients` counts updates that are used, the policy clients that are asked: fewer are never asked.
    return (
        f"policy.min_cohort: rounds of fewer than {rules.min_cohort} clients will be declined; "
        f"the recipe promises {least} (rounds.min_clients)",
    )


class NullTrainer:
    """A trainer that does nothing, for a dry run."""

    def profile(self, into: Path, labels: Sequence[str] = ()) -> None: ...

    def perform(self, folder: Path, bodies: Sequence[str], into: Path) -> Mapping[str, float]:
        return {}

    def score(self, folder: Path, bodies: Sequence[str], into: Path) -> Mapping[str, float]:
        return {}

    def progress(self) -> WorkProgress:
        return WorkProgress()

    def kill(self) -> None: ...
