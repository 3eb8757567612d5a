"""Plug-back: ends that clients tuned on an emulator, written as an adapter of the true base, and scored beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config import Recipe
from fedtune.config.recipe import AT_SITES, sized_adapter
from fedtune.errors import ConfigError, Fault, StoreError
from fedtune.lora.adapter import Adapter
from fedtune.methods.method import GlobalModel
from fedtune.model.emulator_facts import ENDS, EmulatorFacts, true_name
from fedtune.model.emulator_facts import NAME as FACTS
from fedtune.model.emulator_facts import read as read_facts
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.rounds.events import Note, Phase, Watch
from fedtune.runs import export as export_module
from fedtune.runs.base_checks import check_base
from fedtune.runs.context import bind_to_score
from fedtune.store import manifest, peft
from fedtune.store import seeds as store_seeds
from fedtune.store.files import new_folder
from fedtune.tensors import Tensors

if TYPE_CHECKING:
    from fedtune.data.encode import Example
    from fedtune.model.base import Base

# torch and transformers take seconds to import, so `model` and `runs.local` are imported where they are needed.

FORMS = ("peft", "uniform", "merged")
ZERO_SHOT, EMULATOR, PLUGGED_BACK, FULL = "zero-shot", "emulator tuned", "plug-back", "full tuning"


@dataclass(frozen=True)
class PluggedBack:
    """Tuned ends around the true middle."""

    path: Path
    """Folder of the adapter, or of the merged model."""
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Scores on the run's test data: of the true base, the tuned emulator, the tuned ends in the true base, and a run
    over the true base where one is given. Empty without test data."""
    gives_away: bool = False
    """Whether the tuned emulator scores as well as the plugged-back model: its clients have no need of the true one."""


def plug_back(
    run: str | Path,
    base: str | Path,
    *,
    form: str | None = None,
    out: str | Path | None = None,
    max_rank: int | None = None,
    dtype: str | None = None,
    round: str | None = None,
    full: str | Path | None = None,
    with_scores: bool = True,
    watch: Watch = lambda event: None,
) -> PluggedBack:
    """Write what a run trained on an emulator as a change of the true base, by the names of its layers.

    Args:
        run: directory of a run whose base is an emulator.
        base: the true base, by folder or hub name.
        form: peft, uniform or merged, as in `export`; peft without it.
        out: folder to write; `<run>/plug-back` without it.
        max_rank: cut every layer to its best approximation of this rank.
        dtype: number format of the merged model.
        round: best or last, as in `export`.
        full: directory of a run over the true base, to be scored beside it.
        with_scores: score all of them on the run's test data.
        watch: called with the steps.

    Raises:
        ConfigError: if the base is another than the emulator's, or the run trained its middle.
        StoreError: if a folder holds no run, or `out` holds files already.
    """
    path, form = Path(run), form or "peft"
    target = Path(out) if out is not None else path / "plug-back"
    if form not in FORMS:
        raise ConfigError(Fault("form", f"one of {', '.join(FORMS)}", repr(form)))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target}: expected a new or an empty folder; it holds files; choose another with --out")
    tuned, origin = export_module.of_round(path, round) if round else export_module.open_run(path)
    bound = bind_to_score(path)
    if bound.adapter.kind != "lora":
        expected = "a run of adapter.kind = 'lora', whose change lies in layers that the true base has too"
        raise ConfigError(Fault("plug-back", expected, repr(bound.adapter.kind), "train the ends by LoRA"))
    watch(Phase("loading the emulator"))
    emulator, facts, test = load_emulator(bound, origin, path)
    watch(Phase("loading the true base"))
    tuned = with_factors(bound, tuned, emulator)
    if max_rank is not None:  # before the scores, which are of what is written
        tuned = replace(tuned, adapter=export_module.truncate_adapter(tuned.adapter, max_rank, watch))
    saved_modules = [true_name(name, facts) for name in emulator.saved_modules]
    adapter: Adapter = {true_name(name, facts): factors for name, factors in tuned.adapter.items()}
    saved = {true_name(name, facts): array for name, array in tuned.saved.items()}
    true = load_true(bound, base, facts, saved_modules, labels=tuple(origin.get("labels", ())))
    check_same(true, emulator, facts)
    scores: Mapping[str, Mapping[str, float]] = {}
    if with_scores and test:
        watch(Phase("scoring"))
        scores = compare(bound, true, emulator, tuned, adapter, saved, test, full=full)
    elif full is not None:
        raise ConfigError(Fault("full", "test data in the recipe, on which both are scored", "none"))
    origin = {
        **origin,
        **export_module.sources(path),
        "base": {**origin.get("base", {}), "name": str(base), "digest": facts.base_digest},
        "plug_back": {"emulator": origin.get("base", {}).get("digest"), "scores": scores},
    }
    if form == "merged":
        merge_plugged(true, adapter, saved, origin, target, dtype=dtype, watch=watch)
    else:
        described = peft.Target(true.path, None, true.task, true.transposed, saved_modules)
        peft.write(target, export_module.pad(adapter) if form == "uniform" else adapter, saved, described, origin)
    return PluggedBack(target, scores, gives_away=gives_away(scores))


