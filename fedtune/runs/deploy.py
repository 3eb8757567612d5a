"""A run's pruned models: the global one cut to what devices carry, scored beside the whole one, and written to load."""

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
from fedtune.errors import ConfigError, Fault, StoreError
from fedtune.methods import METHODS
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

# The client wing takes seconds to import, so `experiment` and `model` are imported where they are needed.

MOST_KINDS = 8
"""Kinds of devices that are told apart."""
REPEATS = 5
"""Forward passes of which the median is told."""


@dataclass(frozen=True)
class TrainedRun:
    """A run with its base and its last state loaded."""

    path: Path
    experiment: Experiment
    state: Any
    tuned: GlobalModel

    def keep(self, ratio: float) -> ModelStructure | None:
        """Return what the run's order keeps at a ratio; None: all of it.

        Raises:
            ConfigError: if the run has no order.
        """
        if ratio == 0:
            return None
        structure = getattr(self.state, "structure", None)
        keep: ModelStructure | None = structure(ratio) if structure else None
        if keep is None:
            expected = "a run that pruned by one order for all (pruning.policy nested or vote)"
            pruning = self.experiment.recipe.pruning
            got = f"the policy {pruning.policy} in {self.path}" if pruning else f"no [pruning] in {self.path}"
            raise ConfigError(Fault("ratio", expected, got, 'run it with pruning.policy = "nested"'))
        return keep


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
    return TrainedRun(run, experiment, state, METHODS[bound.method.name].tuned(state))


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
    """Return the clients that took part by kind of device; by ratio where devices are not known."""
    path = run / "summary.json"
    known = json.loads(path.read_text(encoding="utf-8")).get("devices", {}) if path.exists() else {}
    devices = known.get("clients", {})
    found: dict[str, list[str]] = {}
    for name, ratio in sorted(trained_ratios(run).items()):
        found.setdefault(devices.get(name, f"ratio-{ratio:g}"), []).append(name)
    if len(found) > MOST_KINDS:  # nearly every client is a kind of its own
        return {"every-device": [name for names in found.values() for name in names]}
    return found


def pruned_by_one_order(run: Path) -> bool:
    """Return whether a run pruned its clients by an order that holds for all of them.

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

    It is a transformers model. Nothing in the folder is run, and one tensor is read at a time: what it takes is the
    smaller model.

    Args:
        folder: `model`, which holds the weights; or `recipe`, which holds what is kept and the adapter alone.
        base: for a `recipe`, where the base lies; without it where the run had it.
        dtype: number format of the model.
        device: as in a recipe's model.device.

    Raises:
        ConfigError: if the folder is none, or is damaged, or the base is another than the one that was pruned.
        StoreError: if the adapter of a `recipe` is torn.
    """
    from fedtune.model.base import choose_device
    from fedtune.model.deployed import load

    place = Path(folder)
    if (place / store_pruning.NAME).exists():
        return cut_from_base(place, base, dtype=dtype, device=device)
    if not (place / "config.json").exists():
        inside = [each for each in (place / "model", *sorted(place.glob("*/model"))) if (each / "config.json").exists()]
        got = f"{folder} without one{f', but with {inside[0]}' if inside else ''}"
        hint = f"load {inside[0]}" if inside else "write one with fedtune export RUN --deploy"
        raise ConfigError(Fault("folder", "a folder with a config.json, as fedtune exports it", got, hint))
    return load(place, dtype=dtype, device=choose_device(device))


