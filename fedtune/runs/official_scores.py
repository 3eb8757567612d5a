"""Official scores: lm-eval's own definitions of the benchmarks, asked of the exported model with local files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fedtune.errors import ConfigError, ExtraError, Fault
from fedtune.evaluation.multiple_choice import MMLU_INTRODUCTION, arc_row, mmlu_row
from fedtune.evaluation.tasks import TASKS, Asked, load
from fedtune.lora.virtual_tokens import are_virtual
from fedtune.rounds.events import Note, Phase, Watch
from fedtune.runs.export import export
from fedtune.runs.task_scores import Encoded, Values, check_names, needed, result, tokens_of
from fedtune.runs.task_target import Target, open_target

if TYPE_CHECKING:
    from fedtune.model.base import Base

DEFINITIONS: Mapping[str, str] = {
    "mmlu": "mmlu/default/_default_template_yaml",
    "arc": "arc/arc_easy.yaml",  # ARC-Challenge has the same but for its name
    "gsm8k": "gsm8k/gsm8k.yaml",
}
"""lm-eval's definition of each task, below its folder `tasks`."""
SHOTS: Mapping[str, int] = {"mmlu": 5, "arc": 0, "gsm8k": 5}
"""Shots where the user names none: of MMLU those of its paper, of the others lm-eval's own."""


def score_officially(
    source: str,
    names: Sequence[str],
    *,
    data: Mapping[str, Path],
    base: str | None = None,
    shots: Mapping[str, int] | None = None,
    limit: int | None = None,
    new_tokens: int = 256,
    batch: int = 8,
    watch: Watch = lambda event: None,
) -> Mapping[str, Any]:
    """Return what `score_tasks` returns, with every prompt, answer and comparison made by lm-eval.

    A run is exported as a merged model first, into a folder that is gone afterwards.

    Args:
        source, names, data, base, shots, limit, batch, watch: as of `score_tasks`.
        new_tokens: of an answer at most.

    Raises:
        ExtraError: if lm-eval is not installed.
        ConfigError: as `score_tasks`, and for a task without a definition of lm-eval's.
    """
    package = lm_eval_version()
    check_names(names, data, shots or {})
    if unknown := [name for name in names if name not in DEFINITIONS]:
        raise ConfigError(Fault("--official", f"tasks among {', '.join(DEFINITIONS)}", ", ".join(unknown)))
    counts = {name: (shots or {}).get(name, SHOTS[name]) for name in dict.fromkeys(names)}
    asked = [load(TASKS[name], data=data, shots=count, limit=limit) for name, count in counts.items()]
    target = open_target(source, base=base, watch=watch)
    cut = {part.task.name: num_too_long(part, target.speaker.base, new_tokens) for part, _ in asked}
    for name, count in cut.items():
        if count:
            watch(
                Note(f"{name}: {count} items are longer than {target.speaker.base.positions} tokens: lm-eval cuts them")
            )
    values: dict[str, dict[str, Values]] = {name: {} for name in counts}
    with TemporaryDirectory(prefix="fedtune-lm-eval-") as scratch:
        for view, tuned in target.views.items():
            model = model_arguments(source, target, tuned, Path(scratch) / "merged")
            for part, _ in asked:
                name = part.task.name
                watch(Phase(f"{name}, {view}: lm-eval {package}"))
                values[name][view] = ask(part, model, Path(scratch) / f"{name}-{view}", new_tokens, batch)
    results = {}
    for part, rows in asked:
        name = part.task.name
        facts = result(Encoded(part, part.items(), [], rows), values[name], new_tokens)
        results[name] = {**facts, "method": f"lm-eval {package}", "cut": cut[name]}
    return {"quick": False, "lm_eval": package, "target": source, **target.facts(), "tasks": results}


def num_too_long(asked: Asked, base: Base, new_tokens: int) -> int:
    """Return how many items do not fit the model: lm-eval drops the start of their prompts in silence."""
    tokens = tokens_of(asked, asked.items(), base)
    return sum(needed(item, new_tokens) > base.positions for item in tokens)


def lm_eval_version() -> str:
    """Return the version of the installed package.

    Raises:
        ExtraError: if there is none.
    """
    try:
        return version("lm-eval")
    except PackageNotFoundError:
        raise ExtraError(
            "--official: expected the package lm-eval; install the extra: pip install 'fedtune[eval]'"
        ) from None


def model_arguments(source: str, target: Target, tuned: bool, merged: Path) -> Mapping[str, Any]:
    """Return what lm-eval loads a model by: a folder, and an adapter beside it where one was given."""
    base = target.speaker.base
    device = {"device": str(base.device)}
    if not tuned:
        return device | {"pretrained": base.path}
    if not (Path(source) / "recipe.toml").is_file():
        return device | {"pretrained": base.path, "peft": source}
    if are_virtual(target.speaker.tuned.saved):  # no change of weights: there is nothing to merge
        return device | {"pretrained": base.path, "peft": str(export(source, form="peft", out=merged))}
    return device | {"pretrained": str(export(source, form="merged", out=merged))}


