"""The command `fedtune-edge join`: connect to the server, and take part."""

from __future__ import annotations

import argparse
import sys

from fedtune.cli.edge_options import DONE, add_site, ask, train_command

IDLE_S = 60.0
"""Seconds without work after which base and runtime leave the memory; state is read from the device's disk again."""


def add_arguments(own: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_site(own)
    own.add_argument("--server", metavar="HOST:PORT", help="instead of link.address of the file")
    own.add_argument("--dry-run", action="store_true", help="show what would be asked of this device, and do nothing")
    own.add_argument("--yes", action="store_true", help="agree to the recipe where policy.ask requires it")
    own.add_argument("--log", choices=("text", "json"), default="text", help="how events are written (text)")


def run(options: argparse.Namespace) -> int:
    """Take part until the run is complete, or show what that would mean."""
    from fedtune.cli.event_log import event_writer
    from fedtune.cli.stop_signals import until_signal
    from fedtune.deployment.join import join, no_terminal
    from fedtune.edge.enrolment import check_ready
    from fedtune.edge.recipe_check import check_recipe
    from fedtune.terminal.text import printable

    # Before the server hears of a device that has nothing to work with.
    check_ready(options.site, address=options.server)
    if options.dry_run:
        return show_dry_run(options)

    def agree(recipe: str) -> bool:
        print(printable(recipe, lines=True), file=sys.stderr)
        if not options.yes and not sys.stdin.isatty():
            raise no_terminal()
        return options.yes or ask("Take part in this run?")

    def work() -> None:
        join(
            options.site,
            server=options.server,
            record=event_writer(options.log),
            agree=agree,
            suits=check_recipe,
            command=train_command(),
            idle_s=IDLE_S,
        )

    until_signal(work)
    return DONE


def show_dry_run(options: argparse.Namespace) -> int:
    """Print what the server's run would ask of this device; returns 1 where its file does not allow that."""
    from fedtune.cli.dry_run import show
    from fedtune.deployment.join import dry_run
    from fedtune.edge.recipe_check import check_recipe

    shown = dry_run(options.site, server=options.server, suits=check_recipe)
    show(print, shown)
    return DONE if shown.allowed else 1
