"""What a run leaves for others to load: an adapter, a whole model, or seeds; and the model rebuilt from seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.config import Recipe
from fedtune.config.recipe import AT_SITES, PYTHON, sized_adapter
from fedtune.config.tables import bind_table
from fedtune.errors import ConfigError, Fault, StoreError
from fedtune.lora.adapter import Adapter, Factors
from fedtune.lora.lowrank import compress, truncate
from fedtune.lora.virtual_tokens import are_virtual
from fedtune.methods.method import GlobalModel, SeedModel
from fedtune.methods.settings import LinearSettings
from fedtune.model.settings import ModelSettings, without_quantisation
from fedtune.rounds.events import Note, Watch
from fedtune.rounds.selection import best_record
from fedtune.runs.base_checks import check_base
from fedtune.runs.context import bind_to_score
from fedtune.runs.personal_export import folder_name, own_model
from fedtune.store import manifest, peft, result
from fedtune.store import seeds as store_seeds
from fedtune.store.files import new_folder, store_errors
from fedtune.store.round_records import read_rounds
from fedtune.store.run_directory import check_run
from fedtune.store.training_record import training_record

if TYPE_CHECKING:
    from fedtune.directions.seed_ledger import SeedLedger
    from fedtune.model.base import Base

# The client wing takes seconds to import, so `experiment` and `model` are imported where they are needed.

FORMS = ("peft", "uniform", "merged", "ledger", "flowertune")
ROUNDS = ("best", "last")


def export(
    run: str | Path,
    *,
    form: str | None = None,
    out: str | Path | None = None,
    max_rank: int | None = None,
    dtype: str | None = None,
    round: str | None = None,
    client: str | None = None,
    watch: Watch = lambda event: None,
) -> Path:
    """Write a run's result for others to load, and return the folder.

    Args:
        run: the run directory.
        form: `peft`, the adapter with its own rank per layer; `uniform`, the same padded with zeros to one rank, for
            engines that read no rank_pattern; `merged`, a whole model of the base with the change added; `ledger`, the
            integers that a FedKSeed run consists of; `flowertune`, a folder to submit to the FlowerTune LLM
            leaderboard. Without it `peft`, or `merged` for a run of seeds, whose bank
            `kron` alone has the form of an adapter.
        out: folder to write; `<run>/<form>` without it.
        max_rank: cut every layer to its best approximation of this rank.
        dtype: number format of the merged model; the base's own without it.
        round: `best` or `last`; without it the one that the recipe keeps (`rounds.keep`).
        client: write this client's own model of a run with the table `personal`, to `<run>/<form>-<client>`.
        watch: called with a note of what a truncation or a cast has cost.

    Raises:
        StoreError: if the folder holds no run, or `out` holds files already.
        ConfigError: if the form is unknown, or the base is another than the one that was trained on.
    """
    if form is not None and form not in FORMS:
        raise ConfigError(Fault("form", f"one of {', '.join(FORMS)}", repr(form)))
    path = Path(run)
    tuned, origin = of_round(path, round) if round and client is None else open_run(path)
    if client is not None:
        tuned, own = own_model(path, client, round)
        origin = {**origin, **own}
    if remark := result.remark(path):
        watch(Note(remark))
    origin = {**origin, **sources(path)}
    form = form or ("merged" if tuned.seeds else "peft")
    if dtype is not None and form != "merged":
        raise ConfigError(Fault("dtype", "none: adapters are float32", repr(dtype), "or choose the form merged"))
    target = Path(out) if out is not None else path / (form if client is None else folder_name(form, client))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target}: expected a new or an empty folder; it holds files; choose another with --out")
    if tuned.seeds is not None:
        if form == "flowertune":
            hint = "write them with --form merged"
            raise ConfigError(Fault("form", "a run of adapters", "'flowertune' of a run of seeds", hint))
        if dtype is not None or max_rank is not None:
            got = f"dtype = {dtype!r}, max_rank = {max_rank}"
            raise ConfigError(Fault("export", "neither dtype nor max_rank: seeds give one model, to the bit", got))
        return _export_seeds(path, tuned.seeds, origin, target, form=form, watch=watch)
    if form == "ledger":
        expected = "a run of a method that moves all weights (fedkseed)"
        raise ConfigError(Fault("form", expected, f"'ledger' of a run of {origin.get('method')!r}", "choose peft"))
    adapter, saved = tuned.adapter, tuned.saved
    if are_virtual(saved) and form != "flowertune":
        refuse_form(form, max_rank)
    if max_rank is not None:
        adapter = truncate_adapter(adapter, max_rank, watch)
    if form == "merged":
        return _merge(path, adapter, saved, origin, target, dtype=dtype, watch=watch)
    if form == "flowertune":
        return _submission(path, pad(adapter), saved, origin, target)
    if form == "uniform":
        adapter = pad(adapter)
    return peft.write(target, adapter, saved, peft.read_target(path / result.ADAPTER), origin)


def refuse_form(form: str, max_rank: int | None) -> None:
    """Refuse to write virtual tokens as what they are not.

    Raises:
        ConfigError: naming the form that they have.
    """
    why = "virtual tokens are read before a text, and no change of the base's weights"
    if form != "peft":
        raise ConfigError(Fault("form", f"'peft': {why}", repr(form), "write them with --form peft"))
    if max_rank is not None:
        raise ConfigError(Fault("max_rank", f"none: {why}", str(max_rank), "leave it out"))


def _submission(run: Path, adapter: Adapter, saved: Mapping[str, Any], origin: Mapping[str, Any], target: Path) -> Path:
    from fedtune.runs.submission import Submission, write_submission

    records = tuple(record for record in read_rounds(run) if record.round <= origin.get("round", record.round))
    about = Submission(bind_to_score(run), records, len(origin["clients"]), origin)
    return write_submission(target, adapter, saved, peft.read_target(run / result.ADAPTER), about)


def sources(run: Path) -> Mapping[str, Any]:
    """Return what the manifest of every export says of its run: a chain of digests back to what the run wrote."""
    known = {"source": manifest.source(result.folder(run)), "training": training_record(run)}
    try:
        return {**known, "guard": guard(bind_to_score(run))}
    except ConfigError:
        # The recipe of a method that was a Python object cannot be read again; its adapter is exported all the same.
        return known


def guard(recipe: Recipe) -> Mapping[str, Any]:
    """Return how a run's updates were protected and bounded: they are summed in plain, under these limits."""
    rounds, method = recipe.rounds, recipe.method
    return {
        "mode": "plain",
        "max_norm": rounds.max_norm,
        "norm_cap": rounds.norm_cap,
        "weight_cap": rounds.weight_cap,
        "robust": method.robust.name if isinstance(method, LinearSettings) else "none",
    }


