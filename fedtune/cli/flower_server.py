"""`app`, the server that Flower's components name: fedtune.cli.flower_server:app. It loads no model and no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from fedtune.cli.flower_demo import demo_recipe, home
from fedtune.config import Recipe
from fedtune.deployment.link_events import scores_text
from fedtune.deployment.server_setup import check_overrides, data_at_sites, expected_clients, server_context
from fedtune.errors import ConfigError, Fault
from fedtune.flower.grid_transport import DEADLINE_S
from fedtune.flower.server_app import Connect, Scalar, server_app
from fedtune.messages import Failure
from fedtune.report.units import bytes_text
from fedtune.rounds.events import ClientFinished, Event, Note, RoundFinished, RoundStarted
from fedtune.rounds.record import RoundRecord
from fedtune.runs import demo_code
from fedtune.runs.resume import as_started, check_resumable
from fedtune.runs.runner import run_recipe
from fedtune.runs.tracked import track
from fedtune.store.run_directory import check_vacant
from fedtune.terminal.text import printable
from fedtune.tracking.packages import check_packages

RECIPE = "the recipe: TOML, or the absolute path of a file on the server's host"
HINT = "--run-config 'recipe=\"/etc/fedtune/recipes/notes.toml\"'"


def run_app(connect: Connect, run_config: Mapping[str, Scalar]) -> None:
    """Run the recipe that a run's configuration names, or resume an earlier run of it; in a simulation, else the demo.

    Raises:
        ConfigError: if the recipe is wrong, or nothing names one and clients have come that are not the demo's.
        RoundError: if too few clients connected, or a round could not be completed.
        StoreError: if the run directory cannot be written or trusted.
    """
    named = str(run_config.get("recipe") or "")
    recipe = bind_source(named or str(demo_recipe()))
    if not named:
        say(f"no recipe is named, so the demo runs in simulation: {demo_recipe()}; {HINT} names yours")
        say("all of its clients train with --federation-config 'num-supernodes=8 client-resources-num-cpus=1'")
    check_packages(recipe.report.trackers)
    resume = run_name(str(run_config.get("resume") or ""))
    run = directory(str(run_config.get("store") or ""), resume or recipe.name)
    if resume:
        recipe = as_started(run, recipe)
        check_resumable(run, recipe)
    else:
        run = check_vacant(run, fresh=not named)
    transport = connect(
        expected=expected_clients(recipe),
        least=recipe.rounds.min_clients,
        base=recipe.model.digest or "",
        labels=recipe.data.labels,
        deadline_s=DEADLINE_S,
        note=say,
    )
    if not named:
        check_demo([client.name for client in transport.clients()])
    context = server_context(recipe, transport, door="flower", note=say)
    check_overrides(recipe, context.fleet, say)
    with track(run, recipe, print_event) as observe:
        summary = run_recipe(context, run, transport, resume=bool(resume), watch=observe)
    say(f"{summary['state']} after round {summary['rounds']}, state {summary['state_digest']}; see {run}")


def bind_source(source: str) -> Recipe:
    """Return the recipe of a source; one without a table `data` is whole here, for the data lie at the sites.

    Raises:
        ConfigError: with every fault, or if it is a relative path: a SuperLink's working directory says nothing.
    """
    if "\n" not in source and not Path(source).is_absolute():
        raise ConfigError(Fault("recipe", RECIPE, repr(source), "write the path in full"))
    return data_at_sites(source)


def check_demo(clients: Collection[str]) -> None:
    """Refuse to run the demo with clients that have data of their own: nothing says how they are to train.

    Raises:
        ConfigError: if one of them is not the demo's.
    """
    if strangers := sorted(set(clients) - demo_code.CLIENTS.keys()):
        raise ConfigError(Fault("recipe", RECIPE, f"none for the client {strangers[0]!r}", f"pass {HINT}"))


def run_name(resume: str) -> str:
    """Return the name of the run to resume, empty for none.

    Raises:
        ConfigError: if it is a path: `store` says where the runs lie.
    """
    if resume and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", resume):
        hint = "pass the folder that it lies in as store"
        raise ConfigError(Fault("resume", "the name of a run: letters, digits, '.', '_', '-'", repr(resume), hint))
    return resume


def directory(store: str, name: str) -> Path:
    """Return the run directory of a name below `store`; a SuperLink's working directory means nothing.

    Raises:
        ConfigError: if `store` is a relative path.
    """
    if store and not Path(store).is_absolute():
        raise ConfigError(Fault("store", "an absolute path on the server's host", repr(store), "write it in full"))
    return (Path(store) if store else home() / "runs") / name


def print_event(event: Event) -> None:
    """Print one line per event that matters; Flower streams it to those who follow the run."""
    match event:
        case RoundStarted(1, _, cohort):
            say(f"round 1 starts with {', '.join(cohort)}")
        case RoundFinished(record):
            # Round 0 is the base before any update.
            work = f"{record.used} of {len(record.cohort)} updates" if record.round else "the base"
            scores = scores_text(record) or losses_text(record)
            if scores or record.round:
                say(", ".join(part for part in (f"round {record.round}: {work}", scores, cost_text(record)) if part))
        case ClientFinished(round, Failure() as failure, _):
            say(f"round {round}: {failure.client} {failure.kind}: {failure.reason}")
        case Note(text):
            say(text)


def losses_text(record: RoundRecord) -> str:
    """Return the clients' mean loss before and after their steps; empty if unknown."""
    if record.loss_before is None or record.loss_after is None:
        return ""
    return f"the clients' loss {record.loss_before:.3f} before their steps and {record.loss_after:.3f} after"


def cost_text(record: RoundRecord) -> str:
    """Return what a round has sent and how long it took; empty for round 0, in which no client trains."""
    if not record.round:
        return ""
    return f"{bytes_text(record.bytes_up)} up, {bytes_text(record.bytes_down)} down, {record.seconds:.1f} s"


def say(text: str) -> None:
    """Print a line; what clients say in it is not obeyed by the terminal."""
    print(f"fedtune: {printable(text)}", flush=True)


app = server_app(run_app)
