"""The command `fedtune merge`: PEFT adapters that people already have, as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.options import DebugOption, JsonOption, examples, report_errors
from fedtune.terminal.text import printable


def merge(
    adapters: Annotated[
        list[Path],
        typer.Argument(metavar="ADAPTER...", help="Folders in PEFT's format, or run directories.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.", show_default=False)],
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="Factor on each adapter; without it their mean.")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="Cut every layer to its best fit of this rank.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="NAME", help="The base of all, for adapters that name it differently.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the weighted sum of PEFT adapters as one PEFT adapter; no model is loaded.

    Ranks, alphas, rsLoRA, patterns and targets may differ. The sum is exact, and its rank the sum of the ranks; with
    --max-rank it is the best approximation of that rank, and the share of the squared singular values that is left is
    named.
    """
    with report_errors(debug):
        from fedtune.runs import merge as merge_module

        merged = merge_module.merge(adapters, out=out, weights=parse_weights(weights), max_rank=max_rank, base=base)
        for remark in merged.remarks:
            typer.echo(printable(remark), err=True)
        if as_json:
            facts = {"rank": merged.rank, "energy_kept": merged.energy_kept, "weights": list(merged.weights)}
            typer.echo(json.dumps({"path": str(merged.path), **facts}))
            return
        names = [path.name for path in adapters]
        # Folders of runs are often all named "adapter".
        shown = names if len(set(names)) == len(names) else [str(path) for path in adapters]
        sum_of = " + ".join(f"{weight:.4g} {name}" for weight, name in zip(merged.weights, shown, strict=True))
        left = "exact" if max_rank is None else f"{merged.energy_kept:.2%} of the squared singular values kept"
        typer.echo(f"{sum_of}: rank {merged.rank}, {left}", err=True)
        typer.echo(merged.path)


def parse_weights(text: str | None) -> list[float] | None:
    """Return the numbers of `0.5,0.3,0.2`."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"expected numbers with commas between, such as 0.5,0.3,0.2; got {text!r}", param_hint="--weights"
        ) from None


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(
        epilog=examples(
            "fedtune merge runs/a/adapter runs/b/adapter --out merged",
            "fedtune merge lora-1 lora-2 lora-3 --weights 0.5,0.3,0.2 --max-rank 16 --out merged",
        )
    )(merge)
