"""The command `fedtune site`: a site's own file by asking, and whether the site reaches its server."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.cli.options import USAGE, DebugOption, examples, report_errors
from fedtune.terminal.text import printable

if TYPE_CHECKING:
    from fedtune.deployment.site_check import Check
    from fedtune.deployment.site_init import Question

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Set up a site of a federation: write its own file by asking, and check its way to the server.",
)


@app.command(
    epilog=examples(
        "fedtune site init",
        "fedtune site init site.toml --server fl.example.org --data train.jsonl",
        "fedtune site init --name site-a --server fl.example.org:443 --base base --data train.jsonl --yes",
    )
)
def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The file to write.")] = Path("site.toml"),
    name: Annotated[str | None, typer.Option(help="Name under which this site is enrolled.")] = None,
    server: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Address of the coordinator.")] = None,
    proxy: Annotated[str | None, typer.Option(metavar="URL", help="HTTP proxy; environment; none.")] = None,
    identity: Annotated[str | None, typer.Option(metavar="DIR", help="Folder made by fedtune enroll.")] = None,
    base: Annotated[str | None, typer.Option(metavar="PATH", help="Folder or hub name of the base model.")] = None,
    targets: Annotated[str | None, typer.Option(metavar="NAMES", help="Layers that get an adapter.")] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="File or folder with this site's rows.")] = None,
    task: Annotated[str | None, typer.Option(metavar="TASK", help="causal or classification.")] = None,
    fields: Annotated[str | None, typer.Option(metavar="PART=COLUMN,...", help="Columns of the rows.")] = None,
    max_rounds: Annotated[str | None, typer.Option(metavar="N", help="Rounds of one run; all: no limit.")] = None,
    hours: Annotated[str | None, typer.Option(metavar="HH:MM-HH:MM", help="When work may begin; always.")] = None,
    max_memory_gib: Annotated[str | None, typer.Option(metavar="X", help="Memory of training; all: no limit.")] = None,
    ask: Annotated[str | None, typer.Option(metavar="YES", help="yes: a person must agree to each run; no.")] = None,
    scores: Annotated[str | None, typer.Option(metavar="HOW", help="Scores: send, keep or refuse.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: take the default of what is not given.")] = False,
    debug: DebugOption = False,
) -> None:
    """Write a site's own file by asking, each question with a default; what an option says is not asked.

    Answers may come through a pipe, one a line. Nothing is written before the last one, and no file is written over.
    """
    with report_errors(debug):
        from fedtune.deployment import site_init

        given = {"name": name, "server": server, "proxy": proxy, "identity": identity, "base": base}
        given |= {"targets": targets, "data": data, "task": task, "fields": fields, "max-rounds": max_rounds}
        given |= {"hours": hours, "max-memory-gib": max_memory_gib, "ask": ask, "scores": scores}
        site_init.check_free(file)
        answers: dict[str, Any] = {}
        for question in site_init.questions(file, os.environ):
            text = given[question.key]
            if text is not None or question.needed(answers):
                answers[question.key] = answer(question, text, answers, yes=yes)
            if question.key == "data":
                for remark in site_init.remarks(answers):
                    typer.echo(printable(remark), err=True)
        for written in site_init.write(file, answers):
            typer.echo(f"wrote {written}")
        for step in site_init.next_steps(file, answers):
            typer.echo(step)


def answer(question: Question, text: str | None, answers: dict[str, Any], *, yes: bool) -> Any:
    """Return the answer to a question: given, the default, or what a person or a pipe says, who is asked again."""
    from fedtune.errors import ConfigError, Fault

    default, asks = question.default(answers), text is None and not yes
    while True:
        if asks:
            text = read_line(question, default) or default
        try:
            chosen = default if text is None else text
            if question.needs and not chosen:
                hint = f"answer, or give --{question.key}"
                raise ConfigError(Fault(question.key, question.needs, "nothing", hint))
            return question.read(chosen, answers)
        except ConfigError as error:
            if not asks or not sys.stdin.isatty():
                raise
            typer.echo(f"  {printable(str(error))}", err=True)


def read_line(question: Question, default: str) -> str:
    """Return the line that is typed, or comes through a pipe, after the question has been shown on a terminal.

    Raises:
        ConfigError: at the end of the input.
    """
    from fedtune.errors import ConfigError, Fault

    if sys.stdin.isatty():
        typer.echo(f"{question.why}\n  {question.key}{f' [{default}]' if default else ''}: ", err=True, nl=False)
    if not (line := sys.stdin.readline()):
        hint = f"give --{question.key}, or --yes for the defaults"
        raise ConfigError(Fault(question.key, "an answer", "the end of the input", hint))
    return line.strip()


@app.command(
    epilog=examples(
        "fedtune site check site.toml",
        "fedtune site check --server fl.example.org:443 --proxy http://proxy.example.org:3128",
        "fedtune site check site.toml --json",
    )
)
def check(
    site: Annotated[
        Path | None, typer.Argument(metavar="[SITE]", help="This site's own file, in TOML.", show_default=False)
    ] = None,
    server: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Instead of link.address.")] = None,
    proxy: Annotated[
        str | None, typer.Option(metavar="URL", help="Instead of link.proxy; environment: that of HTTPS_PROXY.")
    ] = None,
    identity: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Identity folder instead of link.identity.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the steps as one JSON object.")] = False,
    debug: DebugOption = False,
) -> None:
    """Walk the way to the server step by step, one line each: name, port, proxy, TLS, HTTP/2, ...

    Needs no data and no model, and before a site is enrolled no identity. Ends with status 2 if a step fails.
    """
    with report_errors(debug):
        if site is None and server is None:
            raise typer.BadParameter("expected a SITE, or --server HOST:PORT", param_hint="SITE")
        from fedtune.deployment.site_check import check_site

        checks: list[Check] = []
        for result in check_site(site, server=server, proxy=proxy, identity=identity, environment=os.environ):
            checks.append(result)
            # What follows a step that failed says nothing further.
            if not as_json and not (result.state == "skipped" and any(each.state == "failed" for each in checks)):
                show(result)
        wrong = [one.step for one in checks if one.state == "failed"]
        if as_json:
            steps = [{**vars(one), "seconds": round(one.seconds, 3)} for one in checks]
            typer.echo(json.dumps({"ok": not wrong, "steps": steps}))
        else:
            typer.echo(verdict(site, wrong, enrolled=checks[-1].state == "ok"))
        if wrong:
            raise typer.Exit(USAGE)


def show(one: Check) -> None:
    """Print a step on a line, which a terminal gets folded under its text."""
    text = f"{one.step:10} {one.state:8} {printable(one.text)}"
    if one.seconds >= 0.001:
        text += f" ({1000 * one.seconds:.0f} ms)"
    if sys.stdout.isatty():
        width = os.get_terminal_size(sys.stdout.fileno()).columns
        text = textwrap.fill(text, max(40, width - 1), subsequent_indent=" " * 20, break_long_words=False)
    typer.echo(text)


def verdict(site: Path | None, wrong: list[str], *, enrolled: bool) -> str:
    if wrong:
        return f"failed: {', '.join(wrong)}; what comes after it was not tried"
    if not enrolled:
        return "the network lets the link through; next: fedtune enroll request"
    return f"every step succeeds; next: fedtune join {site or 'SITE'} --dry-run"
