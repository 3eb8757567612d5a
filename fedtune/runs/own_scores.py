"""A run's own rows as tasks: loss per token and greedy answers on its test data, and the loss of every client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config import Recipe
from fedtune.config.recipe import AT_SITES, PYTHON
from fedtune.data.encode import Example
from fedtune.data.settings import Split
from fedtune.errors import ConfigError, Fault
from fedtune.evaluation import intervals
from fedtune.evaluation.intervals import Estimate
from fedtune.rounds.events import Phase, Watch
from fedtune.rounds.worst_tenth import worst_tenth
from fedtune.runs.base_checks import check_base
from fedtune.runs.chat import Speaker, attach, check_task
from fedtune.runs.context import bind_to_score
from fedtune.runs.export import open_run
from fedtune.runs.task_target import Target

if TYPE_CHECKING:
    from fedtune.runs.local import Experiment

# torch and transformers take seconds to import, so `model` and `runs.local` are imported where they are needed.

OWN: Mapping[str, str] = {
    "loss": "loss per token, perplexity and bits per character of the run's test data",
    "rouge": "Rouge-L (F1, words unstemmed) and exact match of greedy answers to the run's test data",
    "clients": "loss per token of each client's held-out rows: mean, and mean of the worst tenth",
}
"""Tasks that need a run directory, whose recipe names the rows."""

Losses = Sequence[tuple[float, int]]
"""By example, (summed loss in nats, tokens that count)."""


def bind_with_test(run: Path, data: str | Path | None) -> Recipe:
    """Return a run's recipe to score by, with another file as its test data if one is given.

    Raises:
        ConfigError: if its rows are not here, for they are at its sites or were Python objects, and no file is given.
    """
    bound = bind_to_score(run)
    if data is not None:
        split = replace(bound.data.split, match=None)  # these rows belong to no client
        bound = replace(bound, data=replace(bound.data, test=str(Path(data).resolve()), split=split))
    if bound.data.source in (AT_SITES, PYTHON):
        if bound.data.test in (None, PYTHON):
            of_python = bound.data.source == PYTHON
            got = "a run whose rows were Python objects" if of_python else "a run whose data lie at its sites"
            hint = f"give --data FILE, of rows with the columns that {'they' if of_python else 'the sites'} have"
            raise ConfigError(Fault("data.test", "data to score on", got, hint))
        # What no client is here for any more: the file takes the place of all of them.
        split = Split("files")
        bound = replace(bound, data=replace(bound.data, source=bound.data.test, split=split), override=())
    return bound


def open_scored_run(
    source: str, names: Sequence[str], data: Mapping[str, Path], watch: Watch
) -> tuple[Target, Experiment]:
    """Load a run with its data, to be scored before and after.

    Raises:
        ConfigError: if it is no run of a causal model that predicts tokens, or names no rows to score.
    """
    from fedtune.runs.local import prepare

    run = Path(source)
    own = [name for name in names if name in OWN]
    if not (run / "recipe.toml").is_file():
        hint = "its recipe names the rows; of an adapter or a model ask benchmarks"
        raise ConfigError(Fault(f"--tasks {','.join(own)}", "a run directory", source, hint))
    files = {path.resolve() for name, path in data.items() if name in OWN}
    if len(files) > 1 or "clients" in data:
        expected = "one file of test data for loss and rouge"
        raise ConfigError(Fault("--data", expected, ", ".join(f"{name}={data[name]}" for name in data if name in OWN)))
    tuned, origin = open_run(run)
    recipe = bind_with_test(run, next(iter(files), None))
    check_task(recipe.model.task, run)
    if recipe.client.objective != "likelihood":
        got = f"client.objective = {recipe.client.objective!r} in {run}"
        raise ConfigError(Fault("--tasks", "a run that learns to predict tokens", got, "leave --tasks out to score it"))
    experiment = prepare(recipe, watch)
    check_base(experiment.base.digest, origin, run)
    federation = experiment.federation
    if not federation.test and set(own) - {"clients"}:
        raise ConfigError(Fault("data.test", "test examples", "none", f"give --data {own[0]}=FILE"))
    if "clients" in own and not any(shard.held_out for shard in federation.clients.values()):
        raise ConfigError(Fault("--tasks clients", "clients that hold out rows", "none", "set data.held_out above 0"))
    speaker = Speaker(experiment.base, tuned, recipe.data, federation.form, recipe.model.threads)
    return Target(speaker, {"before": False, "after": True}), experiment


def own_scores(
    target: Target,
    experiment: Experiment,
    names: Sequence[str],
    *,
    limit: int | None,
    new_tokens: int,
    batch: int,
    watch: Watch,
) -> Mapping[str, Any]:
    """Return the scores of the run's own tasks as JSON has them, by name."""
    test = experiment.federation.test[:limit]  # in random order already
    shards = {name: shard.held_out for name, shard in experiment.federation.clients.items() if shard.held_out}
    results = {}
    if "loss" in names:
        watch(Phase(f"loss of {len(test)} examples, before and after"))
        losses = {view: measure_losses(target, tuned, test, batch) for view, tuned in target.views.items()}
        results["loss"] = loss_task(test, losses, len(experiment.federation.test))
    if "rouge" in names:
        watch(Phase(f"answers to {len(test)} examples, before and after"))
        texts = {view: measure_answers(target, tuned, test, batch, new_tokens) for view, tuned in target.views.items()}
        results["rouge"] = answer_task(test, texts, len(experiment.federation.test), new_tokens)
    if "clients" in names:
        rows = [(name, example) for name, held_out in sorted(shards.items()) for example in held_out[:limit]]
        examples = [example for _, example in rows]
        watch(Phase(f"loss of {len(rows)} rows of {len(shards)} clients, before and after"))
        losses = {view: measure_losses(target, tuned, examples, batch) for view, tuned in target.views.items()}
        by_client = {view: by_name([name for name, _ in rows], own) for view, own in losses.items()}
        results["clients"] = client_task(by_client, experiment.recipe.seed)
    return results


