"""The command `fedtune site`: whether a site reaches its server, and its own file by asking."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.options import USAGE, DebugOption, examples, report_errors
from fedtune.terminal.text import printable

if TYPE_CHECKING:
    from fedtune.deployment.site_check import Check

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Set up a site of a federation: check its way to the server.",
)


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
