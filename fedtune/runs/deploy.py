"""A run's pruned models: scored beside the whole model, and written for devices to load."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fedtune.config import bind
from fedtune.config.recipe import method_of
from fedtune.errors import ConfigError, Fault, StoreError
from fedtune.methods import serialization as states
from fedtune.methods.method import GlobalModel
from fedtune.pruning.structure import ModelStructure, cuts, full_block, slice_adapter, sparsity
from fedtune.rounds.loop import Note, Watch
from fedtune.store import peft, result
from fedtune.store import pruning as store_pruning
from fedtune.store.blobs import Blobs
from fedtune.store.files import new_folder
from fedtune.store.history import replay_journal
from fedtune.store.round_records import read_rounds
from fedtune.store.run_directory import check_run

if TYPE_CHECKING:
    from fedtune.runs.local import Experiment

# torch and transformers take seconds to import, so `runs.local` and `model` are imported where they are needed.

MOST_KINDS = 8
"""Kinds of devices with a model of their own; with more kinds than that all devices get one model."""
REPEATS = 5
"""Forward passes whose median time is reported; one more is run first and not counted."""


@dataclass(frozen=True)
class TrainedRun:
    """A run with its base and its last state loaded."""

    path: Path
    experiment: Experiment
    state: Any
    tuned: GlobalModel

    def structure(self, ratio: float) -> ModelStructure | None:
        """Return the structure that the run's ranking gives at a ratio; None for the whole model.

        Raises:
            ConfigError: if the run has no ranking for all clients.
        """
        if ratio == 0:
            return None
        structure = method_of(self.experiment.recipe).structure(self.state, ratio)
        if structure is None:
            expected = "a run that pruned by one ranking for all (pruning.policy nested or vote)"
            pruning = self.experiment.recipe.pruning
            got = f"the policy {pruning.policy} in {self.path}" if pruning else f"no [pruning] in {self.path}"
            raise ConfigError(Fault("ratio", expected, got, 'run it with pruning.policy = "nested"'))
        return structure


def load_run(run: Path) -> TrainedRun:
    """Load a run's base and its last committed state.

    Raises:
        StoreError: if the folder holds no run, or no round of it is committed.
        ConfigError: if the base is another than the one that was trained on.
    """
    check_run(run)
    bound = bind(run / "recipe.toml")
    digests = replay_journal(run)[0].digests
    if not digests:
        raise StoreError(f"{run}: expected a run with a committed round; got none yet")
    from fedtune.runs.context import first_state
    from fedtune.runs.export import check_base
    from fedtune.runs.local import prepare

    experiment = prepare(bound)
    _, origin = result.read(run)
    check_base(experiment.base.digest, origin, run)
    body = Blobs(run / "blobs").get(digests[-1], f"the state of round {len(digests)}")
    state = states.decode(body, first_state(bound, experiment.blueprint))
    return TrainedRun(run, experiment, state, method_of(bound).global_model(state))


def trained_ratios(run: Path) -> Mapping[str, float]:
    """Return the pruning ratio of every client's last participation."""
    ratios: dict[str, float] = {}
    for record in read_rounds(run):
        for name, client in record.clients.items():
            if client.status == "ok" and client.ratio is not None:
                if not 0 <= client.ratio <= 0.875:
                    raise StoreError(
                        f"{run / 'rounds.jsonl'}: round {record.round}, {name}: expected a ratio from 0 to 0.875; "
                        f"got {client.ratio!r}; the line was changed after the run"
                    )
                ratios[name] = client.ratio
    return ratios


def classes(run: Path) -> Mapping[str, Sequence[str]]:
    """Return the clients that trained, by kind of device; by pruning ratio where devices are not known."""
    path = run / "summary.json"
    known = json.loads(path.read_text(encoding="utf-8")).get("devices", {}) if path.exists() else {}
    devices = known.get("clients", {})
    kinds: dict[str, list[str]] = {}
    for name, ratio in sorted(trained_ratios(run).items()):
        kinds.setdefault(devices.get(name, f"ratio-{ratio:g}"), []).append(name)
    if len(kinds) > MOST_KINDS:  # nearly every client is a kind of its own
        return {"every-device": [name for names in kinds.values() for name in names]}
    return kinds


