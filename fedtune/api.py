"""fedtune from Python: simulate, evaluate, export, report and compare, as the command line calls them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.adapter import Adapter, Factors
from fedtune.config import Recipe, bind
from fedtune.config.binding import Findings, bind_table
from fedtune.demo import recipe_text, write_data
from fedtune.errors import ConfigError, Fault, FedtuneError, RoundError, StoreError
from fedtune.lowrank import compress, truncate
from fedtune.methods.method import Seeds, Tuned
from fedtune.model.settings import ModelSettings
from fedtune.rounds import Note, Watch
from fedtune.simulation.processes import Nursery
from fedtune.store import audit, peft, result
from fedtune.store import seeds as store_seeds
from fedtune.store.audit import Status, Verified
from fedtune.store.files import guarded, new_folder
from fedtune.store.run import check_run, vacant, write_recipe

# The client wing (torch, transformers, peft, datasets) takes seconds to import, so `experiment` and `model` are
# imported where they are needed: a recipe that is wrong says so at once, and reading a report needs neither.

FORMS = ("peft", "uniform", "merged", "ledger")


@dataclass(frozen=True)
class Run:
    """A run directory, and what its summary says."""

    path: Path
    summary: Mapping[str, Any]
    """The content of summary.json."""

    @property
    def adapter(self) -> Path:
        """Folder of the global adapter in PEFT's format; of a method that moves all weights, of its seeds."""
        return result.folder(self.path)

    @property
    def report(self) -> Path:
        """The HTML page."""
        return self.path / "report.html"


def simulate(
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    *,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    fresh: bool = False,
    resume: str | Path | None = None,
    watch: Watch = lambda event: None,
) -> Run:
    """Run a recipe with all its clients on this machine, and return the run.

    Args:
        recipe: a file, its content as a mapping, or a bound recipe; with `resume` it may be left out.
        overrides: settings that replace the recipe's, as `client.steps=10`.
        out: run directory; `runs/<name>` without it.
        fresh: if the directory is taken, start beside it instead of refusing.
        resume: directory of a run to go on with, after a crash or for more rounds; its result is the one that the run
            would have had without a break. `rounds.count` and the engine may change, nothing else.
        watch: called with each event of `fedtune.rounds`.

    Raises:
        ConfigError: if the recipe, or anything that it names, is wrong; with every fault found.
        RoundError: if a round could not be completed; the run directory holds the rounds before it.
        StoreError: if the run directory cannot be written.
    """
    if resume is not None:
        return _resume(Path(resume), recipe, overrides=overrides, watch=watch)
    if recipe is None:
        raise ConfigError(Fault("recipe", "a recipe, or a run to resume", "neither"))
    bound = bound_of(recipe, overrides)
    with nursery_of(bound) as nursery:
        from fedtune.experiment import prepare

        experiment = prepare(bound)
        path = vacant(Path(out) if out is not None else Path("runs") / bound.name, fresh=fresh)
        return _conduct(experiment, path, nursery, watch)


def nursery_of(recipe: Recipe) -> AbstractContextManager[Nursery | None]:
    """Start the process that loads the base for worker processes, while this one still imports and loads its own."""
    return Nursery() if recipe.engine.name == "processes" else nullcontext()


def bound_of(recipe: Recipe | str | Path | Mapping[str, Any], overrides: Sequence[str]) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else bind(recipe, overrides=overrides)


def recipe_of(run: Path) -> Path:
    """Return the recipe's file of a run.

    Raises:
        StoreError: if the folder is none.
    """
    check_run(run)
    return run / "recipe.toml"


def _resume(
    path: Path,
    recipe: Recipe | str | Path | Mapping[str, Any] | None,
    *,
    overrides: Sequence[str],
    watch: Watch,
) -> Run:
    from fedtune.conduct import check_resumable

    bound = bound_of(recipe_of(path) if recipe is None else recipe, overrides)
    check_resumable(path, bound)
    with nursery_of(bound) as nursery:
        from fedtune.experiment import prepare

        experiment = prepare(bound)
        return _conduct(experiment, path, nursery, watch, resume=True)