def _export_seeds(
    path: Path, seeds: SeedModel, origin: Mapping[str, Any], target: Path, *, form: str, watch: Watch
) -> Path:
    """Write a seed model: its ledger, the whole model with the ledger beside it, or an adapter of the bank `kron`."""
    if form == "ledger":
        return store_seeds.write(target, seeds, origin)
    # Seeds move weights and not codes; the digest of the base is that of its weights.
    bound = over_weights(bind_to_score(path))
    if form != "merged":
        check_form(form, bound.method, [])
    base = base_of(bound, origin)
    check_base(base.digest, origin, path)
    if form != "merged":
        from fedtune.runs.local import peft_target

        adapted = {f"{name}.weight" for name in base.modules}
        moved = [seeds.manifest.entries[ordinal].name for ordinal in seeds.trainable]
        check_form(form, bound.method, [name for name in moved if name not in adapted])
        factors = store_seeds.kron_adapter(seeds, transposed=base.transposed)
        # A head that the run has made is no change that a factor holds: it is written whole.
        return peft.write(target, factors, seeds.head, peft_target(bound, base), origin)
    from fedtune.model import replay as rebuilding

    with new_folder(target) as folder:
        weights = rebuilding.write(base, seeds.ledger, seeds.trainable, folder, head=seeds.head)
        store_seeds.put(folder, seeds, {**origin, "weights": weights})
    watch(Note(f"rebuilt from {seeds.ledger.bank.size} integers; digest of the weights {weights}"))
    return target