def has_shared_ranking(run: Path) -> bool:
    """Return whether a run pruned all its clients by the same ranking of heads and channels.

    Raises:
        StoreError: if the folder holds no run.
    """
    check_run(run)
    pruning = bind(run / "recipe.toml").pruning
    return pruning is not None and pruning.policy != "local"


def load_pruned(
    folder: str | Path, *, base: str | Path | None = None, dtype: str = "float32", device: str = "cpu"
) -> Any:
    """Return the model of a folder `model` or `recipe` that `deploy` wrote: each block of its own width.

    It is a transformers model. No code in the folder is run, and one tensor is read at a time, so that memory for the
    smaller model is enough.

    Args:
        folder: `model`, which holds the weights; or `recipe`, which holds the structure and the adapter alone.
        base: for a `recipe`, folder or hub name of the base; without it the one of the run.
        dtype: number format of the model.
        device: as in a recipe's model.device.

    Raises:
        ConfigError: if the folder is neither, or is damaged, or the base is another than the one that was pruned.
        StoreError: if the adapter of a `recipe` is torn.
    """
    from fedtune.model.base import choose_device
    from fedtune.model.deployed import load

    place = Path(folder)
    if (place / store_pruning.NAME).exists():
        return prune_base(place, base, dtype=dtype, device=device)
    if not (place / "config.json").exists():
        models = (place / "model", *sorted(place.glob("*/model")))
        inside = [model for model in models if (model / "config.json").exists()]
        got = f"{folder} without one{f', but with {inside[0]}' if inside else ''}"
        hint = f"load {inside[0]}" if inside else "write one with fedtune export RUN --deploy"
        raise ConfigError(Fault("folder", "a folder with a config.json, as fedtune exports it", got, hint))
    return load(place, dtype=dtype, device=choose_device(device))


def prune_base(recipe: Path, base: str | Path | None, *, dtype: str, device: str) -> Any:
    """Return the base pruned to the structure of a folder `recipe`, with the adapter merged in.

    The sum is rounded to the number format in which the run held the base, and the model is cast after that.
    """
    from fedtune.model.base import DTYPES
    from fedtune.model.checkpoint import layout_from_config, load_pruned_base
    from fedtune.model.pruned_export import merge_into
    from fedtune.model.settings import ModelSettings

    adapter, saved, origin = peft.read(recipe)
    if dtype not in DTYPES:
        raise ConfigError(Fault("dtype", f"one of {', '.join(DTYPES)}", repr(dtype)))
    try:
        name, digest, model = origin["base"]["name"], origin["base"]["digest"], origin["model"]
        seed, labels = origin["seed"], origin["labels"]
        settings = ModelSettings(
            base=str(base if base is not None else name),
            revision=model["revision"],
            task=model["task"],
            dtype=model["dtype"],
            device=device,
        )
    except (KeyError, TypeError) as error:
        raise StoreError(f"{recipe / 'fedtune.json'}: expected {error} of the run; export it again") from error
    layout = layout_from_config(settings, root=Path())
    structure = store_pruning.read(recipe / store_pruning.NAME, layout, digest)
    pruned = load_pruned_base(settings, structure, root=Path(), seed=seed, labels=labels)
    if pruned.digest != digest:
        hint = "give the folder of the same model in the same revision as base"
        raise ConfigError(Fault("base", f"the base {digest[:12]} ({name})", pruned.digest[:12], hint))
    merge_into(pruned.model, structure, layout, adapter, saved)
    return pruned.model.to(DTYPES[dtype])


def deployed_ratios(run: Path, target: float) -> Mapping[str, float]:
    """Return each kind of device's ratio: the recipe's target, or what most of its clients trained with last."""
    ratios, deployed = trained_ratios(run), {}
    for kind, names in classes(run).items():
        own = sorted(ratios[name] for name in names)
        deployed[kind] = target or max(own, key=lambda ratio: (own.count(ratio), -ratio))
    return deployed


