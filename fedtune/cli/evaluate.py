"""The command `fedtune evaluate`: a run on its own test data, or any model on benchmarks from local files."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.cli.options import (
    DebugOption,
    JsonOption,
    QuietOption,
    examples,
    print_line,
    report_errors,
    run_with_progress,
)
from fedtune.terminal.console import console


def evaluate(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Run directory, e.g. runs/demo. With --tasks also a PEFT adapter, a merged model, or any base.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Other test data, with the columns of the recipe's. With --tasks: TASK=PATH, a benchmark's file or "
            "folder, and TASK.shots=FILE, the rows to show; may be given again.",
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--examples", min=1, help="Score so many examples; all without it.")
    ] = None,
    ratio: Annotated[
        list[float] | None,
        typer.Option(
            min=0, max=0.875, help="Pruning ratio to score at, in place of what devices get; may be given again."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Benchmarks with commas between: mmlu, arc, gsm8k, humaneval; of a run also loss, rouge, clients.",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="NAME", help="Base of an adapter, in place of the one that it names.")
    ] = None,
    shots: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[TASK=]N",
            help="Answered questions before each one, in place of the benchmark's own number; may be given again.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask so many items of each task, drawn but always the same.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a generated answer at most.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Items per forward pass of --tasks.")] = 8,
    skip_long: Annotated[
        bool, typer.Option("--skip-long", help="Leave out items longer than the model's positions, and count them.")
    ] = False,
    official: Annotated[
        bool,
        typer.Option("--official", help="Have lm-eval (the extra `eval`) ask the --tasks of the exported model."),
    ] = False,
    allow_code: Annotated[
        bool,
        typer.Option("--allow-code-execution", help="Let --tasks humaneval run the programs that the model writes."),
    ] = False,
    samples: Annotated[int, typer.Option(min=1, max=1000, help="Programs of each problem of humaneval.")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, max=10, help="Of sampling programs; without it greedy for one sample, 0.8 for more."),
    ] = None,
    unconfined: Annotated[
        bool, typer.Option("--unconfined", help="Run programs also where they cannot be kept from network and files.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the scores of --tasks here, as JSON.")
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Score a run's base and its adapter on the recipe's test data or another file, or a model on benchmarks.

    Of a run with pruning also: the whole model beside those that devices get, with their size and the time of a forward
    pass, and each client's held-out rows in the structure that it trained.

    With --tasks the questions are read from local files. Scores are quick ones: each with its 95 % interval, before
    beside after on the same items; an item that does not fit the model is an error. --official scores are lm-eval's.
    """
    with report_errors(debug):
        if tasks is None:
            refuse_without_tasks(
                {
                    "--base": base,
                    "--shots": shots,
                    "--limit": limit,
                    "--output": output,
                    "--official": official or None,
                    "--skip-long": skip_long or None,
                    "--allow-code-execution": allow_code or None,
                    "--temperature": temperature,
                    "--unconfined": unconfined or None,
                }
            )
            score_run(target, data or (), rows, ratio or (), as_json)
            return
        if rows is not None or ratio:
            option = "--ratio" if ratio else "--examples"
            raise typer.BadParameter("expected none with --tasks; use --limit, or export the model", param_hint=option)
        if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
            raise typer.BadParameter(f"expected a file in a folder that is there; got {output}", param_hint="--output")
        if official and (allow_code or unconfined or temperature is not None or samples != 1):
            hint = "--samples, --temperature, --allow-code-execution, --unconfined"
            raise typer.BadParameter("expected none with --official, which runs no programs", param_hint=hint)
        if official and skip_long:
            raise typer.BadParameter("expected none with --official: lm-eval cuts long items", param_hint="--skip-long")
        from fedtune.evaluation.sandbox import Limits
        from fedtune.runs.code_scores import CodeSettings
        from fedtune.runs.official_scores import score_officially
        from fedtune.runs.task_scores import score_tasks

        code = CodeSettings(allow_code, samples, temperature, Limits(confined=not unconfined))
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        scores = run_with_progress(
            "evaluate",
            quiet,
            lambda watch: (score_officially if official else partial(score_tasks, skip_long=skip_long, code=code))(
                str(target),
                names,
                data={task: Path(path) for task, path in pairs(data or (), "--data", "TASK=PATH").items()},
                base=base,
                shots=numbers_of(shots or (), names),
                limit=limit,
                new_tokens=new_tokens,
                batch=batch,
                watch=watch,
            ),
        )
        print_scores(scores, output, as_json)


