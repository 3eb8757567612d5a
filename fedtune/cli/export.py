"""The command `fedtune export`: a run's result for others to load, or a base as a bundle for devices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli import offsite
from fedtune.cli.options import DebugOption, examples, print_line, report_errors, run_with_progress

if TYPE_CHECKING:
    from fedtune.rounds.events import Event

MIB = 2**20
RUNTIMES = ("onnx", "gguf")
EXAMPLES = examples(
    "fedtune export runs/demo",
    "fedtune export runs/demo --form merged --out my-model",
    "fedtune export runs/demo --round last --out last",
    "fedtune export runs/demo --form uniform --max-rank 16",
    "fedtune export runs/notes --client hospital-b",
    "fedtune export runs/dolly-kseed --form ledger",
    "fedtune export runs/smollm2-135m --form flowertune --out submission",
    "fedtune export runs/fedspine --deploy",
    "fedtune export runs/fedspine --deploy --ratio 0.25 --ratio 0.5 --out models",
    "fedtune export models/smollm2 --form emulator --front 2 --back 2 --drop 0.5 --distill public.jsonl --out emulator",
    "fedtune export runs/offsite --plug-back models/smollm2",
    "fedtune export recipe.toml --edge bundle --identity server/identity",
    "fedtune export models/smollm2 --edge bundle --dtype int8",
    "fedtune export smollm2.Q4_K_M.gguf --edge bundle --runtime gguf",
)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=EXAMPLES)(export)


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Run directory, e.g. runs/demo; with --edge or --form emulator also a recipe, or a base by its folder "
            "or name.",
            show_default=False,
        ),
    ],
    form: Annotated[
        str | None,
        typer.Option(
            help="peft: adapter with a rank per layer; uniform: the same padded to one rank; merged: a whole model; "
            "ledger: the seeds of a FedKSeed run; flowertune: a folder to submit to the FlowerTune leaderboard; "
            "emulator: of a base, for clients that must not have all of it. "
            "Without it peft, or merged for a run of seeds.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder instead of RUN/FORM.")] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="Cut every layer to its best fit of this rank.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of a merged model: float32, bfloat16 or float16; the base's without it. With --edge: float32 or int8."
        ),
    ] = None,
    round: Annotated[
        str | None, typer.Option(help="best or last; the round that the recipe keeps (rounds.keep) without it.")
    ] = None,
    client: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of a run with [personal]: this client's own model, into RUN/FORM-NAME."),
    ] = None,
    deploy: Annotated[
        bool, typer.Option("--deploy", help="Of a run with pruning: the smaller model that each kind of device gets.")
    ] = False,
    ratio: Annotated[
        list[float] | None, typer.Option(help="With --deploy: ratios to write in place of what the devices trained.")
    ] = None,
    edge: Annotated[
        Path | None,
        typer.Option("--edge", metavar="DIR", help="Write the base as a bundle for devices without torch into DIR."),
    ] = None,
    identity: Annotated[
        Path | None,
        typer.Option("--identity", metavar="DIR", help="With --edge: the coordinator's keys, which sign the bundle."),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="With --edge: onnx (the default), or gguf for a base that is a GGUF file, which stays as it is."
        ),
    ] = None,
    plug_back: offsite.PlugBackOption = None,
    full: offsite.FullOption = None,
    no_scores: offsite.NoScoresOption = False,
    front: offsite.FrontOption = None,
    back: offsite.BackOption = None,
    drop: offsite.DropOption = None,
    kind: offsite.KindOption = None,
    select: offsite.SelectOption = None,
    codes: offsite.CodesOption = None,
    distill: offsite.DistillOption = None,
    steps: offsite.StepsOption = None,
    learning_rate: offsite.RateOption = None,
    lm_weight: offsite.LmWeightOption = None,
    kd_weight: offsite.KdWeightOption = None,
    batch: offsite.BatchOption = None,
    seed: offsite.SeedOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the result for others to load: a PEFT adapter, a whole merged model, pruned models, or the seeds.

    With --edge the base, before any tuning, for `fedtune-edge`: graph, weights, tokenizer and digests. Its losses are
    compared with torch's, at the base and around it, before anything is signed. Devices take bundles that a coordinator
    of their federation has signed.

    With --deploy, per pruning ratio: `recipe` (the kept indices and the adapter over the whole base), `model` (the
    smaller model, every block of its own width; `fedtune.load_pruned` reads it), and where all blocks are equally wide
    `stock`, which transformers loads by itself. `deploy.json` says which kind of device gets which.

    With --form emulator a model folder of a base's first and last blocks around fewer, pruned or quantised ones, which
    clients tune the ends of; --plug-back puts these into the true base, and prints its loss beside the emulator's.
    """
    emulator = {
        "--front": front,
        "--back": back,
        "--drop": drop,
        "--kind": kind,
        "--select": select,
        "--codes": codes,
    }
    distilling = {
        "--steps": steps,
        "--learning-rate": learning_rate,
        "--lm-weight": lm_weight,
        "--kd-weight": kd_weight,
        "--batch": batch,
        "--seed": seed,
    }
    offsite.check_options(form=form, emulator=emulator, distill=distilling, text=distill)
    offsite.check_plug_back(
        plug_back is not None,
        needed={"--full": full, "--no-scores": no_scores or None},
        apart={"--deploy": deploy or None, "--edge": edge},
    )
    check_options(
        edge=edge is not None,
        deploy=deploy,
        alone={"--identity": identity, "--runtime": runtime},
        forms={"--form": form, "--max-rank": max_rank},
        others={"--out": out, "--round": round, "--client": client},
        ratio=bool(ratio),
    )
    if client is not None and (deploy or plug_back is not None or form == "emulator"):
        raise typer.BadParameter("expected it beside --form peft, uniform or merged", param_hint="--client")
    with report_errors(debug):
        if form == "emulator":
            offsite.refuse_beside_emulator({"--max-rank": max_rank, "--round": round, "--plug-back": plug_back})
            offsite.write_emulator(run, out, emulator=emulator, distill=distilling, text=distill, dtype=dtype)
            return
        if plug_back is not None:
            offsite.write_plugged_back(
                run,
                plug_back,
                form=form,
                out=out,
                max_rank=max_rank,
                dtype=dtype,
                round=round,
                full=full,
                with_scores=not no_scores,
            )
            return
        if edge is not None:
            write_bundle(run, edge, runtime=runtime or "onnx", dtype=dtype, identity=identity)
            return
        from fedtune.runs import deploy as deploy_module
        from fedtune.runs import export as export_module

        if deploy:
            written = run_with_progress(
                "export",
                True,
                lambda watch: deploy_module.deploy(run, out=out, ratios=ratio or None, dtype=dtype, watch=watch),
            )
            typer.echo(written)
            return
        folder = run_with_progress(
            "export",
            True,
            lambda watch: export_module.export(
                run, form=form, out=out, max_rank=max_rank, dtype=dtype, round=round, client=client, watch=watch
            ),
        )
        typer.echo(folder)


def check_options(
    *,
    edge: bool,
    deploy: bool,
    alone: Mapping[str, object],
    forms: Mapping[str, object],
    others: Mapping[str, object],
    ratio: bool,
) -> None:
    """Refuse options that exclude or need each other.

    Args:
        edge: whether the base is written as a bundle.
        deploy: whether pruned models are written.
        alone: options of a bundle, by name.
        forms: options of the form of an adapter or a model.
        others: further ones that a bundle does not take.
        ratio: whether pruning ratios are given.

    Raises:
        typer.BadParameter: naming the option.
    """
    if not deploy and ratio:
        raise typer.BadParameter("expected --deploy beside it", param_hint="--ratio")
    for option, value in alone.items():
        if not edge and value is not None:
            raise typer.BadParameter("expected --edge beside it", param_hint=option)
    if edge and (deploy or any({**forms, **others}.values())):
        raise typer.BadParameter("expected no other form beside it: it writes the base alone", param_hint="--edge")
    if deploy and any(value is not None for value in forms.values()):
        raise typer.BadParameter("expected neither --form nor --max-rank beside it", param_hint="--deploy")


def write_bundle(source: Path, folder: Path, *, runtime: str, dtype: str | None, identity: Path | None) -> None:
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