def views(
    run: Path,
    *,
    ratios: Sequence[float] | None = None,
    examples: int | None = None,
    watch: Watch = lambda event: None,
) -> Mapping[str, Any]:
    """Score a run's model in three structures: whole, as clients trained it, and as it is deployed.

    An adapter that was trained on a pruned model also makes up for the parts that are missing there, so the same
    adapter gives another loss in each structure.

    Args:
        run: the run directory.
        ratios: of the deployed models; without it those of `deployed_ratios`.
        examples: how many test examples to use; all without it.
        watch: called with a note on each model that is scored.

    Returns:
        `whole` and `deployed` (by ratio): test scores, block sparsity, parameters, milliseconds of a forward pass;
        `clients`: by client, scores on its held-out rows in the structure that it trained last.

    Raises:
        StoreError: if the folder holds no run.
        ConfigError: if the run has no ranking to prune by.
    """
    trained = load_run(run)
    recipe = trained.experiment.recipe
    pruning = recipe.pruning
    if pruning is None:
        raise ConfigError(Fault("run", "one with [pruning]", f"{run} without", "fedtune evaluate scores its model"))
    wanted = (
        checked_ratios(ratios) if ratios is not None else sorted(set(deployed_ratios(run, pruning.target).values()))
    )
    scores: dict[str, Any] = {"whole": score_ratio(trained, 0.0, examples), "deployed": {}, "clients": {}}
    for ratio in wanted:
        if ratio > 0:
            watch(Note(f"scoring the model pruned by {ratio:g}"))
            scores["deployed"][f"{ratio:g}"] = score_ratio(trained, ratio, examples)
    shards = trained.experiment.federation.clients
    for name, ratio in sorted(trained_ratios(run).items()):
        held_out = shards[name].held_out[: recipe.evaluate.client_examples] if name in shards else ()
        if held_out:
            metrics = measure_structure(trained, trained.structure(ratio), {name: held_out})[name]
            scores["clients"][name] = {"ratio": ratio, **metrics}
    return scores


def measure_structure(
    trained: TrainedRun, structure: ModelStructure | None, groups: Mapping[str, Any]
) -> Mapping[str, Mapping[str, float]]:
    """Score the global model, pruned to a structure, on groups of examples."""
    from fedtune.model import pruned_training
    from fedtune.model.evaluate import evaluate
    from fedtune.model.libraries import threads

    base, recipe, layout = trained.experiment.base, trained.experiment.recipe, trained.experiment.blueprint.anatomy
    assert layout is not None  # a run without one is not pruned
    adapter = slice_adapter(trained.tuned.adapter, cuts(structure, layout)) if structure else trained.tuned.adapter
    with threads(recipe.model.threads), pruned_training.with_pruned_model(base, structure, layout) as small:
        return evaluate(small, adapter, trained.tuned.saved, groups, batch=recipe.evaluate.batch)


def score_ratio(trained: TrainedRun, ratio: float, examples: int | None) -> Mapping[str, float]:
    """Return test scores of the model at a ratio, and what it costs: parameters, memory, time of a forward pass."""
    from fedtune.model import pruned_training
    from fedtune.model.libraries import threads
    from fedtune.model.lora import with_adapters

    experiment, structure = trained.experiment, trained.structure(ratio)
    base, recipe, layout = experiment.base, experiment.recipe, experiment.blueprint.anatomy
    assert layout is not None  # as above
    test = experiment.federation.test[:examples]
    scores = dict(measure_structure(trained, structure, {"test": test}).get("test", {}))
    scores["sparsity"] = sparsity(structure, layout) if structure else 0.0
    adapter = slice_adapter(trained.tuned.adapter, cuts(structure, layout)) if structure else trained.tuned.adapter
    with threads(recipe.model.threads), pruned_training.with_pruned_model(base, structure, layout) as small:
        sizes = [(parameter.numel(), parameter.element_size()) for parameter in small.model.parameters()]
        scores["parameters"] = sum(count for count, _ in sizes)
        scores["megabytes"] = sum(count * size for count, size in sizes) / 1e6
        with with_adapters(small, frozen=adapter, saved=trained.tuned.saved) as model:
            rows = test or next(shard.train for shard in experiment.federation.clients.values() if shard.train)
            batches = pruned_training.evaluation_rows(rows, small, key=0, batch=pruned_training.ROWS)
            scores["forward_ms"] = forward_ms(partial(pruned_training.evaluation_loss, model, batches, small))
    return scores


