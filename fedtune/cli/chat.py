"""The command `fedtune chat`: questions to a tuned model, from a terminal or from a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.cli.options import DebugOption, JsonOption, examples, report_errors
from fedtune.terminal.text import printable

if TYPE_CHECKING:
    from fedtune.rounds.events import Event
    from fedtune.runs.chat import Ask, Speaker

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


def chat(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Run directory, or folder of a PEFT adapter.", show_default=False),
    ],
    base: Annotated[
        str | None, typer.Option(metavar="NAME", help="Base model, in place of the one that run or adapter names.")
    ] = None,
    both: Annotated[bool, typer.Option("--both", help="Answer with the base too, before the tuned model.")] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message of the conversation.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 256,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Talk to a tuned model; each question is written by the template that the training used.

    Answers are greedy, and appear as they are generated. From a pipe each line is a question of its own, and each
    answer one paragraph, or with --json one line with the question and the answers.
    """
    with report_errors(debug):
        from fedtune.runs import chat as chat_module

        interactive = sys.stdin.isatty() and not as_json
        if interactive:
            typer.echo("loading PyTorch and the base ...", err=True)
        speaker = chat_module.open_speaker(source, base=base, watch=write_note)
        if both and speaker.tuned.seeds is not None:
            raise typer.BadParameter("expected a run of adapters; got one of seeds", param_hint="--both")
        with Talk(speaker, both=both, system=system, new_tokens=new_tokens) as talk:
            if interactive:
                converse(talk)
            else:
                answer_lines(talk, as_json)


class Talk:
    """A conversation with the tuned model, and beside it one with its base."""

    def __init__(self, speaker: Speaker, *, both: bool, system: str | None, new_tokens: int) -> None:
        self._speaker, self._system, self._new_tokens = speaker, system, new_tokens
        self.names = ("base", "tuned") if both else ("tuned",)
        self._voices = ExitStack()
        self._asks: dict[str, Ask] = {}
        self._turns: dict[str, list[Mapping[str, str]]] = {}
        self.reset()

    def __enter__(self) -> Talk:
        if len(self.names) == 1:  # two voices share one base: each takes it for its answer alone
            self._asks["tuned"] = self._voices.enter_context(self._voice("tuned"))
        return self

    def __exit__(self, *error: Any) -> None:
        self._voices.close()

    def _voice(self, name: str) -> Any:
        from fedtune.runs.chat import voice

        return voice(self._speaker, tuned=name == "tuned", new_tokens=self._new_tokens)

    def reset(self) -> None:
        """Forget the conversation."""
        start = [{"role": "system", "content": self._system}] if self._system else []
        self._turns = {name: list(start) for name in self.names}

    def ask(self, name: str, question: str, write: Callable[[str], None], *, stoppable: bool = False) -> str:
        """Return one model's answer; a stoppable one ends early at Ctrl-C, and what was written until then counts."""
        turns, pieces = [*self._turns[name], {"role": "user", "content": question}], list[str]()

        def note(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        with ExitStack() as stack, suppress(*([KeyboardInterrupt] if stoppable else [])):
            speak = self._asks[name] if name in self._asks else stack.enter_context(self._voice(name))
            speak(turns, note)
        answer = "".join(pieces)
        if self._speaker.remembers:
            self._turns[name] = [*turns, {"role": "assistant", "content": answer}]
        return answer


def write_note(event: Event) -> None:
    """Write a remark to standard error; steps are not shown."""
    from fedtune.rounds.events import Note

    if isinstance(event, Note):
        typer.echo(printable(event.text), err=True)


def converse(talk: Talk) -> None:
    """Ask on the terminal until the user ends it."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` its history and its line editing
    typer.echo(HELP, err=True)
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if question in ("/exit", "/quit"):
            return
        if question == "/reset":
            talk.reset()
        elif question:
            for name in talk.names:
                if len(talk.names) > 1:
                    typer.secho(f"{name}:", bold=True)
                talk.ask(name, question, write_piece, stoppable=True)
                typer.echo()


def write_piece(piece: str) -> None:
    typer.echo(printable(piece, lines=True), nl=False)
    sys.stdout.flush()


def answer_lines(talk: Talk, as_json: bool) -> None:
    """Answer each line of standard input by itself."""
    for question in questions():
        talk.reset()
        if as_json:
            answers = {name: talk.ask(name, question, lambda piece: None) for name in talk.names}
            typer.echo(json.dumps({"question": question, **answers}, ensure_ascii=False))
            continue
        for name in talk.names:
            if len(talk.names) > 1:
                typer.echo(f"{name}: ", nl=False)
            talk.ask(name, question, write_piece)
            typer.echo("\n")


def questions() -> Iterator[str]:
    """Yield the lines of standard input that hold a question."""
    yield from (line.strip() for line in sys.stdin if line.strip())


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        epilog=examples(
            "fedtune chat runs/demo",
            "fedtune chat runs/demo --both",
            "fedtune chat my-adapter --base models/tiny-llama",
            "fedtune chat runs/demo --json < questions.txt",
        )
    )(chat)
