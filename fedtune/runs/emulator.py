"""Emulators of a base, written for clients that must not have all of it: `fedtune export BASE --form emulator`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config import bind_for_sites
from fedtune.data.encode import Example, encode_causal, pack
from fedtune.data.settings import DataSettings, Split
from fedtune.data.source import read_source
from fedtune.errors import ConfigError, Fault, StoreError
from fedtune.model import emulator_facts as facts_module
from fedtune.model.emulator_facts import EmulatorFacts, Kind, Select, middle_layers
from fedtune.model.settings import QUANTISED, AdapterSettings, ModelSettings, QuantisedFormat
from fedtune.rounds.events import Note, Phase, Watch
from fedtune.runs.context import bind_to_score
from fedtune.store import manifest
from fedtune.store.files import fill, new_folder

if TYPE_CHECKING:
    from fedtune.model.base import Base
    from fedtune.model.distill import DistillSettings

# torch and transformers take seconds to import, so `model` is imported where it is needed.

ROW_TOKENS = 256
"""Longest row that is distilled on."""
PARTS = 10
"""Notes of a distillation's progress."""


@dataclass(frozen=True)
class EmulatorSettings:
    """What of a base an emulator keeps, and how the rest is made smaller."""

    front: int = 1
    """First blocks, which clients tune."""
    back: int = 1
    """Last blocks, which clients tune."""
    drop: float = 0.5
    """Share of the middle's blocks that are dropped; with `prune`, of its heads and channels. Not of `quantise`."""
    kind: Kind = "drop"
    """drop: fewer blocks; prune: zeros for whole heads and channels; quantise: values of codes in 4 or 8 bits."""
    select: Select = "round"
    """How the places of the blocks that stay are made whole numbers."""
    codes: QuantisedFormat = "nf4"
    """Of a quantised middle."""
    seed: int = 0
    """Of the order in which the public text is read."""


@dataclass(frozen=True)
class ExportedEmulator:
    """An emulator as it was written."""

    path: Path
    facts: EmulatorFacts
    parameters: int
    """Weights of it."""
    base_parameters: int
    """Weights of the true base."""


def export_emulator(
    source: str | Path,
    out: str | Path,
    settings: EmulatorSettings = EmulatorSettings(),  # frozen
    *,
    dtype: str | None = None,
    text: Path | None = None,
    distill: DistillSettings | None = None,
    watch: Watch = lambda event: None,
) -> ExportedEmulator:
    """Write an emulator of a base: a model folder of its own, with `emulator.json` beside the weights.

    Args:
        source: a recipe, a run directory, or the base as `model.base` names it.
        out: folder to write, new or empty.
        settings: what it keeps; without them one block at each end, and half of the middle.
        dtype: number format of the weights; the checkpoint's own without it.
        text: public text in a file that `data.source` could name, by which the middle is distilled; none: it is not.
        distill: how long and towards what, with text.
        watch: called with the steps.

    Raises:
        ConfigError: if the base has no such blocks, or its blocks cannot stand at other places.
        StoreError: if `out` holds files already.
    """
    from fedtune.model.device import DTYPES

    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target}: expected a new or an empty folder; it holds files; choose another with --out")
    settings = settings or EmulatorSettings()
    check_settings(settings, dtype, DTYPES)
    watch(Phase("loading the base"))
    base, stored = load_true_base(source)
    from fedtune.model.base_sizes import missing_names
    from fedtune.model.blocks import find_blocks

    name, blocks = find_blocks(base.model)
    emulator, layers, distilled = build(base, settings, text=text, distill=distill, watch=watch)
    # A classification head that the checkpoint lacks is drawn by each run's seed, and no part of a base.
    left_out = missing_names(emulator, Path(base.path)) if Path(base.path).is_dir() else ()
    facts = EmulatorFacts(
        base=Path(base.name).name,
        base_digest=base.digest,
        base_blocks=len(blocks),
        blocks=name,
        front=settings.front,
        back=settings.back,
        layers=layers,
        kind=settings.kind,
        ratio=0.0 if settings.kind == "quantise" else settings.drop,
        select=settings.select,
        codes=settings.codes if settings.kind == "quantise" else None,
        dtype=dtype or stored,
        seed=settings.seed,
        distilled=distilled,
        digests={},
    )
    watch(Phase("writing it"))
    with new_folder(target) as folder:
        facts = write_model(folder, base, emulator, facts, left_out=left_out)
        origin = {"fedtune": version("fedtune"), "base": {"name": facts.base, "digest": base.digest}}
        manifest.write(folder, {**origin, "emulator": {"layers": layers, "kind": settings.kind}})
    size = sum(parameter.numel() for parameter in emulator.parameters())
    return ExportedEmulator(target, facts, size, base.num_parameters)


