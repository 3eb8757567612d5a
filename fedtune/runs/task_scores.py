"""Benchmarks asked of a model before and after its tuning: scores, intervals, and the change on the same items."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.errors import ConfigError, Fault
from fedtune.evaluation import gsm8k, intervals
from fedtune.evaluation.intervals import Estimate
from fedtune.evaluation.items import Problem, Question
from fedtune.evaluation.multiple_choice import choose
from fedtune.evaluation.sandbox import Outcome
from fedtune.evaluation.tasks import TASKS, Asked, load
from fedtune.rounds.events import Note, Phase, Watch
from fedtune.runs.chat import attach
from fedtune.runs.code_scores import CodeSettings, check_code, code_result, run_tests
from fedtune.runs.own_scores import OWN, open_scored_run, own_scores
from fedtune.runs.task_target import open_target

if TYPE_CHECKING:
    from fedtune.model.answers import Continuation
    from fedtune.model.base import Base

# torch and transformers take seconds to import, so `model` is imported where it is needed.

NO_CODE = CodeSettings()
"""No program is run."""
Values = Mapping[str, Sequence[float]]
"""By measure, the score of every item."""


@dataclass(frozen=True)
class Encoded:
    """A benchmark's items as the model reads them."""

    asked: Asked
    items: Sequence[Question] | Sequence[Problem]
    tokens: Sequence[Sequence[Continuation]] | Sequence[Sequence[int]]
    """Of each question its options after its prompt; of each problem its prompt."""
    rows: int
    """Of its file."""
    too_long: int = 0
    """Items left out because they do not fit the model's positions, where the user allowed it."""


def score_tasks(
    source: str,
    names: Sequence[str],
    *,
    data: Mapping[str, Path],
    base: str | None = None,
    shots: Mapping[str, int] | None = None,
    limit: int | None = None,
    new_tokens: int = 256,
    batch: int = 8,
    skip_long: bool = False,
    code: CodeSettings = NO_CODE,
    watch: Watch = lambda event: None,
) -> Mapping[str, Any]:
    """Ask benchmarks of a run, an adapter or a base, and return their scores as JSON has them.

    Args:
        source: run directory, folder of an adapter or model, or name of a base.
        names: of `TASKS`, and of a run also of `OWN`.
        data: by task its file or folder; by `TASK.shots` the rows to show. Of a run's own tasks other test data.
        base: of an adapter, or in place of a run's.
        shots: by task another number of shots than the benchmark's own.
        limit: items of each task at most.
        new_tokens: of an answer at most.
        batch: items per forward pass.
        skip_long: leave out items that do not fit the model's positions, and count them.
        code: how programs are sampled and run, and whether they may be.
        watch: called with each step.

    Raises:
        ConfigError: for a file, an option or an item that does not fit, before anything is scored.
    """
    check_names(names, data, shots or {})
    names = list(dict.fromkeys(names))
    check_code(code, names)
    asked = [
        load(TASKS[name], data=data, shots=(shots or {}).get(name), limit=limit) for name in names if name in TASKS
    ]
    own = [name for name in names if name in OWN]
    if own and base is not None:
        raise ConfigError(
            Fault("--base", f"none with --tasks {','.join(own)}", base, "the run's recipe names its base")
        )
    if own:
        target, experiment = open_scored_run(source, names, data, watch)
    else:
        target, experiment = open_target(source, base=base, watch=watch), None
    encoded = [encode(part, target.speaker.base, rows, new_tokens, skip_long) for part, rows in asked]
    for part in encoded:
        if part.too_long:
            positions = target.speaker.base.positions
            watch(Note(f"{part.asked.task.name}: {part.too_long} items are longer than {positions} tokens: left out"))
    values: dict[str, dict[str, Values]] = {part.asked.task.name: {} for part in encoded}
    outcomes: dict[str, Sequence[Sequence[Outcome]]] = {}
    for view, tuned in target.views.items():
        with attach(target.speaker, tuned=tuned) as net:
            for part in encoded:
                name = part.asked.task.name
                progress = steps(watch, f"{name}, {view}", len(part.items))
                if part.asked.task.kind == "code":
                    outcomes[view] = run_tests(
                        net,
                        target.speaker.base,
                        part.items,  # type: ignore[arg-type]
                        part.tokens,  # type: ignore[arg-type]
                        code,
                        new_tokens=new_tokens,
                        batch=batch,
                        progress=progress,
                    )
                    continue
                score = choices if part.asked.task.kind == "choice" else generated_answers
                values[name][view] = score(net, target.speaker.base, part, batch, new_tokens, progress)
    results = {
        part.asked.task.name: (
            {**facts_of(part, new_tokens), **code_result(outcomes, code)}
            if part.asked.task.kind == "code"
            else result(part, values[part.asked.task.name], new_tokens)
        )
        for part in encoded
    }
    if experiment is not None:
        results |= own_scores(target, experiment, own, limit=limit, new_tokens=new_tokens, batch=batch, watch=watch)
    facts = {"quick": True, "target": source, **target.facts()}
    return {**facts, "tasks": {name: results[name] for name in names}}


