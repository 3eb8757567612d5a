"""The command `fedtune export --edge`: a base as a bundle for devices, with its sizes and its distance from torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fedtune.cli.options import print_line

if TYPE_CHECKING:
    from fedtune.rounds.events import Event

MIB = 2**20
RUNTIMES = ("onnx", "gguf")


def export(source: Path, folder: Path, *, runtime: str, dtype: str | None, identity: Path | None) -> None:
    """Write a bundle with a line on stderr for each step, and say on stdout what is in it."""
    if runtime not in RUNTIMES:
        raise typer.BadParameter(f"expected one of {', '.join(RUNTIMES)}; got {runtime!r}", param_hint="--runtime")
    if runtime == "gguf":
        if dtype is not None:
            expected = "expected none for a GGUF file, whose weights stay as they are"
            raise typer.BadParameter(f"{expected}; got {dtype!r}", param_hint="--dtype")
        from fedtune.runs.edge_gguf import export_gguf_bundle

        written = export_gguf_bundle(str(source), folder, identity=identity, watch=show)
    else:
        from fedtune.runs.edge_bundle import export_bundle

        written = export_bundle(str(source), folder, dtype=dtype or "float32", identity=identity, watch=show)
    parts = ", ".join(f"{name} {size / MIB:,.1f} MiB" for name, size in written.sizes.items())
    typer.echo(f"{print_line(str(written.path))}: {parts}; losses within {written.difference:.1e} of torch's")
    if written.signer:
        typer.echo(f"signed by {written.signer}")
    else:
        typer.echo("not signed: devices refuse it until a coordinator has run fedtune sign on it")


def show(event: Event) -> None:
    from fedtune.rounds.events import Note, Phase

    if isinstance(event, Note | Phase):
        typer.echo(f"{print_line(event.text)} ...", err=True)
