"""Generated programs, each in a process of its own with limits, and what became of it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeAlias

from fedtune.errors import ConfigError, Fault
from fedtune.evaluation import confined

Outcome: TypeAlias = Literal["passed", "failed", "timeout", "memory"]


@dataclass(frozen=True)
class Limits:
    """What one program may take."""

    seconds: int = 5
    """Of processor time."""
    clock_seconds: float = 10.0
    """By the clock."""
    memory_bytes: int = 2**30
    """Of address space."""
    confined: bool = True
    """Whether it runs without a network, in a file system that it cannot write to. Without that it may do whatever this
    user may."""


def run_program(program: str, limits: Limits) -> Outcome:
    """Run a program in a process of its own, and say what became of it.

    Its output is dropped. A program counts as passed only where it ran through: one that ends itself has failed.

    Raises:
        ConfigError: if it cannot be confined here; nothing was run.
    """
    # Known to the process that runs the program, not to the program: what it prints cannot pass for an outcome.
    mark = secrets.token_hex(16)
    order = json.dumps(
        {
            "program": program,
            "mark": mark,
            "confined": limits.confined,
            "memory_bytes": limits.memory_bytes,
            "seconds": limits.seconds,
        }
    )
    with (
        TemporaryDirectory(prefix="fedtune-program-") as folder,
        subprocess.Popen(
            [sys.executable, "-I", "-B", str(Path(confined.__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "LANG": "C.UTF-8"},
            start_new_session=True,
        ) as process,
    ):
        try:
            answer, _ = process.communicate(order.encode(), timeout=limits.clock_seconds)
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:
            # Whatever ends this block, Ctrl-C included: the program, and all that it started in its session.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == confined.NOT_CONFINED:
        expected = "a kernel that lets this user run programs without a network (user namespaces)"
        hint = "allow them, or accept that generated programs may do whatever you may: --unconfined"
        raise ConfigError(Fault("--allow-code-execution", expected, "one that refuses", hint))
    return read_outcome(answer, mark, process.returncode)


def check_confinement(limits: Limits) -> None:
    """Refuse to go on where programs cannot be run as the limits say, before any model is loaded.

    Raises:
        ConfigError: if a program that does nothing does not pass.
    """
    if (outcome := run_program("", limits)) != "passed":
        expected = "a machine on which an empty program runs within the limits (Linux)"
        raise ConfigError(Fault("--allow-code-execution", expected, f"one on which it has {outcome!r}"))


def read_outcome(answer: bytes, mark: str, status: int) -> Outcome:
    """Return what the process said after the mark; without a word, what its exit status says."""
    word = answer.decode(errors="replace").partition(f"{mark} ")[2]
    for outcome in ("passed", "failed", "memory"):
        if word == outcome:
            return outcome
    if status == confined.OUT_OF_TIME:
        return "timeout"
    return "memory" if status == confined.OUT_OF_MEMORY else "failed"