def demo(*, out: str | Path | None = None, watch: Watch = lambda event: None) -> Run:
    """Run the federation that fedtune brings along: its own small model, and this Python's library as the clients."""
    path = vacant(Path(out) if out is not None else Path("runs") / "demo", fresh=out is None)
    write_data(path / "data")
    write_recipe(path, recipe_text())
    bound = bind(path / "recipe.toml")
    from fedtune.experiment import prepare

    experiment = prepare(bound)
    return _conduct(experiment, path, None, watch)


def _conduct(experiment: Any, path: Path, nursery: Nursery | None, watch: Watch, *, resume: bool = False) -> Run:
    from fedtune.conduct import conduct
    from fedtune.experiment import setting, transport

    settings = experiment.recipe.report

    def draw() -> None:
        if settings.plots or settings.tensorboard:
            report(path, tensorboard=settings.tensorboard)

    try:
        with transport(experiment, nursery) as engine:
            summary = conduct(setting(experiment), path, engine, resume=resume, watch=watch)
    except (KeyboardInterrupt, FedtuneError):
        with suppress(FedtuneError):  # what stopped the run is told, not what came of it
            if (path / "summary.json").exists():
                draw()
        raise
    draw()
    return Run(path=path, summary=summary)


def evaluate(
    run: str | Path, *, data: str | Path | None = None, examples: int | None = None
) -> Mapping[str, Mapping[str, float]]:
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
    bound = bind(path / "recipe.toml")
    if data is not None:
        bound = replace(bound, data=replace(bound.data, test=str(Path(data).resolve())))
    bound = replace(bound, evaluate=replace(bound.evaluate, examples=examples))
    from fedtune.experiment import prepare, score

    experiment = prepare(bound)
    check_base(experiment.base.digest, origin, path)
    before = score(experiment, Tuned(saved=experiment.base.saved_tensors()), test=True, clients=False).test
    after = score(experiment, tuned, test=True, clients=False).test
    if before is None or after is None:
        raise ConfigError(Fault("data.test", "test examples", "none", "give --data FILE, or set data.held_out above 0"))
    return {"before": before, "after": after}