def base_of(recipe: Recipe, origin: Mapping[str, Any]) -> Base:
    """Return the base of a run; of one whose data are not here the classes are those that its result names."""
    if recipe.data.source not in (AT_SITES, PYTHON) or recipe.model.base == PYTHON:
        from fedtune.runs.local import prepare

        return prepare(recipe).base
    from fedtune.model.base import load, load_tokenizer

    adapter, tokenizer = sized_adapter(recipe), load_tokenizer(recipe.model, recipe.root)
    labels = origin.get("labels", ())
    return load(recipe.model, adapter, tokenizer=tokenizer, root=recipe.root, seed=recipe.seed, labels=labels)


def over_weights(recipe: Recipe) -> Recipe:
    """Return a recipe over the weights that the codes of its base were made of."""
    return replace(recipe, model=without_quantisation(recipe.model))


def check_form(form: str, method: Any, beyond: Sequence[str]) -> None:
    """Refuse to write seeds as an adapter where they are none; `beyond` are tensors outside of the adapted layers."""
    if method.bank == "kron" and not (method.vectors or method.embeddings or beyond):
        return
    got = f"{form!r} of a run with bank = {method.bank!r}" + (f" that moves {beyond[0]} as well" if beyond else "")
    expected = "merged or ledger: only bank = 'kron' over the weights of adapted layers has the form of an adapter"
    raise ConfigError(Fault("form", expected, got, "write the whole model with --form merged"))


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
    # Merged into the weights that were quantised, once: into codes a small change would be rounded away.
    bound = over_weights(bind_to_score(path))
    from fedtune.model.device import DTYPES
    from fedtune.model.merge import merge

    chosen = dtype or bound.model.dtype
    if chosen not in DTYPES:
        raise ConfigError(Fault("dtype", f"one of {', '.join(DTYPES)}", repr(chosen)))
    base = base_of(bound, origin)
    check_base(base.digest, origin, path)
    with new_folder(target) as folder:
        merged = merge(base, adapter, saved, dtype=chosen, revision=bound.model.revision, out=folder)
        manifest.write(folder, origin)
    watch(Note(f"merged in float32 and cast to {chosen} once: {merged.applied:.1%} of the change arrived"))
    return target


@dataclass(frozen=True)
class ReplayResult:
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
) -> ReplayResult:
    """Rebuild the tuned model from a seed ledger and its base, and return the digests.

    Args:
        base: folder or hub name of the base that the run started from.
        ledger: a run's folder `seeds`, an exported model, or a ledger alone, which names no tensors.
        out: folder to write the model to; without it only the digests are made.
        trainable: globs over the tensors that were moved, for a ledger alone; without any those that it states, which
            one with numbers for each tensor does, else all but for kron.

    Raises:
        ConfigError: if the base is another than the ledger's.
        StoreError: if the ledger cannot be read, or `out` holds files already.
        WireError: if its bytes are none.
    """
    from fedtune.directions import seed_ledger as ledgers
    from fedtune.model import replay as rebuilding

    source, target = Path(ledger), None if out is None else Path(out)
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target}: expected a new or an empty folder; it holds files; choose another with --out")
    seeds, origin = store_seeds.read(source) if source.is_dir() else (None, dict[str, Any]())
    with store_errors(source):
        seed_ledger = seeds.ledger if seeds else ledgers.decode_ledger(source.read_bytes())
    stated = stated_tensors(seed_ledger)
    if not seeds and seed_ledger.bank.name == "kron" and not trainable and not stated:
        expected = "the folder of a run's seeds, or the tensors that were moved: a kron ledger alone does not name them"
        raise ConfigError(Fault("ledger", expected, str(source), "give runs/NAME/seeds, or --trainable GLOB"))
    settings = model_settings(origin, str(base), source)
    head = seeds.head if seeds else {}
    loaded = rebuilding.base_of(
        seed_ledger,
        settings,
        head=head,
        seed=origin.get("seed", 0),
        labels=origin.get("labels", ()),
        in_full=origin.get("modules_to_save", ()),
    )
    if seeds or (stated and not trainable):
        ordinals = tuple(seeds.trainable) if seeds else stated
    else:
        from fedtune.directions.trainable import TensorSelection, trainable_ordinals

        everything = TensorSelection(seed_ledger.bank.name, trainable, vectors=True, embeddings=True)
        ordinals = trainable_ordinals(loaded.manifest, everything, loaded.matrices)
    if ordinals and ordinals[-1] >= len(loaded.manifest.entries):
        expected = f"tensors below {len(loaded.manifest.entries)}, as many as the base has"
        raise ConfigError(Fault("ledger", expected, str(ordinals[-1]), "give the ledger of a run over this base"))
    if target is None:
        weights = rebuilding.write(loaded, seed_ledger, ordinals, None, head=head)
    else:
        with new_folder(target) as folder:
            weights = rebuilding.write(loaded, seed_ledger, ordinals, folder, head=head)
    return ReplayResult(seed_ledger.manifest.hex(), seed_ledger.digest.hex(), weights, target)