def cut_from_base(recipe: Path, base: str | Path | None, *, dtype: str, device: str) -> Any:
    """Return what a folder `recipe` keeps of its base, the adapter merged in.

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
    body = layout_from_config(settings, root=Path())
    keep = store_pruning.read(recipe / store_pruning.NAME, body, digest)
    found = load_pruned_base(settings, keep, root=Path(), seed=seed, labels=labels)
    if found.digest != digest:
        hint = "give the folder of the same model in the same revision as base"
        raise ConfigError(Fault("base", f"the base {digest[:12]} ({name})", found.digest[:12], hint))
    merge_into(found.model, keep, body, adapter, saved)
    return found.model.to(DTYPES[dtype])


def deployed_ratios(run: Path, target: float) -> Mapping[str, float]:
    """Return what each kind of device gets: the target, or where none is set what most of its clients trained last."""
    ratios, found = trained_ratios(run), {}
    for kind, names in classes(run).items():
        own = sorted(ratios[name] for name in names)
        found[kind] = target or max(own, key=lambda ratio: (own.count(ratio), -ratio))
    return found


def views(
    run: Path,
    *,
    ratios: Sequence[float] | None = None,
    examples: int | None = None,
    watch: Watch = lambda event: None,
) -> Mapping[str, Any]:
    """Score a run's model in the three ways that differ: whole, as clients trained it, and as it is deployed.

    What is learned on a pruned model also repairs what is missing there, so the same change is worth another loss in
    each of them.

    Args:
        run: the run directory.
        ratios: of the deployed models; what each kind of device gets without it.
        examples: how many test examples to use; all without it.
        watch: told what is being scored.

    Returns:
        `whole` and `deployed` (by ratio): test scores, block sparsity, parameters, milliseconds of a forward pass;
        `clients`: by client, scores on its held-out rows in the structure that it trained last.

    Raises:
        StoreError: if the folder holds no run.
        ConfigError: if the run has no order to prune by.
    """
    trained = load_run(run)
    recipe = trained.experiment.recipe
    pruning = recipe.pruning
    if pruning is None:
        raise ConfigError(Fault("run", "one with [pruning]", f"{run} without", "fedtune evaluate scores its model"))
    wanted = (
        checked_ratios(ratios) if ratios is not None else sorted(set(deployed_ratios(run, pruning.target).values()))
    )
    found: dict[str, Any] = {"whole": score_ratio(trained, 0.0, examples), "deployed": {}, "clients": {}}
    for ratio in wanted:
        if ratio > 0:
            watch(Note(f"scoring the model pruned by {ratio:g}"))
            found["deployed"][f"{ratio:g}"] = score_ratio(trained, ratio, examples)
    shards = trained.experiment.federation.clients
    for name, ratio in sorted(trained_ratios(run).items()):
        held_out = shards[name].held_out[: recipe.evaluate.client_examples] if name in shards else ()
        if held_out:
            metrics = measure_structure(trained, trained.keep(ratio), {name: held_out})[name]
            found["clients"][name] = {"ratio": ratio, **metrics}
    return found


def measure_structure(
    trained: TrainedRun, keep: ModelStructure | None, groups: Mapping[str, Any]
) -> Mapping[str, Mapping[str, float]]:
    """Score the global model, pruned to a structure, on groups of examples."""
    from fedtune.model import pruned_training
    from fedtune.model.evaluate import evaluate
    from fedtune.model.libraries import threads

    base, recipe, body = trained.experiment.base, trained.experiment.recipe, trained.experiment.blueprint.anatomy
    assert body is not None  # a run without one is not pruned
    adapter = slice_adapter(trained.tuned.adapter, cuts(keep, body)) if keep else trained.tuned.adapter
    with threads(recipe.model.threads), pruned_training.with_pruned_model(base, keep, body) as small:
        return evaluate(small, adapter, trained.tuned.saved, groups, batch=recipe.evaluate.batch)


def score_ratio(trained: TrainedRun, ratio: float, examples: int | None) -> Mapping[str, float]:
    """Return test scores of the model at a ratio, and what it costs: parameters, memory, time of a forward pass."""
    from fedtune.model import pruned_training
    from fedtune.model.libraries import threads
    from fedtune.model.lora import with_adapters

    experiment, keep = trained.experiment, trained.keep(ratio)
    base, recipe, body = experiment.base, experiment.recipe, experiment.blueprint.anatomy
    assert body is not None  # as above
    test = experiment.federation.test[:examples]
    found = dict(measure_structure(trained, keep, {"test": test}).get("test", {}))
    found["sparsity"] = sparsity(keep, body) if keep else 0.0
    adapter = slice_adapter(trained.tuned.adapter, cuts(keep, body)) if keep else trained.tuned.adapter
    with threads(recipe.model.threads), pruned_training.with_pruned_model(base, keep, body) as small:
        sizes = [(parameter.numel(), parameter.element_size()) for parameter in small.model.parameters()]
        found["parameters"] = sum(count for count, _ in sizes)
        found["megabytes"] = sum(count * size for count, size in sizes) / 1e6
        with with_adapters(small, frozen=adapter, saved=trained.tuned.saved) as model:
            rows = test or next(shard.train for shard in experiment.federation.clients.values() if shard.train)
            batches = pruned_training.evaluation_rows(rows, small, key=0, batch=pruned_training.ROWS)
            found["forward_ms"] = forward_ms(partial(pruned_training.evaluation_loss, model, batches, small))
    return found


def forward_ms(loss: Callable[[], float]) -> float:
    """Return the median time of a forward pass that ends in a number, so that the device has finished."""
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
    """Write what each kind of device gets of a run's model, and return the folder.

    Per ratio: `recipe/` with `pruning.json` and the adapter in the base's coordinates, which stock peft reads over the
    whole base; `model/`, the smaller model with its own width in every block, which `fedtune.load_pruned`
    reads; and where all blocks are equally wide `stock/`, which transformers loads by itself. `deploy.json` says which
    kind of device gets which.

    Args:
        run: the run directory.
        out: folder to write; `<run>/deploy` without it.
        ratios: what to write in place of what the devices trained.
        dtype: number format of the models; the base's own without it.
        watch: told what was left out, and why.

    Raises:
        StoreError: if the folder holds no run, or `out` holds files already.
        ConfigError: if the run has no order to prune by.
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
        told = {f"{ratio:g}": write_ratio(trained, ratio, folder, dtype=dtype, watch=watch) for ratio in wanted}
        index = {
            "devices": {kind: folder_of(ratio) for kind, ratio in by_class.items() if f"{ratio:g}" in told},
            "ratios": told,
        }
        (folder / "deploy.json").write_text(json.dumps(index, indent=1) + "\n")
    return target