def load_emulator(bound: Recipe, origin: Mapping[str, Any], run: Path) -> tuple[Base, EmulatorFacts, Sequence[Example]]:
    """Return a run's base, what emulator.json says of it, and the run's test data; none where they lie at sites.

    Raises:
        ConfigError: if the base is no emulator, or another than the run's.
    """
    from fedtune.model.base import load, load_tokenizer
    from fedtune.model.base_files import locate

    settings = export_module.over_weights(bound).model
    folder = Path(locate(settings, bound.root))
    facts = read_facts(folder)
    test: Sequence[Example] = ()
    if bound.data.source == AT_SITES:
        emulator = export_module.base_of(export_module.over_weights(bound), origin)
    else:
        from fedtune.runs.local import prepare

        experiment = prepare(export_module.over_weights(bound))
        emulator, test = experiment.base, experiment.federation.test[: bound.evaluate.examples]
    check_base(emulator.digest, origin, run)
    # Also where the recipe names layers by number: emulator.json must be that of these weights.
    ends = AdapterSettings(rank=1, layers=ENDS)
    labels = tuple(origin.get("labels", ()))
    load(settings, ends, tokenizer=load_tokenizer(settings, bound.root), root=bound.root, seed=0, labels=labels)
    return emulator, facts, test


def with_factors(bound: Recipe, tuned: GlobalModel, emulator: Base) -> GlobalModel:
    """Return a run's result as an adapter: of seeds, the factors that those of the bank `kron` are.

    Raises:
        ConfigError: for seeds that have no such form.
    """
    if tuned.seeds is None:
        return tuned
    adapted = {f"{name}.weight" for name in emulator.modules}
    moved = [tuned.seeds.manifest.entries[ordinal].name for ordinal in tuned.seeds.trainable]
    export_module.check_form("plug-back", bound.method, [name for name in moved if name not in adapted])
    return GlobalModel(store_seeds.kron_adapter(tuned.seeds, transposed=emulator.transposed), tuned.seeds.head)


def load_true(
    bound: Recipe, base: str | Path, facts: EmulatorFacts, saved_modules: Sequence[str], *, labels: Sequence[str]
) -> Base:
    """Return the true base in float32, with adapters possible wherever the run could have them.

    Raises:
        ConfigError: if it is another than the emulator was made from.
    """
    from fedtune.model.base import load, load_tokenizer

    settings = ModelSettings(
        base=str(base), task=bound.model.task, dtype="float32", device=bound.model.device, pooling=bound.model.pooling
    )
    adapter = replace(sized_adapter(bound), layers=None, modules_to_save=saved_modules, rank=1)
    root = Path()
    tokenizer = load_tokenizer(settings, root)
    true = load(settings, adapter, tokenizer=tokenizer, root=root, seed=bound.seed, labels=labels)
    if true.digest != facts.base_digest:
        expected = (
            f"the base that the emulator was made from ({facts.base}, digest {facts.base_digest[:12]} in float32)"
        )
        got = f"{base} (digest {true.digest[:12]})"
        raise ConfigError(Fault("base", expected, got, "give that model in the same revision"))
    return true


