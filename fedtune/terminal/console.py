"""Where tables and progress are written: a terminal, or plain text without blanks at the ends of lines."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


class PlainText:
    """A file that leaves out the blanks with which tables fill their lines."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, text: str) -> int:
        """Write a text; whole lines at a time, as Rich does."""
        return int(self._file.write(re.sub(r"[ \t]+(?=\n|$)", "", text)))

    def flush(self) -> None:
        self._file.flush()

    def isatty(self) -> bool:
        return False


def console(file: Any) -> Console:
    """Return a console that colours and redraws on a terminal alone, notebooks included among the others."""
    # Imported here: the help of a command needs none of it.
    from rich.console import Console

    if file.isatty():
        return Console(file=file, highlight=False)
    # Rich guesses 80 columns where there is no terminal, and would fold tables that are piped into a file.
    return Console(file=PlainText(file), highlight=False, width=120, force_jupyter=False)  # type: ignore[arg-type]