def check_names(names: Sequence[str], data: Mapping[str, Path], shots: Mapping[str, int]) -> None:
    """Refuse names of tasks that there are not, and options for tasks that are not asked."""
    known, faults = [*TASKS, *OWN], list[Fault]()
    if not names:
        faults.append(Fault("--tasks", f"names among {', '.join(known)}", "none"))
    faults += [Fault("--tasks", f"names among {', '.join(known)}", repr(name)) for name in names if name not in known]
    for option, keys in (("--data", data), ("--shots", shots)):
        others = [key for key in keys if key.removesuffix(".shots") not in names]
        faults += [Fault(option, f"a task of --tasks ({', '.join(names)})", repr(key)) for key in others]
    if faults:
        raise ConfigError(faults)


def encode(asked: Asked, base: Base, rows: int, new_tokens: int, skip_long: bool) -> Encoded:
    """Return a benchmark's items as tokens, and refuse those that do not fit unless they may be left out."""
    items = asked.items()
    tokens = tokens_of(asked, items, base)
    long = [needed(part, new_tokens) > base.positions for part in tokens]
    if any(long) and (all(long) or not skip_long):
        raise ConfigError(too_long(asked, base, sum(long), new_tokens))
    fitting = [place for place, excess in enumerate(long) if not excess]
    return Encoded(asked, [items[k] for k in fitting], [tokens[k] for k in fitting], rows, sum(long))  # type: ignore[arg-type]


def tokens_of(asked: Asked, items: Sequence[Any], base: Base) -> Sequence[Any]:
    """Return each item's tokens: see `Encoded.tokens`."""
    from fedtune.data.prompts import open_ids
    from fedtune.model.answers import continuation
    from fedtune.model.libraries import quiet

    with quiet():  # transformers warns of texts longer than the model reads, which are refused below
        if asked.task.kind != "choice":
            return [open_ids(base.tokenizer, item.prompt, special=True) for item in items]
        options = [[continuation(base, item.prompt, option) for option in item.options] for item in items]
    for item, answers in zip(items, options, strict=True):
        if not all(answer.prompt and answer.answer for answer in answers):
            got = "an option that this tokenizer writes without a token of its own"
            raise ConfigError(Fault(item.place, "options of at least one token after the prompt", got))
    return options


def needed(tokens: Sequence[Any], new_tokens: int) -> int:
    """Return the positions that one item takes."""
    if isinstance(tokens[0], int):
        return len(tokens) + new_tokens
    return max(len(answer.inputs) for answer in tokens)


def too_long(asked: Asked, base: Base, count: int, new_tokens: int) -> Fault:
    """Return the fault of items that do not fit, with the largest number of shots with which all, or most, do."""
    name, total = asked.task.name, len(asked.rows)
    fewest, best = count, asked.shots
    for shots in range(asked.shots - 1, -1, -1):
        tokens = tokens_of(asked, asked.items(shots), base)
        if (longer := sum(needed(part, new_tokens) > base.positions for part in tokens)) < fewest:
            fewest, best = longer, shots
        if not longer:
            break
    if not fewest:
        other = ", or --skip-long to leave them out and count them" if count < total else ""
        hint = f"set --shots {name}={best}, with which all fit{other}"
    elif fewest < count:
        hint = f"set --shots {name}={best}, with which {fewest} do not fit, and --skip-long to leave these out"
    else:
        hint = "set --skip-long to leave them out and count them" if count < total else "take a model that reads more"
    answer = f" with {new_tokens} tokens of an answer" if asked.task.kind != "choice" else ""
    expected = f"items of at most {base.positions} tokens{answer}, the model's positions"
    return Fault(f"--tasks {name}", expected, f"{count} of {total} longer ones, {asked.shots} shots", hint)