def check_same(true: Base, emulator: Base, facts: EmulatorFacts) -> None:
    """Refuse an emulator whose ends, embeddings or output layer are not the true base's, in the emulator's format.

    Raises:
        ConfigError: naming the first tensor.
    """
    from fedtune.model.blocks import find_blocks
    from fedtune.model.emulator import other_end

    for base, count in ((true, facts.base_blocks), (emulator, len(facts.layers))):
        name, blocks = find_blocks(base.model)
        if (name, len(blocks)) != (facts.blocks, count):
            expected, got = (
                f"{count} blocks {facts.blocks}, as in {FACTS}",
                f"{len(blocks)} blocks {name} in {base.name}",
            )
            raise ConfigError(Fault("base", expected, got, "put back a copy of the emulator"))
    if other := other_end(true.model, emulator.model, facts, leave_out=emulator.saved_modules):
        expected, got = f"the true base's {true_name(other, facts)}", "other values in the emulator"
        raise ConfigError(Fault(other, expected, got, "export the emulator again"))


def compare(
    bound: Recipe,
    true: Base,
    emulator: Base,
    tuned: GlobalModel,
    adapter: Adapter,
    saved: Tensors,
    test: Sequence[Example],
    *,
    full: str | Path | None,
) -> Mapping[str, Mapping[str, float]]:
    """Return the scores of each model on the same test data, by name.

    Raises:
        ConfigError: if the run given for full tuning is over another base.
    """
    from fedtune.model.evaluate import evaluate
    from fedtune.model.libraries import threads

    models: dict[str, tuple[Base, Adapter, Tensors]] = {
        ZERO_SHOT: (true, {}, {}),
        EMULATOR: (emulator, tuned.adapter, tuned.saved),
        PLUGGED_BACK: (true, adapter, saved),
    }
    if full is not None:
        models[FULL] = load_full(Path(full), true)
    with threads(bound.model.threads):
        return {
            name: dict(evaluate(base, change, whole, {"test": test}, batch=bound.evaluate.batch).get("test", {}))
            for name, (base, change, whole) in models.items()
        }


def load_full(run: Path, true: Base) -> tuple[Base, Adapter, Tensors]:
    """Return a run over the true base to score, with that base as the run adapts it.

    Raises:
        ConfigError: if its base is another one.
    """
    tuned, origin = export_module.open_run(run)
    bound = export_module.over_weights(bind_to_score(run))
    base = export_module.base_of(bound, origin)
    check_base(base.digest, origin, run)
    if bound.model.dtype == "float32" and base.digest != true.digest:
        expected, got = f"a run over {true.name} (digest {true.digest[:12]})", f"one over {base.digest[:12]}"
        raise ConfigError(Fault("full", expected, got, "give a run over the true base"))
    tuned = with_factors(bound, tuned, base)
    return base, tuned.adapter, tuned.saved


def gives_away(scores: Mapping[str, Mapping[str, float]]) -> bool:
    """Return whether the tuned emulator's loss is no larger than the plugged-back model's."""
    if not {EMULATOR, PLUGGED_BACK} <= scores.keys():
        return False
    return scores[EMULATOR]["loss"] <= scores[PLUGGED_BACK]["loss"]


def merge_plugged(
    true: Base,
    adapter: Adapter,
    saved: Tensors,
    origin: Mapping[str, Any],
    target: Path,
    *,
    dtype: str | None,
    watch: Watch,
) -> None:
    """Write the true base with the tuned ends merged in."""
    from fedtune.model.device import DTYPES
    from fedtune.model.merge import merge

    chosen = dtype or "float32"
    if chosen not in DTYPES:
        raise ConfigError(Fault("dtype", f"one of {', '.join(DTYPES)}", repr(chosen)))
    with new_folder(target) as folder:
        merged = merge(true, adapter, saved, dtype=chosen, revision=None, out=folder)
        manifest.write(folder, origin)
    watch(Note(f"merged in float32 and cast to {chosen} once: {merged.applied:.1%} of the change arrived"))
