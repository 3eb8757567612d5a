"""Every error that fedtune raises, as one tree.

    FedtuneError
      ConfigError   before anything starts; carries every fault at once
        TemporaryError  nothing must be changed: a server is away, or this clock is not set yet
      ExtraError    an optional package is missing; names the extra
      ShapeError    two tensors that must agree do not
      WireError     bytes from outside are not what they must be; names the client
      ClientError   this client cannot do its assignment; costs its update of one round
      RoundError    this round cannot be completed; names the round
      StoreError    a run directory cannot be read, written or trusted
        NotFiniteError  a server state holds numbers that are not finite

A message says what was expected, what came and what to do, in one sentence.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass


class FedtuneError(Exception):
    """The root: catch this to catch everything that fedtune raises on purpose."""


def expected_and_got(expected: str, got: str) -> str:
    """Return in words what was expected and what came, which may be the message of another error.

    >>> expected_and_got("a signed run", "none")
    'expected a signed run; got none'
    >>> expected_and_got("a signed run", "roster: expected a key; got none")
    'expected a signed run; roster: expected a key; got none'
    """
    # Else "got expected a key; got none", which does not say what came.
    inner = re.match(r"([^;]*: )?expected .*; got ", got)
    return f"expected {expected}; {got}" if inner else f"expected {expected}; got {got}"


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a recipe: its key, what was expected, what came, what to do."""

    path: str
    """Dotted path of the key, e.g. `method.max_rank`; empty if the fault concerns the whole file."""
    expected: str
    """Empty where `got` says everything, such as `unknown key`."""
    got: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        what = expected_and_got(self.expected, self.got) if self.expected else self.got
        hint = f"; {self.hint}" if self.hint else ""
        return f"{where}{what}{hint}"


class ConfigError(FedtuneError):
    """A recipe or an argument is wrong; raised before anything starts, with every fault at once."""

    def __init__(self, faults: Fault | Sequence[Fault], *, source: str = "") -> None:
        self.faults = (faults,) if isinstance(faults, Fault) else tuple(faults)
        self.source = source
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [str(fault) for fault in self.faults]
        if not self.source:
            return "\n".join(lines)
        count = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
        return "\n".join([f"{self.source}: {count}", *(f"  {line}" for line in lines)])


class TemporaryError(ConfigError):
    """Nothing must be changed, but time pass: a server is away, or this machine's clock is not set yet."""


class ExtraError(FedtuneError):
    """An optional package is missing; the message names the extra that brings it."""


class ShapeError(FedtuneError):
    """Two tensors that must agree in shape do not."""


class WireError(FedtuneError):
    """Bytes from outside are malformed, too large or not what was asked for."""


class ClientError(FedtuneError):
    """A client cannot do its assignment; becomes a `Failure` value and never ends the round."""


class RoundError(FedtuneError):
    """A round cannot be completed; `final` says that resuming the run cannot change it."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class StoreError(FedtuneError):
    """A run directory cannot be read, written or trusted."""


class NotFiniteError(StoreError):
    """A server state holds numbers that are not finite: it is neither stored nor handed on."""


PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN})
"""Errors of the operating system that end without a change to what was asked for: a full disk, too many files."""


def may_pass(error: BaseException) -> bool:
    """Return whether the same command may succeed later, with nothing changed: the disk is full, or a server away."""
    causes = (error, error.__cause__)
    return isinstance(error, TemporaryError) or any(
        isinstance(cause, OSError) and cause.errno in PASSING for cause in causes
    )


def type_of(value: object) -> str:
    """Return the type of a value in words.

    >>> type_of(3), type_of("x")
    ('an int', 'a str')
    """
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
