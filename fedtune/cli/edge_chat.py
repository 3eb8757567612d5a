"""The command `fedtune-edge chat`: questions to the model that this device has helped to tune."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from fedtune.cli.edge_options import DONE, add_site, expect_site

if TYPE_CHECKING:
    from fedtune.edge.talk import Talk

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


def add_arguments(own: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_site(own)
    own.add_argument("--base", action="store_true", help="answer as the base does, without what was learned")
    own.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    own.add_argument("--new-tokens", metavar="N", type=positive, default=256, help="tokens of an answer at most (256)")
    own.add_argument("--json", action="store_true", help="a line of JSON with question and answer, for each line read")


def run(options: argparse.Namespace) -> int:
    """Answer questions from the terminal, or one for each line of a pipe."""
    from fedtune.edge.speaker import open_speaker
    from fedtune.edge.talk import Talk

    expect_site(options.site)
    interactive = sys.stdin.isatty() and not options.json
    speaker, notes = open_speaker(options.site, tuned=not options.base)
    for note in notes:
        print(note, file=sys.stderr)
    # Of bytes in another encoding the arguments hold what no text may.
    system = options.system and options.system.encode(errors="replace").decode()
    talk = Talk(speaker, system=system, new_tokens=options.new_tokens)
    if interactive:
        converse(talk)
    else:
        answer_lines(talk, sys.stdin, as_json=options.json)
    return DONE


def positive(text: str) -> int:
    """Return a number of at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1; got {number}")
    return number


def converse(talk: Talk) -> None:
    """Ask on the terminal until the user ends it."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` its history and its line editing
    print(HELP, file=sys.stderr)
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question in ("/exit", "/quit"):
            return
        if question == "/reset":
            talk.reset()
        elif question:
            # Of an answer that is stopped, what was written until then is remembered.
            with suppress(KeyboardInterrupt):
                write(talk.ask(question))
            print()


def write(pieces: Iterable[str]) -> None:
    """Write the pieces of an answer as they come."""
    from fedtune.terminal.text import printable

    for piece in pieces:
        print(printable(piece, lines=True), end="", flush=True)


def answer_lines(talk: Talk, lines: Iterable[str], *, as_json: bool) -> None:
    """Answer each line that holds a question by itself."""
    import json

    for line in lines:
        if not (question := line.strip()):
            continue
        talk.reset()
        if as_json:
            print(
                json.dumps({"question": question, "answer": "".join(talk.ask(question))}, ensure_ascii=False),
                flush=True,
            )
        else:
            write(talk.ask(question))
            print("\n", flush=True)