def stated_tensors(ledger: SeedLedger) -> tuple[int, ...]:
    """Return the tensors that a ledger says it moves, which it does where each has numbers of its own; else none."""
    from fedtune.directions.space import Grouped

    return ledger.bank.tensors if isinstance(ledger.bank, Grouped) else ()


def model_settings(origin: Mapping[str, Any], base: str, source: Path) -> ModelSettings:
    """Return how the base of a run's seeds was loaded, as their provenance says.

    Raises:
        StoreError: if it says something else.
    """
    table = origin.get("model", {})
    if isinstance(table, dict):
        table = {"base": base, "device": "cpu", **{key: value for key, value in table.items() if value is not None}}
    faults: list[Fault] = []
    settings = bind_table(ModelSettings, table, "model", faults)
    if faults:
        raise StoreError(f"{source}: expected how the base was loaded; {faults[0]}; put back a copy")
    return settings


def open_run(run: Path) -> tuple[GlobalModel, Mapping[str, Any]]:
    """Return (global model, provenance) of a run directory.

    Raises:
        StoreError: if it is none, or holds no result.
    """
    check_run(run)
    return result.read(run)


def of_round(run: Path, round: str) -> tuple[GlobalModel, Mapping[str, Any]]:
    """Return (global model, provenance) of a run's best or last round.

    Raises:
        StoreError: if the folder is no run, or holds no result.
        ConfigError: if the round is neither, or its state is not there any more.
    """
    if round not in ROUNDS:
        raise ConfigError(Fault("round", f"one of {', '.join(ROUNDS)}", repr(round)))
    tuned, origin = open_run(run)
    schedule, records = bind_to_score(run).rounds, read_rounds(run)
    best, last = best_record(records, schedule.metric), records[-1]
    wanted = last if round == "last" else best
    if wanted is not None and wanted.round == origin.get("round"):
        return tuned, origin
    if round == "best":
        scored = f"round {best.round}, whose state was not kept" if best else "a run without scores"
        hint = 'start another one with rounds.keep = "best"'
        raise ConfigError(Fault("round", f"a run that keeps its best round by {schedule.metric}", scored, hint))
    from fedtune.runs.trained_run import load_run

    tuned = load_run(run, last=True).tuned
    return tuned, {**origin, "round": last.round, "state_digest": last.state_digest}


def truncate_adapter(adapter: Adapter, max_rank: int, watch: Watch) -> Adapter:
    """Return each layer's best approximation of at most this rank, and note what share of the change is kept."""
    if max_rank < 1:
        raise ConfigError(Fault("max_rank", "at least 1", str(max_rank)))
    whole = compress(adapter)
    short = {name: truncate(low, tau=1.0, max_rank=max_rank) for name, low in whole.items()}
    total = sum(float(np.square(low.s).sum()) for low in whole.values())
    remaining = sum(float(np.square(low.s).sum()) for low in short.values())
    watch(
        Note(f"cut to rank {max_rank}: {remaining / total if total else 1.0:.2%} of the squared singular values kept")
    )
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