def build(
    base: Base, settings: EmulatorSettings, *, text: Path | None, distill: DistillSettings | None, watch: Watch
) -> tuple[Any, Sequence[int], Mapping[str, Any] | None]:
    """Return an emulator, the base's block that each of its blocks is, and what its distillation was."""
    from fedtune.model.blocks import find_blocks
    from fedtune.model.distill import Distilled, DistillSettings
    from fedtune.model.distill import distill as run_distillation
    from fedtune.model.emulator import build_emulator, middle_names, projection_of, write_projected

    count, (a, b) = len(find_blocks(base.model)[1]), (settings.front, settings.back)
    chosen = middle_layers(count, a, b, settings.drop if settings.kind == "drop" else 0.0, settings.select)
    layers = [*range(a), *chosen, *range(count - b, count)]
    rows = read_text(text, base) if text else []
    middle = range(a, a + len(chosen))
    projection = projection_of(base.model, settings.kind, middle, ratio=settings.drop, codes=settings.codes)
    watch(Phase("building the emulator"))
    emulator = build_emulator(base.model, layers, task=base.task)
    free = middle_names(emulator, middle)
    if text is None:
        write_projected(emulator, free, projection)
        return emulator, layers, None
    distill = distill or DistillSettings()
    every = max(1, distill.steps // PARTS)

    def show(step: int, error: float) -> None:
        if step % every == 0:
            watch(Note(f"distilled {step} of {distill.steps} steps: relative error of the middle {error:.3g}"))

    watch(Phase("distilling its middle"))
    course: Distilled = run_distillation(
        base,
        emulator,
        rows,
        distill,
        front=a,
        back=b,
        free=free,
        projection=projection,
        seed=settings.seed,
        on_step=show,
    )
    few = min(len(course.errors), every)
    ends = {"first_error": sum(course.errors[:few]) / few, "last_error": sum(course.errors[-few:]) / few}
    return emulator, layers, {**asdict(distill), "rows": len(rows), **ends}


def write_model(
    folder: Path, base: Base, emulator: Any, facts: EmulatorFacts, *, left_out: Sequence[str]
) -> EmulatorFacts:
    """Write an emulator into a folder of `new_folder`, with emulator.json, and return the facts with its digests.

    Raises:
        ConfigError: if it is read back as another model.
    """
    from fedtune.model.base import digest
    from fedtune.model.device import DTYPES
    from fedtune.model.libraries import quiet

    emulator = emulator.to(DTYPES[facts.dtype])
    with quiet():
        tensors = {key: tensor for key, tensor in emulator.state_dict().items() if key not in left_out}
        emulator.save_pretrained(folder, state_dict=tensors)
        base.tokenizer.save_pretrained(folder)
    digests = {kind: digest_as_loaded(folder, base.task, kind, base.model.config) for kind in DTYPES}
    if digests["float32"] != digest(emulator.float(), leave_out=left_out):
        got = f"others: a {base.model.config.model_type} is stored in another form than it is held in"
        raise ConfigError(Fault("model.base", "the weights that were written", got, "choose another base"))
    facts = replace(facts, digests=digests)
    fill(folder / facts_module.NAME, facts_module.encode(facts))
    return facts


def check_settings(settings: EmulatorSettings, dtype: str | None, dtypes: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting that is none of its choices, before the base is loaded."""
    faults = [
        Fault(name, f"one of {', '.join(choices)}", repr(value))
        for name, value, choices in (
            ("kind", settings.kind, facts_module.KINDS),
            ("select", settings.select, facts_module.SELECTIONS),
            ("codes", settings.codes, QUANTISED),
            ("dtype", dtype or "float32", tuple(dtypes)),
        )
        if value not in choices
    ]
    if settings.seed < 0:
        faults.append(Fault("seed", "a whole number from 0", str(settings.seed)))
    if faults:
        raise ConfigError(faults)


def load_true_base(source: str | Path) -> tuple[Base, str]:
    """Return the base of a recipe, of a run, or by its own name, in float32, and the format of its checkpoint.

    Raises:
        ConfigError: if there is none.
    """
    from fedtune.model.base import load, load_tokenizer
    from fedtune.model.base_config import read_config
    from fedtune.model.base_files import locate, readable
    from fedtune.model.device import DTYPES, name_of

    path, root, labels = Path(source), Path(), tuple[str, ...]()
    model, seed = ModelSettings(base=str(source)), 0
    is_run = (path / "recipe.toml").is_file()
    if is_run or path.suffix == ".toml":
        recipe = bind_to_score(path) if is_run else bind_for_sites(path)
        model, root, seed = recipe.model, recipe.root, recipe.seed
        labels = tuple(recipe.data.labels or ()) if model.task == "classification" else ()
    model = replace(model, dtype="float32", unquantised="float32", digest=None)
    adapter = AdapterSettings(rank=1)
    base = load(model, adapter, tokenizer=load_tokenizer(model, root), root=root, seed=seed, labels=labels)
    config, _ = read_config(readable(locate(model, root), model.revision), model, labels)
    # The base's own config says how it was loaded, and not how it is stored.
    config, _ = read_config(readable(locate(model, root), model.revision), model, labels)
    dtype: Any = getattr(config, "dtype", None)
    return base, name_of(dtype) if dtype in DTYPES.values() else "float32"


def read_text(text: Path, base: Base) -> Sequence[Example]:
    """Return public text in rows of the same length, as far as it fills them.

    Raises:
        ConfigError: if there is no such file, or no text in it.
    """
    settings = DataSettings(
        source=str(text), split=Split("iid", clients=1), template="plain", max_tokens=min(ROW_TOKENS, base.positions)
    )
    try:
        source = read_source(settings, Path(), task="causal")
    except ConfigError as error:
        # The settings are not the user's own: of them only the file is.
        faults = [replace(fault, path="distill") for fault in error.faults]
        raise ConfigError(faults) from error
    columns = {name: source.rows.column(name) for name in source.rows.names}
    encoded = encode_causal(columns, settings, base.tokenizer, place=source.place)
    examples = [example for example in encoded.examples if example is not None and len(example.input_ids) > 1]
    return pack(examples, max_tokens=settings.max_tokens)


def digest_as_loaded(folder: Path, task: str, dtype: str, config: Any) -> str:
    """Return the digest of a written model as a client loads it in a number format, without a head drawn anew."""
    from fedtune.model.base import digest, read_whole
    from fedtune.model.base_config import read_config

    settings = ModelSettings(base=str(folder), task=task, dtype=dtype)  # type: ignore[arg-type]
    labels = list(config.id2label.values()) if task == "classification" else ()
    read, classes = read_config(folder, settings, labels)
    model, new, _ = read_whole(settings, folder, read, classes, seed=0)
    return digest(model, leave_out=new)