def measure_losses(target: Target, tuned: bool, examples: Sequence[Example], batch: int) -> Losses:
    """Return each example's summed loss and tokens by one of the target's models."""
    from fedtune.model.answers import losses

    with attach(target.speaker, tuned=tuned) as net:
        return losses(net, target.speaker.base, examples, batch=batch)


def measure_answers(
    target: Target, tuned: bool, examples: Sequence[Example], batch: int, new_tokens: int
) -> Mapping[str, Sequence[float]]:
    """Return Rouge-L and exact match of the greedy answer to every example that has a reference."""
    from fedtune.model.answers import continuations
    from fedtune.model.evaluate import rouge_l

    base, asked = target.speaker.base, with_reference(examples)
    # The end of a prompt that is too long, as in the run's own evaluation.
    room = base.positions - min(new_tokens, base.positions - 1)
    prompts = [example.input_ids[: example.prompt_tokens].tolist()[-room:] for example in asked]
    with attach(target.speaker, tuned=tuned) as net:
        texts = continuations(net, base, prompts, new_tokens=min(new_tokens, base.positions - 1), batch=batch)
    pairs = [(example.reference, text) for example, text in zip(asked, texts, strict=True)]
    return {
        "rouge_l": [rouge_l(reference, text) for reference, text in pairs],
        "exact_match": [float(reference.split() == text.split()) for reference, text in pairs],
    }


def with_reference(examples: Sequence[Example]) -> Sequence[Example]:
    return [example for example in examples if example.reference and example.prompt_tokens]


def loss_task(test: Sequence[Example], losses: Mapping[str, Losses], rows: int) -> Mapping[str, Any]:
    """Return loss, perplexity and bits per character, each with its interval."""
    sums = {view: [total for total, _ in own] for view, own in losses.items()}
    tokens = [count for _, count in losses["before"]]
    characters = [example.characters for example in test]
    loss = views(sums, lambda values: intervals.ratio(values, tokens), lambda a, b: change_of_ratio(a, b, tokens))
    in_bits = {view: [value / log(2) for value in values] for view, values in sums.items()}
    bits = views(
        in_bits, lambda values: intervals.ratio(values, characters), lambda a, b: change_of_ratio(a, b, characters)
    )
    perplexity = {view: asdict(exponential(intervals.ratio(values, tokens))) for view, values in sums.items()}
    measures = {"loss": loss, "perplexity": perplexity, "bits_per_char": bits}
    return {**facts(rows, len(test), "nats per token"), "tokens": sum(tokens), "measures": measures}