def choices(
    net: Any, base: Base, part: Encoded, batch: int, new_tokens: int, progress: Callable[[int], None]
) -> Values:
    """Return for each question whether its right option is the most likely one."""
    from fedtune.model.answers import log_likelihoods

    options: list[Continuation] = [option for question in part.tokens for option in question]  # type: ignore[misc]
    share = len(part.items) / len(options)
    scores = log_likelihoods(net, base, options, batch=batch, progress=lambda done: progress(int(done * share)))
    values: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    begin = 0
    for question in part.items:
        assert isinstance(question, Question)
        chosen = choose(question, scores[begin : begin + len(question.options)])
        begin += len(question.options)
        for measure, choice in chosen.items():
            values[measure].append(float(choice == question.gold))
    # Of options of one length both are the same number.
    return {"acc": values["acc"]} if all(same_length(item) for item in part.items) else values


def same_length(question: Question | Problem) -> bool:
    return isinstance(question, Question) and len({len(option) for option in question.options}) == 1


def generated_answers(
    net: Any, base: Base, part: Encoded, batch: int, new_tokens: int, progress: Callable[[int], None]
) -> Values:
    """Return for each problem whether the model's greedy answer is right."""
    from fedtune.model.answers import continuations

    prompts: Sequence[Any] = part.tokens
    texts = continuations(net, base, prompts, new_tokens=new_tokens, stop=gsm8k.STOP, batch=batch, progress=progress)
    scores = [gsm8k.scores(item, text) for item, text in zip(part.items, texts, strict=True)]  # type: ignore[arg-type]
    return {measure: [score[measure] for score in scores] for measure in scores[0]}


def facts_of(part: Encoded, new_tokens: int) -> Mapping[str, Any]:
    """Return how a benchmark was asked."""
    asked = part.asked
    facts: dict[str, Any] = {
        "file": str(asked.path),
        "sha256": hashlib.sha256(asked.path.read_bytes()).hexdigest(),
        "rows": part.rows,
        "items": len(part.items),
        "too_long": part.too_long,
        "shots": asked.shots,
        "method": "log-likelihood of the options" if asked.task.kind == "choice" else "greedy",
    }
    if asked.task.kind != "choice":
        facts["new_tokens"] = new_tokens
    return facts


def result(part: Encoded, values: Mapping[str, Values], new_tokens: int) -> Mapping[str, Any]:
    """Return one benchmark's scores as JSON has them."""
    facts = facts_of(part, new_tokens)
    measures = {measure: compare({view: own[measure] for view, own in values.items()}) for measure in first(values)}
    groups = [item.group for item in part.items if isinstance(item, Question) and item.group]
    if groups:
        by_group = {
            group: {view: share_in(groups, group, own["acc"]) for view, own in values.items()}
            for group in sorted(set(groups))
        }
        measures["acc_macro"] = macro({view: in_groups(groups, own["acc"]) for view, own in values.items()})
        return {**facts, "measures": measures, "groups": by_group}
    return {**facts, "measures": measures}


def first(values: Mapping[str, Values]) -> Sequence[str]:
    return list(next(iter(values.values())))


def compare(views: Mapping[str, Sequence[float]]) -> Mapping[str, Any]:
    """Return each view's share of right answers, and their difference item by item."""
    result = {view: asdict(intervals.share(values)) for view, values in views.items()}
    if len(views) == 2:
        result["difference"] = asdict(intervals.difference(*views.values()))
    return result


def macro(views: Mapping[str, Sequence[Sequence[float]]]) -> Mapping[str, Any]:
    """Return the mean over groups of each view, and of the change."""
    result = {view: asdict(intervals.mean_of_groups(groups)) for view, groups in views.items()}
    if len(views) == 2:
        before, after = views.values()
        changes = [np.subtract(b, a).tolist() for a, b in zip(before, after, strict=True)]
        result["difference"] = asdict(intervals.mean_of_groups(changes))
    return result


def in_groups(groups: Sequence[str], values: Sequence[float]) -> Sequence[Sequence[float]]:
    return [[value for own, value in zip(groups, values, strict=True) if own == group] for group in sorted(set(groups))]


def share_in(groups: Sequence[str], group: str, values: Sequence[float]) -> Mapping[str, Any]:
    own: Estimate = intervals.share([value for name, value in zip(groups, values, strict=True) if name == group])
    return asdict(own)


def steps(watch: Watch, title: str, total: int) -> Callable[[int], None]:
    """Return a function of the items done that reports every tenth of them."""
    shown = -1

    def report(done: int) -> None:
        nonlocal shown
        if (tenth := 10 * done // max(1, total)) != shown:
            shown = tenth
            watch(Phase(f"{title}: {done} of {total}"))

    report(0)
    return report
