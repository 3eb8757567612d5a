"""A step of a search: one trial runs, or resumes, for some rounds as a run with its own journal, and is scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedtune.config import Recipe
from fedtune.config.recipe import sized_adapter
from fedtune.config.trials import bind_trial, quiet_recipe
from fedtune.errors import ConfigError, ExtraError, Fault, FedtuneError, StoreError
from fedtune.rounds.events import ClientFinished, Event, RoundStarted, Watch
from fedtune.rounds.record import RoundRecord
from fedtune.rounds.scores import pooled_scores
from fedtune.runs.local import Experiment, prepare, run_context, transport, with_personal_folder
from fedtune.runs.runner import run_recipe
from fedtune.search.steps import Cost, Result, Search, Step
from fedtune.store.history import has_begun
from fedtune.store.round_records import read_rounds
from fedtune.store.search_journal import copy_run


@dataclass
class Sites:
    """Data and base of the last trial, which the next one takes where its recipe has the same."""

    sizes_alone: bool = False
    """Whether no weights are loaded."""
    experiment: Experiment | None = None

    def prepare(self, recipe: Recipe, watch: Watch = lambda event: None) -> Experiment:
        """Return a prepared recipe; data and base are loaded only where they are others than those of the last one."""
        last = self.experiment
        same = last is not None and loaded_by(last.recipe) == loaded_by(recipe)
        self.experiment = prepare(recipe, watch, sizes_alone=self.sizes_alone, loaded=last if same else None)
        return self.experiment


def loaded_by(recipe: Recipe) -> object:
    """Return the parts of a recipe that its data and its base depend on."""
    model = replace(recipe.model, dtype="")  # type: ignore[arg-type]  # auto, until the base is loaded
    return (model, sized_adapter(recipe), recipe.data, recipe.seed, recipe.root)


def trial_folder(folder: Path, trial: int, segment: int = 0) -> Path:
    """Return the run directory of a trial, or of what it became after its state was replaced so many times."""
    return folder / "trials" / (f"{trial:03d}-{segment}" if segment else f"{trial:03d}")


def run_step(search: Search, recipe: Recipe, step: Step, folder: Path, sites: Sites, watch: Watch) -> Result:
    """Run a step, or what is left of it, and return its result: a trial that fails has one without a score.

    Raises:
        StoreError: if a run directory cannot be written or trusted.
        ExtraError: if a package is missing.
    """
    run, reason = trial_folder(folder, step.trial, step.segment), ""
    copied_from = ""
    if step.source is not None:
        copied_from = f"trial {step.source} after round {step.since}"
        if not run.exists():
            copy_run(trial_folder(folder, step.source, step.source_segment), run)
    try:
        bound = quiet_recipe(bind_trial(recipe, step.trial, step.values))
        experiment = with_personal_folder(sites.prepare(bound, silent), run)
        context = replace(run_context(experiment), scored_rounds=search.rungs, copied_from=copied_from)
        run.mkdir(parents=True, exist_ok=True)
        with transport(experiment) as engine:
            run_recipe(context, run, engine, resume=has_begun(run), watch=progress_of(watch), until=step.until)
    except (StoreError, ExtraError):
        raise
    except FedtuneError as error:
        reason = str(error)
    except (MemoryError, RuntimeError) as error:  # torch's, as where scoring needs more memory than there is
        reason = f"{type(error).__name__}: {str(error)[:200]}"
    records = read_rounds(run) if (run / "rounds.jsonl").exists() else []
    return result_of(search, step, records, reason)


def silent(event: Event) -> None:
    """Show nothing: what preparation says was said before the first trial."""


def progress_of(watch: Watch) -> Callable[[Event], None]:
    """Return an observer of a trial that passes on how far its round is, and no line of its own for every round."""

    def observe(event: Event) -> None:
        if isinstance(event, RoundStarted | ClientFinished):
            watch(event)

    return observe


def result_of(search: Search, step: Step, records: Sequence[RoundRecord], reason: str) -> Result:
    """Return the result of a step from the records of its run, which hold everything but the reason of a failure."""
    own = [record for record in records if step.since < record.round <= step.until or not (step.since or record.round)]
    metric = search.settings.metric
    scores = {record.round: score for record in own if (score := validation_score(record, metric)) is not None}
    cost = Cost(
        client_rounds=sum(len(record.cohort) for record in own),
        bytes_down=sum(record.bytes_down for record in own),
        bytes_up=sum(record.bytes_up for record in own),
        seconds=sum(record.seconds for record in own),
    )
    last = own[-1] if own else None
    reached = last is not None and last.round == step.until and not reason
    score = scores.get(step.until) if reached else None
    if reached and score is None:
        reason = f"the clients' held-out {metric} after round {step.until} is not finite"
    state = last.state_digest if last is not None else ""
    return Result(step, score, reason=reason, cost=cost, scores=scores, state=state)


def validation_score(record: RoundRecord, metric: str) -> float | None:
    """Return a model's score on all clients' held-out rows; None where there is none, or one client's is not finite.

    Pooled scores leave such clients out: a trial must not gain by diverging where it is hard.
    """
    values = [scores.get(metric) for scores in record.held_out.values()]
    if not values or any(value is None or not math.isfinite(value) for value in values):
        return None
    value = pooled_scores(record.held_out).get(metric)
    return None if value is None else float(value)


def check_held_out(experiment: Experiment) -> None:
    """Refuse a federation in which no client holds rows out.

    Raises:
        ConfigError: if none does.
    """
    if not any(shard.held_out for shard in experiment.federation.clients.values()):
        expected = "rows that clients hold out, by which trials are compared"
        raise ConfigError(Fault("data.held_out", expected, "none", "set it above 0"))