def forward_ms(loss: Callable[[], float]) -> float:
    """Return the median milliseconds of a forward pass; its loss is read, so that the device has finished."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        loss()
        times.append(1e3 * (time.perf_counter() - began))
    return median(times[1:])


def deploy(
    run: str | Path,
    *,
    out: str | Path | None = None,
    ratios: Sequence[float] | None = None,
    dtype: str | None = None,
    watch: Watch = lambda event: None,
) -> Path:
    """Write a run's model for each kind of device, and return the folder.

    Per ratio: `recipe/` with `pruning.json` and the adapter in the base's coordinates, which stock peft reads over the
    whole base; `model/`, the smaller model with its own width in every block, which `fedtune.load_pruned`
    reads; and where all blocks are equally wide `stock/`, which transformers loads by itself. `deploy.json` says which
    kind of device gets which.

    Args:
        run: the run directory.
        out: folder to write; `<run>/deploy` without it.
        ratios: of the models, in place of those of `deployed_ratios`.
        dtype: number format of the models; the base's own without it.
        watch: called with a note on each form that was left out, and why.

    Raises:
        StoreError: if the folder holds no run, or `out` holds files already.
        ConfigError: if the run has no ranking to prune by.
    """
    path = Path(run)
    target = Path(out) if out is not None else path / "deploy"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target}: expected a new or an empty folder; it holds files; choose another with --out")
    trained = load_run(path)
    recipe = trained.experiment.recipe
    if recipe.pruning is None:
        raise ConfigError(Fault("run", "one with [pruning]", f"{path} without", "use the form peft or merged"))
    by_class = deployed_ratios(path, recipe.pruning.target)
    wanted = sorted(set(by_class.values())) if ratios is None else checked_ratios(ratios)
    if not wanted:
        raise ConfigError(Fault("ratio", "at least one", "none was trained", "give --ratio 0.5"))
    with new_folder(target) as folder:
        written = {f"{ratio:g}": write_ratio(trained, ratio, folder, dtype=dtype, watch=watch) for ratio in wanted}
        index = {
            "devices": {kind: folder_of(ratio) for kind, ratio in by_class.items() if f"{ratio:g}" in written},
            "ratios": written,
        }
        (folder / "deploy.json").write_text(json.dumps(index, indent=1) + "\n")
    return target


def checked_ratios(ratios: Sequence[float]) -> Sequence[float]:
    """Return ratios in order without repeats: two that print alike would be written to the same folder.

    Raises:
        ConfigError: naming those that no model can be pruned by.
    """
    faults = [Fault("ratio", "numbers from 0 to 0.875", f"{ratio:g}") for ratio in ratios if not 0 <= ratio <= 0.875]
    if faults:
        raise ConfigError(faults)
    return list({f"{ratio:g}": ratio for ratio in sorted(set(ratios), reverse=True)}.values())[::-1]


def folder_of(ratio: float) -> str:
    return f"ratio-{ratio:g}"


def write_ratio(
    trained: TrainedRun, ratio: float, folder: Path, *, dtype: str | None, watch: Watch
) -> Mapping[str, Any]:
    """Write the three forms of one ratio, and return its entry in `deploy.json`."""
    from fedtune.model.base import DTYPES
    from fedtune.model.pruned_export import write, write_uniform

    experiment = trained.experiment
    base, recipe, layout = experiment.base, experiment.recipe, experiment.blueprint.anatomy
    assert layout is not None  # the run is pruned
    assert recipe.pruning is not None
    chosen = dtype or recipe.model.dtype
    if chosen not in DTYPES:
        raise ConfigError(Fault("dtype", f"one of {', '.join(DTYPES)}", repr(chosen)))
    structure = trained.structure(ratio) or full_block(layout)
    place = folder / folder_of(ratio)
    tuned, origin = result.read(trained.path)
    peft.write(place / "recipe", tuned.adapter, tuned.saved, experiment.target, origin)
    store_pruning.write(
        place / "recipe",
        structure,
        layout,
        ratio=ratio,
        settings=recipe.pruning,
        ranking=method_of(recipe).ranking(trained.state),
        base={"name": base.name, "digest": base.digest, "revision": recipe.model.revision or ""},
    )
    options: Any = {"saved": trained.tuned.saved, "dtype": chosen, "revision": recipe.model.revision}
    write(place / "model", base, structure, layout, trained.tuned.adapter, **options)
    forms = ["recipe", "model"]
    try:
        write_uniform(place / "stock", base, structure, layout, trained.tuned.adapter, **options)
        forms.append("stock")
    except ConfigError as error:
        fault = error.faults[0]
        watch(Note(f"ratio {ratio:g}: no folder stock: expected {fault.expected}; got {fault.got}; {fault.hint}"))
    return {
        "folder": folder_of(ratio),
        "forms": forms,
        "sparsity": sparsity(structure, layout),
        "digest": structure.digest.hex(),
    }
