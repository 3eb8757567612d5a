"""What the commands of `fedtune-edge` share: its name, its exit statuses, and the device's own file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAM = "fedtune-edge"
TRAIN = "_train"
"""The hidden command of the process that trains: a frozen program has no other way to start a module of its own."""
SITE = Path("site.toml")
DONE, USAGE, RETRY, INTERRUPTED = 0, 2, 75, 130
"""Exit statuses: all is well; something must be changed; try again later (EX_TEMPFAIL of sysexits.h); Ctrl-C."""


def add_site(own: argparse.ArgumentParser) -> None:
    """Add the device's own file to a command's arguments."""
    own.add_argument("site", metavar="SITE", nargs="?", type=Path, default=SITE, help=f"this device's file ({SITE})")


def expect_site(path: Path) -> None:
    """Check that there is this device's own file, in words for its owner.

    Raises:
        ConfigError: if there is none.
    """
    from fedtune.errors import ConfigError, Fault

    if not path.is_file():
        hint = f"{PROGRAM} enroll CODE --server HOST writes one; one elsewhere is named in this command"
        raise ConfigError(Fault("", f"this device's file {path}", "no such file", hint))


def train_command() -> Sequence[str]:
    """Return the command line that starts the process that trains, but for its last arguments."""
    if getattr(sys, "frozen", False):
        return (sys.executable, TRAIN)
    return (sys.executable, "-m", "fedtune.cli.edge", TRAIN)


def ask(question: str) -> bool:
    """Ask the person at the terminal, and return whether the answer is yes; without one it is no."""
    if not sys.stdin.isatty():
        return False
    print(question, end=" [y/N] ", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
