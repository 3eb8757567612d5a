"""What an error of one client's work becomes, the same on every engine: that client's failure, and no one else's."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

from fedtune.errors import FedtuneError
from fedtune.messages import OUT_OF_MEMORY, Failure

LONGEST = 500
"""Characters of a failure's reason, at most."""
LONGEST_QUOTE = 200
"""Characters of another program's message, at most."""
PACKAGE = Path(__file__).parents[1]
ENGINES = ("simulation", "flower", "link")
"""Folders that carry a client's work: their lines say nothing about it, and differ from engine to engine."""


def failure_of(client: str, error: BaseException, *, quote: bool = True) -> Failure:
    """Return the failure of a client whose work raised an error.

    fedtune's own errors speak for themselves. Any other one is given by its type, its message and the innermost line of
    fedtune that it passed, so that a fault of fedtune stays visible; `debug_traceback` shows the rest.

    Args:
        client: its name.
        error: whatever its work raised.
        quote: whether to give the message, which may contain data; not where it leaves the machine of the data.
    """
    if isinstance(error, FedtuneError):
        return Failure.from_text(client, one_line(str(error), longest=LONGEST))
    place = innermost_line(error)
    where = f" ({place})" if place else ""
    if isinstance(error, MemoryError):
        return Failure.from_text(
            client, f"{client}: expected its work to fit; {OUT_OF_MEMORY}{where}; lower client.batch or adapter.rank"
        )
    message = one_line(str(error), longest=LONGEST_QUOTE) if quote else ""
    kind = type(error).__name__ + (f": {message}" if message else "")
    hint = "" if quote else "; this client's own log says more"
    return Failure.from_text(client, f"{client}: expected an update; got {kind}{where}{hint}")


def innermost_line(error: BaseException) -> str:
    """Return the last line of fedtune that an error passed, as `fedtune/model/train.py:91`; empty if there is none."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE) and file.relative_to(PACKAGE).parts[0] not in ENGINES:
            place = f"fedtune/{file.relative_to(PACKAGE).as_posix()}:{line}"
    return place


def one_line(text: str, *, longest: int) -> str:
    """Return a text as one line without control characters, cut where it is too long."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= longest else f"{line[: longest - 4]} ..."


def debug_traceback(error: BaseException) -> None:
    """Print where an error was raised on stderr, if --debug or FEDTUNE_DEBUG asks for it."""
    if os.environ.get("FEDTUNE_DEBUG"):
        traceback.print_exception(error)