def answer_task(
    test: Sequence[Example], texts: Mapping[str, Mapping[str, Sequence[float]]], rows: int, new_tokens: int
) -> Mapping[str, Any]:
    """Return Rouge-L and exact match, each with its interval."""
    rouge = {view: own["rouge_l"] for view, own in texts.items()}
    exact = {view: own["exact_match"] for view, own in texts.items()}
    measures = {
        "rouge_l": views(rouge, intervals.mean, lambda a, b: intervals.mean(differences(a, b))),
        "exact_match": views(exact, intervals.share, intervals.difference_of_shares),
    }
    items = len(with_reference(test))
    return {**facts(rows, items, "greedy"), "new_tokens": new_tokens, "measures": measures}


def client_task(by_client: Mapping[str, Mapping[str, Losses]], seed: int) -> Mapping[str, Any]:
    """Return the mean loss of the clients with a bootstrap interval over them, their worst tenth, and each client's."""
    scores = {
        view: {
            name: {"loss": sum(total for total, _ in own) / sum(count for _, count in own), "examples": len(own)}
            for name, own in clients.items()
        }
        for view, clients in by_client.items()
    }
    losses = {view: [own["loss"] for own in clients.values()] for view, clients in scores.items()}

    def over_clients(values: Sequence[float]) -> Estimate:
        return intervals.bootstrap(values, seed=seed, purpose="evaluate.clients")

    measures = {"mean loss": views(losses, over_clients, lambda a, b: over_clients(differences(a, b)))}
    tenths = {view: worst_tenth(clients) for view, clients in scores.items()}
    worst = {
        view: asdict(Estimate(tenth.mean, None, None, None, tenth.clients)) for view, tenth in tenths.items() if tenth
    }
    if worst:
        measures["worst tenth"] = worst
    rows = sum(len(own) for own in next(iter(by_client.values())).values())
    names = next(iter(scores.values()))
    clients = {name: {view: own[name]["loss"] for view, own in scores.items()} for name in names}
    return {**facts(rows, rows, "nats per token"), "clients": clients, "measures": measures}


def facts(rows: int, items: int, method: str) -> Mapping[str, Any]:
    return {"rows": rows, "items": items, "too_long": 0, "shots": 0, "method": method}


def views(
    values: Mapping[str, Sequence[float]],
    estimate: Callable[[Sequence[float]], Estimate],
    difference: Callable[[Sequence[float], Sequence[float]], Estimate],
) -> dict[str, Any]:
    """Return the estimate of both views and of their difference."""
    before, after = values["before"], values["after"]
    result = {view: asdict(estimate(own)) for view, own in values.items()}
    return {**result, "difference": asdict(difference(before, after))}


def change_of_ratio(before: Sequence[float], after: Sequence[float], counts: Sequence[float]) -> Estimate:
    return intervals.difference_of_ratios(before, after, counts)


def differences(before: Sequence[float], after: Sequence[float]) -> Sequence[float]:
    return [new - old for old, new in zip(before, after, strict=True)]


def exponential(loss: Estimate) -> Estimate:
    """Return the perplexity of a loss: its interval is that of the loss, and not symmetric."""
    value, low, high = (None if part is None else exp(min(part, 700.0)) for part in (loss.value, loss.low, loss.high))
    assert value is not None
    return Estimate(value, None if loss.stderr is None else value * loss.stderr, low, high, loss.items)


def by_name(names: Sequence[str], losses: Losses) -> Mapping[str, Losses]:
    """Return the losses of each client's rows."""
    return {
        name: [own for client, own in zip(names, losses, strict=True) if client == name]
        for name in dict.fromkeys(names)
    }