def export(
    run: str | Path,
    *,
    form: str | None = None,
    out: str | Path | None = None,
    max_rank: int | None = None,
    dtype: str | None = None,
    watch: Watch = lambda event: None,
) -> Path:
    """Write a run's result for others to load, and return the folder.

    Args:
        run: the run directory.
        form: `peft`, the adapter with its own rank per layer; `uniform`, the same padded with zeros to one rank, for
            engines that read no rank_pattern; `merged`, a whole model of the base with the change added; `ledger`, the
            integers that a FedKSeed run consists of. Without it `peft`, or `merged` for a run of seeds, whose bank
            `kron` alone has the form of an adapter.
        out: folder to write; `<run>/<form>` without it.
        max_rank: cut every layer to its best approximation of this rank.
        dtype: number format of the merged model; the base's own without it.
        watch: told what a cut or a cast has cost.

    Raises:
        StoreError: if the folder holds no run, or `out` holds files already.
        ConfigError: if the form is unknown, or the base is another than the one that was trained on.
    """
    if form is not None and form not in FORMS:
        raise ConfigError(Fault("form", f"one of {', '.join(FORMS)}", repr(form)))
    path = Path(run)
    tuned, origin = open_run(path)
    form = form or ("merged" if tuned.seeds else "peft")
    if dtype is not None and form != "merged":
        raise ConfigError(Fault("dtype", "none: adapters are float32", repr(dtype), "or choose the form merged"))
    target = Path(out) if out is not None else path / form
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target}: expected a new or an empty folder; it holds files; choose another with --out")
    if tuned.seeds is not None:
        if dtype is not None or max_rank is not None:
            got = f"dtype = {dtype!r}, max_rank = {max_rank}"
            raise ConfigError(Fault("export", "neither dtype nor max_rank: seeds give one model, to the bit", got))
        return _export_seeds(path, tuned.seeds, origin, target, form=form, watch=watch)
    if form == "ledger":
        expected = "a run of a method that moves all weights (fedkseed)"
        raise ConfigError(Fault("form", expected, f"'ledger' of a run of {origin.get('method')!r}", "choose peft"))
    adapter, saved = tuned.adapter, tuned.saved
    if max_rank is not None:
        adapter = cut(adapter, max_rank, watch)
    if form == "merged":
        return _merge(path, adapter, saved, origin, target, dtype=dtype, watch=watch)
    if form == "uniform":
        adapter = pad(adapter)
    settings = json.loads((path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    return peft.write(target, adapter, saved, peft.target_of(settings), origin)


def _export_seeds(
    path: Path, seeds: Seeds, origin: Mapping[str, Any], target: Path, *, form: str, watch: Watch
) -> Path:
    """Write what seeds stand for: themselves, the whole model with them beside it, or an adapter of the bank `kron`."""
    if form == "ledger":
        return store_seeds.write(target, seeds, origin)
    bound = bind(path / "recipe.toml")
    if form != "merged":
        check_form(form, bound.method, [])
    from fedtune.experiment import prepare, setting

    experiment = prepare(bound)
    check_base(experiment.base.digest, origin, path)
    if form != "merged":
        adapted = {f"{name}.weight" for name in experiment.base.modules}
        moved = [seeds.manifest.entries[ordinal].name for ordinal in seeds.trainable]
        check_form(form, bound.method, [name for name in moved if name not in adapted])
        factors = store_seeds.kron_adapter(seeds, transposed=experiment.base.transposed)
        return peft.write(target, factors, {}, setting(experiment).target, origin)
    from fedtune.model import replay as rebuilding

    with new_folder(target) as folder:
        weights = rebuilding.write(experiment.base, seeds.ledger, seeds.trainable, folder)
        store_seeds.put(folder, seeds, {**origin, "weights": weights})
    watch(Note(f"rebuilt from {seeds.ledger.bank.size} integers; digest of the weights {weights}"))
    return target


def check_form(form: str, method: Any, beyond: Sequence[str]) -> None:
    """Refuse to write seeds as an adapter where they are none; `beyond` are tensors outside of the adapted layers."""
    if method.bank == "kron" and not (method.vectors or method.embeddings or beyond):
        return
    got = f"{form!r} of a run with bank = {method.bank!r}" + (f" that moves {beyond[0]} as well" if beyond else "")
    expected = "merged or ledger: only bank = 'kron' over the weights of adapted layers has the form of an adapter"
    raise ConfigError(Fault("form", expected, got, "write the whole model with --form merged"))


@dataclass(frozen=True)
class Replayed:
    """A model rebuilt from a base and a seed ledger."""

    base: str
    """Digest (hex) of the base's manifest."""
    state: str
    """Digest (hex) of the ledger."""
    weights: str
    """Digest (hex) of the rebuilt weights' manifest."""
    path: Path | None
    """Folder of the model, if it was written."""


def replay(
    base: str | Path, ledger: str | Path, *, out: str | Path | None = None, trainable: Sequence[str] = ()
) -> Replayed:
    """Rebuild the model that a seed ledger stands for, anywhere where its base is, and return the digests.

    Args:
        base: folder or hub name of the base that the run started from.
        ledger: a run's folder `seeds`, an exported model, or a ledger alone, which names no tensors.
        out: folder to write the model to; without it only the digests are made.
        trainable: globs over the tensors that were moved, for a ledger alone; without any, all but for kron.

    Raises:
        ConfigError: if the base is another than the ledger's.
        StoreError: if the ledger cannot be read, or `out` holds files already.
        WireError: if its bytes are none.
    """
    from fedtune.directions import ledger as ledgers
    from fedtune.directions.trainable import Reach
    from fedtune.directions.trainable import trainable as chosen
    from fedtune.model import replay as rebuilding

    source, target = Path(ledger), None if out is None else Path(out)
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target}: expected a new or an empty folder; it holds files; choose another with --out")
    seeds, origin = store_seeds.read(source) if source.is_dir() else (None, dict[str, Any]())
    with guarded(source):
        found = seeds.ledger if seeds else ledgers.decode(source.read_bytes())
    if not seeds and found.bank.name == "kron" and not trainable:
        expected = "the folder of a run's seeds, or the tensors that were moved: a kron ledger alone does not name them"
        raise ConfigError(Fault("ledger", expected, str(source), "give runs/NAME/seeds, or --trainable GLOB"))
    settings = model_settings(origin, str(base), source)
    loaded = rebuilding.base_of(
        found,
        settings,
        seed=origin.get("seed", 0),
        labels=origin.get("labels", ()),
        in_full=origin.get("modules_to_save", ()),
    )
    everything = Reach(found.bank.name, trainable, vectors=True, embeddings=True)
    ordinals = seeds.trainable if seeds else chosen(loaded.manifest, everything, loaded.matrices)
    if target is None:
        weights = rebuilding.write(loaded, found, ordinals, None)
    else:
        with new_folder(target) as folder:
            weights = rebuilding.write(loaded, found, ordinals, folder)
    return Replayed(loaded.manifest.digest.hex(), found.digest.hex(), weights, target)


def model_settings(origin: Mapping[str, Any], base: str, source: Path) -> ModelSettings:
    """Return how the base of a run's seeds was loaded, as their provenance says.

    Raises:
        StoreError: if it says something else.
    """
    found, noted = Findings(), origin.get("model", {})
    if isinstance(noted, dict):
        noted = {"base": base, "device": "cpu", **{key: value for key, value in noted.items() if value is not None}}
    bound: ModelSettings | None = bind_table(ModelSettings, noted, "model", found)
    if bound is None:
        raise StoreError(f"{source}: expected how the base was loaded; {found.faults[0]}; put back a copy")
    return bound


def _merge(
    path: Path,
    adapter: Adapter,
    saved: Mapping[str, Any],
    origin: Mapping[str, Any],
    target: Path,
    *,
    dtype: str | None,
    watch: Watch,
) -> Path:
    bound = bind(path / "recipe.toml")
    from fedtune.experiment import prepare
    from fedtune.model.base import DTYPES
    from fedtune.model.merge import merge

    chosen = dtype or bound.model.dtype
    if chosen not in DTYPES:
        raise ConfigError(Fault("dtype", f"one of {', '.join(DTYPES)}", repr(chosen)))
    experiment = prepare(bound)
    check_base(experiment.base.digest, origin, path)
    with new_folder(target) as folder:
        merged = merge(experiment.base, adapter, saved, dtype=chosen, revision=bound.model.revision, out=folder)
        (folder / "fedtune.json").write_text(json.dumps(origin, indent=1) + "\n")
    watch(Note(f"merged in float32 and cast to {chosen} once: {merged.applied:.1%} of the change arrived"))
    return target


def runs(folder: str | Path = "runs") -> Sequence[tuple[Path, Status | str]]:
    """Return the runs of a folder by name, each with where it stands or why that cannot be told.

    Raises:
        StoreError: if the folder cannot be read.
    """
    path = Path(folder)
    with guarded(path):
        found = [each for each in sorted(path.iterdir()) if (each / "recipe.toml").is_file()] if path.exists() else []
    return [(each, _status(each)) for each in found]


def _status(run: Path) -> Status | str:
    try:
        return audit.status(run)
    except StoreError as error:
        return str(error)


def status(run: str | Path) -> Status:
    """Return where a run stands, also while it goes on.

    Raises:
        StoreError: if the folder is no run, or its journal is damaged.
    """
    check_run(Path(run))
    return audit.status(Path(run))


def verify(run: str | Path) -> Verified:
    """Check a run's journal and blobs, and that its round lines and its adapter are those that the journal notes.

    Raises:
        StoreError: naming the first thing that is missing, damaged or was changed.
    """
    from fedtune.conduct import check_results

    path = Path(run)
    check_run(path)
    found = audit.verify(path)
    check_results(path)
    return found


def report(run: str | Path, *, tensorboard: bool = False) -> Path:
    """Write report.html and its plots from the run's JSON alone, with event files if wanted, and return the page."""
    from fedtune.report.page import write_report
    from fedtune.report.tensorboard import write_events

    path = Path(run)
    check_run(path)
    with guarded(path):
        if tensorboard:
            write_events(path)
        return write_report(path)


def compare(
    recipes: Sequence[str | Path],
    *,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    watch: Watch = lambda event: None,
) -> Path:
    """Run several recipes, each with the same seeds, and write one page that sets them side by side.

    Args:
        recipes: recipe files, or directories of finished runs, which are taken as they are.
        seeds: seeds to run each recipe with; the recipe's own without it.
        overrides: settings that replace those of every recipe.
        out: folder of the runs and the page; `runs/compare` (or the next free name) without it.
        watch: called with each event of every run.

    Raises:
        ConfigError: if a recipe is wrong; all are bound before the first one runs.
        StoreError: if a folder holds no run.
        RoundError: if no run could be finished; one that could not is left out of the page, with a note.
    """
    from fedtune.report.compare import write_comparison

    bound = [(Path(recipe), None if Path(recipe).is_dir() else bind(recipe, overrides=overrides)) for recipe in recipes]
    for path, recipe in bound:
        if recipe is None:
            check_run(path)
    check_distinct([(recipe.name, seed) for _, recipe in bound if recipe for seed in seeds or [recipe.seed]])
    folder = vacant(Path(out) if out is not None else Path("runs") / "compare", fresh=out is None)
    runs = []
    for path, recipe in bound:
        if recipe is None:
            runs.append(path)
            continue
        for seed in seeds or [recipe.seed]:
            watch(Note(f"{recipe.name}, seed {seed}"))
            target = folder / f"{recipe.name}-seed{seed}"
            try:
                runs.append(simulate(replace(recipe, seed=seed), out=target, fresh=True, watch=watch).path)
            except RoundError as error:  # one experiment that broke off must not cost the others their page
                watch(Note(f"{recipe.name}, seed {seed}: left out of the comparison: {error}"))
    if not runs:
        raise RoundError(f"expected at least one run to compare; none was finished; see {folder}")
    return write_comparison(runs, folder)


def check_distinct(runs: Sequence[tuple[str, int]]) -> None:
    """Refuse to run the same name with the same seed twice: nothing could tell the two apart afterwards."""
    twice = [f"{name} with seed {seed}" for (name, seed), count in Counter(runs).items() if count > 1]
    if twice:
        raise ConfigError(Fault("name", "recipes of different names, each seed once", f"{twice[0]} more than once"))


def open_run(run: Path) -> tuple[Tuned, Mapping[str, Any]]:
    """Return (global model, provenance) of a run directory.

    Raises:
        StoreError: if it is none, or holds no result.
    """
    check_run(run)
    return result.read(run)


def check_base(found: str, origin: Mapping[str, Any], run: Path) -> None:
    """Refuse an adapter that was trained over other weights than those that are loaded now."""
    wanted = str(origin.get("base", {}).get("digest"))
    if found != wanted:
        raise ConfigError(
            Fault(
                path="model.base",
                expected=f"the base that {result.folder(run)} was trained on (digest {wanted[:12]})",
                got=f"another one (digest {found[:12]})",
                hint="load the same model in the same revision and dtype",
            )
        )


def cut(adapter: Adapter, max_rank: int, watch: Watch) -> Adapter:
    """Return each layer's best approximation of at most this rank, and note what share of the change is kept."""
    if max_rank < 1:
        raise ConfigError(Fault("max_rank", "at least 1", str(max_rank)))
    whole = compress(adapter)
    short = {name: truncate(low, tau=1.0, max_rank=max_rank) for name, low in whole.items()}
    total = sum(float(np.square(low.s).sum()) for low in whole.values())
    kept = sum(float(np.square(low.s).sum()) for low in short.values())
    watch(Note(f"cut to rank {max_rank}: {kept / total if total else 1.0:.2%} of the squared singular values kept"))
    return {name: low.factors for name, low in short.items()}


def pad(adapter: Adapter) -> Adapter:
    """Return the same change with every layer padded with zeros to the largest rank."""
    rank = max(factors.rank for factors in adapter.values())
    return {
        name: Factors(
            a=np.pad(f.a, ((0, rank - f.rank), (0, 0))),
            b=np.pad(f.b, ((0, 0), (0, rank - f.rank))),
        )
        for name, f in adapter.items()
    }
