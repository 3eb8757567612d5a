"""A run's pruned models, written for devices to load, and loaded again."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.config.recipe import method_of
from fedtune.errors import ConfigError, Fault, StoreError
from fedtune.pruning.structure import full_block, sparsity
from fedtune.rounds.events import Note, Watch
from fedtune.runs.deployed_scores import exported_scores, whole_scores
from fedtune.runs.export import sources
from fedtune.runs.model_card import model_card
from fedtune.runs.trained_run import TrainedRun, checked_ratios, deployed_ratios, load_run
from fedtune.store import manifest, peft, peft_import, result
from fedtune.store import pruning as store_pruning
from fedtune.store.files import new_folder

# torch and transformers take seconds to import, so `runs.local` and `model` are imported where they are needed.


def load_pruned(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    watch: Watch = lambda event: None,
) -> Any:
    """Return the model of a folder `model` or `recipe` that `deploy` wrote: each block of its own width.

    It is a transformers model. No code in the folder is run, and one tensor is read at a time, so that memory for the
    smaller model is enough.

    Args:
        folder: `model`, which holds the weights; or `recipe`, which holds the structure and the adapter alone.
        base: for a `recipe`, folder or hub name of the base; without it the one of the run.
        dtype: number format of the model.
        device: as in a recipe's model.device.
        watch: called with a note if the files cannot be checked, since 0.2.0 wrote them without a manifest.

    Raises:
        ConfigError: if the folder is neither, or is damaged, or the base is another than the one that was pruned.
        StoreError: if a file is torn, or was changed since it was written.
    """
    from fedtune.model.deployed import load
    from fedtune.model.device import choose_device

    place = Path(folder)
    check_files(place, watch)
    if (place / store_pruning.NAME).exists():
        return prune_base(place, base, dtype=dtype, device=device)
    if not (place / "config.json").exists():
        models = (place / "model", *sorted(place.glob("*/model")))
        inside = [model for model in models if (model / "config.json").exists()]
        got = f"{folder} without one{f', but with {inside[0]}' if inside else ''}"
        hint = f"load {inside[0]}" if inside else "write one with fedtune export RUN --deploy"
        raise ConfigError(Fault("folder", "a folder with a config.json, as fedtune exports it", got, hint))
    return load(place, dtype=dtype, device=choose_device(device))


def check_files(folder: Path, watch: Watch) -> None:
    """Check all files of a folder that `deploy` wrote; those of 0.2.0 list no digests, which is noted."""
    if (folder / manifest.NAME).exists():
        opened = manifest.open_folder(folder)
        # All, and not only the weights: a tokenizer or a config may be another one just as well.
        opened.check()
        if opened.remark:
            watch(Note(opened.remark))
    elif (folder / "config.json").exists():
        watch(Note(f"{folder}: not checked: it has no {manifest.NAME}, as exports of fedtune 0.2.0"))


def prune_base(recipe: Path, base: str | Path | None, *, dtype: str, device: str) -> Any:
    """Return the base pruned to the structure of a folder `recipe`, with the adapter merged in.

    The sum is rounded to the number format in which the run held the base, and the model is cast after that.
    """
    from fedtune.model.checkpoint import layout_from_config, load_pruned_base
    from fedtune.model.device import DTYPES
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
    described = recipe / store_pruning.NAME
    structure = store_pruning.read(described, layout, digest)
    pruning = store_pruning.settings_of(described, layout, digest)
    moments = store_pruning.read_moments(described, Path(), pruning, layout, digest)
    pruned = load_pruned_base(settings, structure, root=Path(), seed=seed, labels=labels, moments=moments)
    if pruned.digest != digest:
        hint = "give the folder of the same model in the same revision as base"
        raise ConfigError(Fault("base", f"the base {digest[:12]} ({name})", pruned.digest[:12], hint))
    merge_into(pruned.model, structure, layout, adapter, saved)
    return pruned.model.to(DTYPES[dtype])


def deploy(
    run: str | Path,
    *,
    out: str | Path | None = None,
    ratios: Sequence[float] | None = None,
    dtype: str | None = None,
    watch: Watch = lambda event: None,
) -> Path:
    """Write a run's model for each kind of device, and return the folder.

    Per ratio: `recipe/` with `pruning.json` and the adapter in the base's coordinates, in peft's format (with the
    repair adapter of a run with two, which is for the pruned model alone); `model/`, the smaller model with its own
    width in every block, which `fedtune.load_pruned` reads; and where all blocks are equally wide `stock/`, which
    transformers loads by itself. `deploy.json` says which kind of device gets which, and what each model scores and
    costs (`deployed_scores.model_scores`); README.md is a model card with the same numbers.

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
        watch(Note("scoring the whole model, for comparison"))
        whole, machine = whole_scores(trained), machine_text(trained)
        index = {
            "devices": {kind: folder_of(ratio) for kind, ratio in by_class.items() if f"{ratio:g}" in written},
            "ratios": written,
            "whole": whole,
            "machine": machine,
        }
        (folder / "deploy.json").write_text(json.dumps(index, indent=1) + "\n")
        card = model_card(
            name=recipe.name,
            base=recipe.model.base,
            method=recipe.method.name,
            rounds=trained.state.round,
            clients=len(trained.experiment.fleet),
            examples=sum(trained.experiment.fleet.values()),
            whole=whole,
            ratios=written,
            machine=machine,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        manifest.write(folder, {**result.read(path)[1], **sources(path)})
    return target


def machine_text(trained: TrainedRun) -> str:
    """Return what measured: the device of the base, and its threads on a CPU."""
    threads = trained.experiment.recipe.model.threads
    device = str(trained.experiment.base.device)
    return f"{platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}" if device == "cpu" else device


def folder_of(ratio: float) -> str:
    return f"ratio-{ratio:g}"


def write_ratio(
    trained: TrainedRun, ratio: float, folder: Path, *, dtype: str | None, watch: Watch
) -> Mapping[str, Any]:
    """Write the three forms of one ratio, and return its entry in `deploy.json`."""
    from fedtune.model.device import DTYPES
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
    # Exactly what the run's file holds, but in the structure that has an adapter of its own.
    repaired = bool(trained.tuned.second) and structure.digest == trained.tuned.second_structure
    adapter = trained.tuned.at(structure) if repaired else tuned.adapter
    origin = {**origin, **sources(trained.path), "ratio": ratio}
    (place / "recipe").mkdir(parents=True)
    peft.put(place / "recipe", adapter, tuned.saved, experiment.target)
    store_pruning.write(
        place / "recipe",
        structure,
        layout,
        ratio=ratio,
        settings=recipe.pruning,
        ranking=method_of(recipe).ranking(trained.state),
        base={"name": base.name, "digest": base.digest, "revision": recipe.model.revision or ""},
        moments=trained.tuned.moments,
    )
    # Over the whole base it would count what makes up for parts that are there.
    manifest.write(place / "recipe", {**origin, peft_import.VIEW: "deployed"} if repaired else origin)
    watch(Note(f"ratio {ratio:g}: writing and scoring the model"))
    options: Any = {
        "saved": trained.tuned.saved,
        "dtype": chosen,
        "revision": recipe.model.revision,
        "moments": trained.tuned.moments,
    }
    write(place / "model", base, structure, layout, adapter, **options, manifest=True)
    manifest.write(place / "model", origin)
    forms = ["recipe", "model"]
    try:
        write_uniform(place / "stock", base, structure, layout, adapter, **options)
        manifest.write(place / "stock", origin)
        forms.append("stock")
    except ConfigError as error:
        fault = error.faults[0]
        watch(Note(f"ratio {ratio:g}: no folder stock: expected {fault.expected}; got {fault.got}; {fault.hint}"))
    return {
        "folder": folder_of(ratio),
        "forms": forms,
        "sparsity": sparsity(structure, layout),
        "digest": structure.digest.hex(),
        "measured": exported_scores(trained, place / "model", dtype=chosen),
    }