def checked_ratios(ratios: Sequence[float]) -> Sequence[float]:
    """Return ratios in order, each once; those that are told alike would be written to one folder.

    Raises:
        ConfigError: naming those that no model can be pruned by.
    """
    faults = [Fault("ratio", "numbers from 0 to 0.875", f"{each:g}") for each in ratios if not 0 <= each <= 0.875]
    if faults:
        raise ConfigError(faults)
    return list({f"{ratio:g}": ratio for ratio in sorted(set(ratios), reverse=True)}.values())[::-1]


def folder_of(ratio: float) -> str:
    return f"ratio-{ratio:g}"


def write_ratio(
    trained: TrainedRun, ratio: float, folder: Path, *, dtype: str | None, watch: Watch
) -> Mapping[str, Any]:
    """Write the three forms of one ratio, and return what `deploy.json` says of it."""
    from fedtune.model.base import DTYPES
    from fedtune.model.pruned_export import write, write_uniform

    experiment = trained.experiment
    base, recipe, body = experiment.base, experiment.recipe, experiment.blueprint.anatomy
    assert body is not None  # the run is pruned
    assert recipe.pruning is not None
    chosen = dtype or recipe.model.dtype
    if chosen not in DTYPES:
        raise ConfigError(Fault("dtype", f"one of {', '.join(DTYPES)}", repr(chosen)))
    keep = trained.keep(ratio) or full_block(body)
    place = folder / folder_of(ratio)
    tuned, origin = result.read(trained.path)
    peft.write(place / "recipe", tuned.adapter, tuned.saved, experiment.target, origin)
    store_pruning.write(
        place / "recipe",
        keep,
        body,
        ratio=ratio,
        settings=recipe.pruning,
        order=getattr(trained.state, "order", {}),
        base={"name": base.name, "digest": base.digest, "revision": recipe.model.revision or ""},
    )
    options: Any = {"saved": trained.tuned.saved, "dtype": chosen, "revision": recipe.model.revision}
    write(place / "model", base, keep, body, trained.tuned.adapter, **options)
    forms = ["recipe", "model"]
    try:
        write_uniform(place / "stock", base, keep, body, trained.tuned.adapter, **options)
        forms.append("stock")
    except ConfigError as error:
        fault = error.faults[0]
        watch(Note(f"ratio {ratio:g}: no folder stock: expected {fault.expected}; got {fault.got}; {fault.hint}"))
    return {"folder": folder_of(ratio), "forms": forms, "sparsity": sparsity(keep, body), "digest": keep.digest.hex()}