def ask(asked: Asked, model: Mapping[str, Any], folder: Path, new_tokens: int, batch: int) -> Values:
    """Return lm-eval's score of every item."""
    import lm_eval

    folder.mkdir()
    tasks = definitions(asked, folder)
    if asked.task.kind == "answer":
        for task in tasks:
            task["generation_kwargs"] = {**task["generation_kwargs"], "max_gen_toks": new_tokens}
    answered = lm_eval.simple_evaluate(
        model="hf",
        model_args=dict(model),
        tasks=tasks,
        num_fewshot=asked.shots,
        batch_size=batch,
        bootstrap_iters=0,
        log_samples=True,
    )
    return in_file_order(asked, answered["samples"])


def definitions(asked: Asked, folder: Path) -> list[dict[str, Any]]:
    """Return lm-eval's own definition of a task over local files, of MMLU one for each subject; write the files."""
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    name = asked.task.name
    own = dict(load_yaml(Path(lm_eval.__file__).parent / "tasks" / DEFINITIONS[name]))
    own |= {"dataset_path": "json", "dataset_name": None}
    shown = own.get("fewshot_split", own.get("training_split"))
    tasks = []
    for part in groups_of(asked):
        files = {own["test_split"]: write_rows(folder / f"{part}.jsonl", asked.task.name, rows_of(asked, part))}
        shot_rows = rows_of(asked, part, shots=True)
        files[shown] = write_rows(folder / f"{part}-shots.jsonl", name, shot_rows) if shot_rows else files["test"]
        if (other := own.get("validation_split")) is not None:
            files[other] = files[shown]
        task = own | {"dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")}}
        if name == "mmlu":
            subject = " ".join(part.split("_"))
            task |= {"task": f"mmlu_{part}", "description": MMLU_INTRODUCTION.format(subject=subject)}
        tasks.append(task)
    return tasks


def groups_of(asked: Asked) -> Sequence[str]:
    """Return the subjects of MMLU; of any other task, its name."""
    return sorted({subject_of(row) for row in asked.rows}) if asked.task.name == "mmlu" else [asked.task.name]


def subject_of(row: Any) -> str:
    return mmlu_row(row)[0]


def rows_of(asked: Asked, group: str, *, shots: bool = False) -> Sequence[Any]:
    """Return the rows of one subject, or all of them."""
    rows = asked.shot_rows if shots else asked.rows
    return [row for row in rows if asked.task.name != "mmlu" or subject_of(row) == group]


def write_rows(path: Path, name: str, rows: Sequence[Any]) -> str:
    """Write rows with the columns that lm-eval reads, and return the file."""
    lines = [json.dumps(columns(name, row)) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def columns(name: str, row: Any) -> Mapping[str, Any]:
    """Return one row as the data set has it, whatever names and types its file gives the columns."""
    if name == "mmlu":
        subject, _, gold = mmlu_row(row)
        return {"question": row.text("question"), "choices": row.values["choices"], "answer": gold, "subject": subject}
    if name == "arc":
        _, texts, gold = arc_row(row)
        labels = row.values["choices"]["label"]
        choices = {"text": [text[1:] for text in texts], "label": labels}
        return {"question": row.text("question"), "choices": choices, "answerKey": labels[gold]}
    return {"question": row.text("question", "instruction"), "answer": row.text("answer", "output")}


def in_file_order(asked: Asked, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Values:
    """Return each item's scores by measure, in the order of the file: lm-eval's are by subject."""
    if asked.task.kind == "answer":
        by_filter = {"strict": "strict-match", "flexible": "flexible-extract"}
        answered = sorted(samples[asked.task.name], key=lambda sample: int(sample["doc_id"]))
        return {
            measure: [float(sample["exact_match"]) for sample in answered if sample["filter"] == own]
            for measure, own in by_filter.items()
        }
    groups = (
        [subject_of(row) for row in asked.rows] if asked.task.name == "mmlu" else [asked.task.name] * len(asked.rows)
    )
    tasks = {group: f"mmlu_{group}" if asked.task.name == "mmlu" else "arc_easy" for group in set(groups)}
    waiting = {
        group: iter(sorted(samples[task], key=lambda sample: int(sample["doc_id"]))) for group, task in tasks.items()
    }
    in_order = [next(waiting[group]) for group in groups]
    measures = ["acc"] if asked.task.name == "mmlu" else ["acc", "acc_norm"]
    return {measure: [float(sample[measure]) for sample in in_order] for measure in measures}