def print_scores(scores: Mapping[str, Any], output: Path | None, as_json: bool) -> None:
    """Print benchmark scores as a table or as JSON, and write them to a file if there is one."""
    from fedtune.terminal.task_table import remarks, task_table

    if as_json:
        typer.echo(json.dumps(scores))
    else:
        console(sys.stdout).print(task_table(scores))
        for line in remarks(scores):
            typer.echo(line)
    if output is not None:
        from fedtune.store.files import write_text

        write_text(output, json.dumps(scores, indent=2) + "\n")


def score_run(run: Path, data: Sequence[str], examples: int | None, ratios: Sequence[float], as_json: bool) -> None:
    """Score a run on its test data or another file, and print what that gives."""
    from fedtune import api
    from fedtune.runs.pruned_scores import views as score_views
    from fedtune.runs.trained_run import has_shared_ranking
    from fedtune.store import result
    from fedtune.terminal.summary import client_views, comparison, views

    if len(data) > 1:
        raise typer.BadParameter(f"expected one file; got {len(data)}", param_hint="--data")
    path = Path(data[0]) if data else None
    scores: dict[str, Any] = dict(api.evaluate(run, data=path, examples=examples))
    if remark := result.remark(run):
        typer.echo(print_line(remark), err=True)
    if path is None and has_shared_ranking(run):
        scores["views"] = run_with_progress(
            "evaluate",
            True,
            lambda watch: score_views(run, ratios=ratios or None, examples=examples, watch=watch),
        )
    elif ratios:
        got = "--data" if path is not None else "a run without [pruning], or with the policy local"
        raise typer.BadParameter(
            f"expected a run with [pruning] and one ranking for all, and no --data; got {got}; leave --ratio out",
            param_hint="--ratio",
        )
    if as_json:
        typer.echo(json.dumps(scores))
        return
    out = console(sys.stdout)
    out.print(comparison(scores["before"], scores["after"]))
    if "views" in scores:
        out.print(views(scores["views"]))
        if scores["views"]["clients"]:
            out.print(client_views(scores["views"]["clients"]))


def refuse_without_tasks(options: Mapping[str, object]) -> None:
    """Refuse options that only benchmarks have."""
    for option, value in options.items():
        if value is not None and value != []:
            raise typer.BadParameter("expected --tasks beside it; got none", param_hint=option)


def pairs(values: Sequence[str], option: str, form: str) -> Mapping[str, str]:
    """Return what stands after the sign of equality, by what stands before it."""
    result: dict[str, str] = {}
    for value in values:
        name, sign, rest = value.partition("=")
        if not (name and sign and rest) or name in result:
            expected = f"{form} once for each task" if name in result else form
            raise typer.BadParameter(f"expected {expected}; got {value!r}", param_hint=option)
        result[name] = rest
    return result


def numbers_of(values: Sequence[str], names: Sequence[str]) -> Mapping[str, int]:
    """Return the number of shots of each task: a number alone is of all tasks."""
    every = [value for value in values if value.isdecimal()]
    named = pairs([value for value in values if not value.isdecimal()], "--shots", "N or TASK=N")
    if len(every) > 1 or not all(number.isdecimal() and len(number) < 4 for number in (*every, *named.values())):
        raise typer.BadParameter(f"expected N or TASK=N, from 0 to 999; got {values}", param_hint="--shots")
    return {name: int(number) for number in every for name in names} | {k: int(v) for k, v in named.items()}


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        epilog=examples(
            "fedtune evaluate runs/demo",
            "fedtune evaluate runs/demo --data other.jsonl --json",
            "fedtune evaluate runs/demo --tasks mmlu,gsm8k --data mmlu=data/mmlu --data gsm8k=data/gsm8k",
            "fedtune evaluate my-adapter --base models/tiny-llama --tasks arc --data arc=ARC-Easy --shots 0",
        )
    )(evaluate)
