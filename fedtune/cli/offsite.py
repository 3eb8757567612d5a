"""Options of `fedtune export` for offsite tuning: emulators of a base, and tuned ends back in the true one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.cli.options import print_line, run_with_progress

MIB = 2**20
PANEL = "Emulators (--form emulator)"

FrontOption = Annotated[
    int | None,
    typer.Option(min=0, help="First blocks that stay whole, for clients to tune; 1.", rich_help_panel=PANEL),
]
BackOption = Annotated[
    int | None, typer.Option(min=0, help="Last blocks that stay whole, for clients to tune; 1.", rich_help_panel=PANEL)
]
DropOption = Annotated[
    float | None,
    typer.Option(
        help="Share of the blocks between them that is dropped, or of their heads and channels with --kind prune; 0.5.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
KindOption = Annotated[
    str | None,
    typer.Option(
        help="drop: fewer blocks (without it); prune: zeros for whole heads and channels; quantise: values of codes.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
SelectOption = Annotated[
    str | None,
    typer.Option(
        help="How places of evenly spread blocks become whole numbers: round (without it), or floor.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
CodesOption = Annotated[
    str | None,
    typer.Option(help="With --kind quantise: nf4 (without it) or int8.", show_default=False, rich_help_panel=PANEL),
]
DistillOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Public text, as data.source reads it, by which the middle is trained towards the true one.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
StepsOption = Annotated[
    int | None, typer.Option(min=1, help="Of --distill; 500.", show_default=False, rich_help_panel=PANEL)
]
RateOption = Annotated[
    float | None, typer.Option("--learning-rate", help="Of --distill; 1e-4.", show_default=False, rich_help_panel=PANEL)
]
LmWeightOption = Annotated[
    float | None,
    typer.Option(
        min=0, help="Of --distill: of the emulator's cross-entropy; 1.", show_default=False, rich_help_panel=PANEL
    ),
]
KdWeightOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Of --distill: of the middle's relative squared error; 30.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
BatchOption = Annotated[
    int | None, typer.Option(min=1, help="Of --distill: rows of a step; 8.", show_default=False, rich_help_panel=PANEL)
]
SeedOption = Annotated[
    int | None,
    typer.Option(min=0, help="Of --distill: of the order of the rows; 0.", show_default=False, rich_help_panel=PANEL),
]
PlugBackOption = Annotated[
    str | None,
    typer.Option(
        "--plug-back",
        metavar="BASE",
        help="Of a run over an emulator: write its tuned ends as a change of this base, the true one, and score both.",
        show_default=False,
    ),
]
FullOption = Annotated[
    Path | None,
    typer.Option(
        "--full",
        metavar="RUN",
        help="With --plug-back: a run over the true base, scored beside it.",
        show_default=False,
    ),
]
NoScoresOption = Annotated[bool, typer.Option("--no-scores", help="With --plug-back: score nothing.")]


def check_options(
    *, form: str | None, emulator: Mapping[str, object], distill: Mapping[str, object], text: Path | None
) -> None:
    """Refuse options of emulators that need another one beside them.

    Raises:
        typer.BadParameter: naming the option.
    """
    for option, value in {**emulator, **distill, "--distill": text}.items():
        if form != "emulator" and value is not None:
            raise typer.BadParameter("expected --form emulator beside it", param_hint=option)
    for option, value in distill.items():
        if text is None and value is not None:
            raise typer.BadParameter("expected --distill FILE beside it", param_hint=option)
    if emulator.get("--codes") is not None and emulator.get("--kind") != "quantise":
        raise typer.BadParameter("expected --kind quantise beside it", param_hint="--codes")
    if emulator.get("--drop") is not None and emulator.get("--kind") == "quantise":
        raise typer.BadParameter("expected none with --kind quantise, which keeps every block", param_hint="--drop")


def check_plug_back(plugging: bool, *, needed: Mapping[str, object], apart: Mapping[str, object]) -> None:
    """Refuse options that need --plug-back, or exclude it.

    Raises:
        typer.BadParameter: naming the option.
    """
    for option, value in needed.items():
        if not plugging and value is not None:
            raise typer.BadParameter("expected --plug-back BASE beside it", param_hint=option)
    for option, value in apart.items():
        if plugging and value is not None:
            raise typer.BadParameter("expected no --plug-back beside it", param_hint=option)


def refuse_beside_emulator(others: Mapping[str, object]) -> None:
    """Refuse options of runs' results with --form emulator, which is of a base.

    Raises:
        typer.BadParameter: naming the option.
    """
    for option, value in others.items():
        if value is not None:
            raise typer.BadParameter("expected none with --form emulator", param_hint=option)


def named_settings(options: Mapping[str, object]) -> dict[str, Any]:
    """Return the options that were given, by the names of settings."""
    return {
        option.removeprefix("--").replace("-", "_"): value for option, value in options.items() if value is not None
    }


def write_emulator(
    source: Path,
    out: Path | None,
    *,
    emulator: Mapping[str, object],
    distill: Mapping[str, object],
    text: Path | None,
    dtype: str | None,
) -> None:
    """Write an emulator, and say on stdout what is in it."""
    if out is None:
        raise typer.BadParameter("expected a folder for the emulator", param_hint="--out")
    from fedtune.model.distill import DistillSettings
    from fedtune.runs.emulator import EmulatorSettings, export_emulator

    seed = {"seed": distill["--seed"]} if distill.get("--seed") is not None else {}
    settings = EmulatorSettings(**named_settings(emulator), **seed)  # type: ignore[arg-type]
    course = DistillSettings(**named_settings({name: value for name, value in distill.items() if name != "--seed"}))
    written = run_with_progress(
        "emulator",
        True,
        lambda watch: export_emulator(source, out, settings, dtype=dtype, text=text, distill=course, watch=watch),
    )
    facts = written.facts
    size = sum(file.stat().st_size for file in out.glob("*.safetensors")) / MIB
    typer.echo(
        f"{print_line(str(written.path))}: blocks {', '.join(map(str, facts.layers))} of {facts.base_blocks}, "
        f"{written.parameters:,} of {written.base_parameters:,} weights, {size:,.1f} MiB"
    )
    typer.echo(
        f'recipes for it: base = this folder, adapter.layers = "{facts_word()}"; digest {facts.digests["float32"]}'
    )


def facts_word() -> str:
    from fedtune.model.emulator_facts import ENDS

    return ENDS


def write_plugged_back(
    run: Path,
    base: str,
    *,
    form: str | None,
    out: Path | None,
    max_rank: int | None,
    dtype: str | None,
    round: str | None,
    full: Path | None,
    with_scores: bool,
) -> None:
    """Write tuned ends as a change of the true base, and print the scores side by side."""
    from fedtune.runs.plug_back import plug_back

    written = run_with_progress(
        "plug-back",
        True,
        lambda watch: plug_back(
            run,
            base,
            form=form,
            out=out,
            max_rank=max_rank,
            dtype=dtype,
            round=round,
            full=full,
            with_scores=with_scores,
            watch=watch,
        ),
    )
    for name, scores in written.scores.items():
        others = "".join(f"  {key} {scores[key]:.3f}" for key in ("perplexity", "accuracy") if key in scores)
        typer.echo(f"{name:<15} loss {scores['loss']:.4f}{others}")
    if written.gives_away:
        typer.echo(
            "the tuned emulator scores as well as the true base with the tuned ends: it gives the model away; "
            "drop more, or distil less",
            err=True,
        )
    typer.echo(print_line(str(written.path)))
