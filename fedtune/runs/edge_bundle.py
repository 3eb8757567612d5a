"""Bundles of a base for devices: written, compared with torch at the base and around it, and only then signed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedtune.config import bind_for_sites
from fedtune.config.recipe import sized_adapter
from fedtune.directions.kron import Kron
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.trainable import TensorSelection, trainable_ordinals
from fedtune.edge import bundle as bundles
from fedtune.edge.bundle import BundleFacts, Module, read_bundle
from fedtune.errors import ConfigError, ExtraError, Fault, StoreError
from fedtune.link.pki.identity import load_identity
from fedtune.link.provenance import Signer, sign_folder
from fedtune.model.settings import AdapterSettings, ModelSettings, same_everywhere, without_quantisation
from fedtune.probing.rows import PaddedRows
from fedtune.probing.steps import Move
from fedtune.rounds.events import Phase, Watch
from fedtune.runs.context import bind_to_score
from fedtune.seeds import derive, generator
from fedtune.store import manifest
from fedtune.store.files import fill, new_folder

if TYPE_CHECKING:
    from fedtune.model.base import Base

Dtype = Literal["float32", "int8"]
DTYPES: Sequence[Dtype] = ("float32", "int8")
TOLERANCE = 1e-4
"""Largest difference of a loss from torch's: absolute up to a loss of 1, relative beyond."""
SMALL_STEP, SMALL_DIFFERENCE = 1, 1e-3
"""One unit of 2^-20, about 1e-6, along a direction, and by how much it may change a loss: more is rounding noise."""
SEEDS, EXPONENT, LARGEST = 256, 20, 300
"""Of the ledger at which the graph is compared: weights differ from the base's by .003, as after many rounds."""
PERTURBATION = 1000
"""Of the two sides, in units of 2^-20: about 1e-3."""
ROWS, LENGTH = 3, 48
"""Texts that are compared, and their longest in tokens."""
PARTS: Mapping[str, str] = {
    "weights.safetensors": "weights",
    "weights.gguf": "weights",
    "graph.onnx": "graph",
    "head.onnx": "graph",
}


@dataclass(frozen=True)
class ExportedBundle:
    """A bundle as it was written."""

    path: Path
    sizes: Mapping[str, int]
    """Bytes of weights, graph, and the rest."""
    difference: float
    """Largest relative difference of a loss from torch's."""
    signer: str
    """Coordinator that has signed it; empty without an identity."""


def export_bundle(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    identity: Path | None = None,
    watch: Watch = lambda event: None,
) -> ExportedBundle:
    """Write the base of a recipe, of a run, or a model itself, as a bundle that devices run without torch.

    Args:
        source: a recipe, a run directory, or a base as `model.base` names it.
        out: folder to write, new or empty.
        dtype: of the weights: float32, or int8, which takes a quarter of the space; both compute in float32.
        identity: folder of the coordinator's keys; without it the bundle is not signed.
        watch: called with the steps.

    Raises:
        ConfigError: if the base cannot be run on devices, or the graph's losses are others than torch's.
        ExtraError: if the package that writes graphs is not installed.
        StoreError: if `out` holds files already.
    """
    target = Path(out)
    check_free(target)
    if dtype not in DTYPES:
        hint = "activations are never rounded: a step's two losses would differ by the rounding"
        raise ConfigError(Fault("dtype", f"one of {', '.join(DTYPES)}", repr(dtype), hint))
    # Before the base is loaded, which may take minutes.
    signer = read_signer(identity)
    watch(Phase("loading the base"))
    base = load_base(read_source(source))
    return write_bundle(base, target, dtype=dtype, signer=signer, watch=watch)  # type: ignore[arg-type]


def check_free(target: Path) -> None:
    """Raise StoreError unless a bundle can be written to a folder: a new one, or an empty one."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target}: expected a new or an empty folder; it holds files; choose another with --edge")


def read_signer(identity: Path | None) -> Signer | None:
    """Return the coordinator that signs, by the folder of its keys; None without one."""
    party = None if identity is None else load_identity(identity, role="coordinator", now=int(time.time()))
    return None if party is None else Signer(party.federation, party.name, party.key)


@dataclass(frozen=True)
class Source:
    """Where a bundle's base is, and in which form its sites hold it."""

    model: ModelSettings
    adapter: AdapterSettings
    root: Path
    seed: int


def read_source(source: str | Path) -> Source:
    """Return the base of a recipe, of a run, or by its own name, in the number format that sites hold it in.

    Raises:
        ConfigError: if the recipe is for classification.
    """
    path = Path(source)
    adapter, root, seed = AdapterSettings(rank=1), Path(), 0
    is_run = (path / "recipe.toml").is_file()
    if is_run or path.suffix == ".toml":
        recipe = bind_to_score(path) if is_run else bind_for_sites(path)
        model, adapter, root, seed = recipe.model, sized_adapter(recipe), recipe.root, recipe.seed
    else:
        model = ModelSettings(base=str(source))
    if model.task != "causal" or adapter.modules_to_save or adapter.kind != "lora":
        expected = "a causal base without adapter.modules_to_save, and adapter.kind = 'lora', for devices"
        got = f"{model.task}, modules_to_save = {list(adapter.modules_to_save)}, kind = {adapter.kind!r}"
        raise ConfigError(Fault("model.task", expected, got, "let its sites run clients with torch"))
    return Source(replace(same_everywhere(without_quantisation(model)), device="cpu"), adapter, root, seed)


def load_base(source: Source) -> Base:
    """Return a bundle's base in torch.

    Raises:
        ConfigError: if there is none.
    """
    from fedtune.model.base import load, load_tokenizer

    settings, root = source.model, source.root
    return load(settings, source.adapter, tokenizer=load_tokenizer(settings, root), root=root, seed=source.seed)


def write_bundle(
    base: Base, target: Path, *, dtype: Dtype, signer: Signer | None, watch: Watch = lambda event: None
) -> ExportedBundle:
    """Write a bundle of a loaded base; a folder that does not pass the comparison is not left behind.

    Raises:
        ConfigError: if the graphs do not compute such a base, or give other losses than torch.
        ExtraError: if the package that writes graphs is not installed.
    """
    try:
        from fedtune.model.onnx_config import read_architecture
        from fedtune.model.onnx_graph import WEIGHTS, write_graphs
        from fedtune.model.onnx_weights import write_weights
    except ImportError as error:
        hint = 'run pip install "fedtune[onnx]"'
        raise ExtraError(f"expected the packages onnx and onnxruntime; got {error}; {hint}") from error
    from fedtune.model.base import to_numpy

    architecture = read_architecture(base.model.config.to_dict())
    parameters = dict(base.model.named_parameters())
    shapes = {entry.name: entry.shape for entry in base.manifest.entries}
    rounded = rounded_axes(base, shapes) if dtype == "int8" else {}
    with new_folder(target) as folder:
        watch(Phase("writing the weights"))
        stored = write_weights(folder / WEIGHTS, shapes, lambda name: to_numpy(parameters[name]), rounded=rounded)
        write_graphs(folder, architecture, stored, list(base.modules))
        fill(folder / bundles.TENSORS, base.manifest.encode())
        write_tokenizer(base.tokenizer, folder)
        facts = facts_of(base, architecture.family, dtype)
        # A local folder's path is none of the devices' business.
        name = Path(base.name).name
        manifest.write(folder, bundles.manifest_facts(facts, base_name=name, base_digest=base.digest))
        watch(Phase("comparing its losses with torch's"))
        difference = compare(base, folder, rounded)
        if signer is not None:
            sign_folder(folder, signer, now=int(time.time()))
    return ExportedBundle(target, sizes_of(target), difference, signer.name if signer else "")


def facts_of(base: Base, family: str, dtype: Dtype) -> BundleFacts:
    """Return what the manifest says of a base."""
    from fedtune.client.site import blocks

    return BundleFacts(
        runtime="onnx",
        family=family,
        dtype=dtype,
        layers=tuple(sorted(base.matrices)),
        modules={name: Module(out, width) for name, (out, width) in base.modules.items()},
        transposed=base.transposed,
        parameters=base.num_parameters,
        positions=base.positions,
        vocabulary=base.model.config.vocab_size,
        pad_id=base.pad_id,
        eos_ids=end_ids(base),
        bos_id=base.tokenizer.bos_token_id,
        # The server compares it between clients: without it devices and torch clients would not take part in one run.
        anatomy=blocks(base),
    )


def end_ids(base: Base) -> tuple[int, ...]:
    """Return the tokens that end a text, as transformers' generate does."""
    named = base.model.generation_config.eos_token_id
    named = base.model.config.eos_token_id if named is None else named
    return tuple(named) if isinstance(named, list | tuple) else () if named is None else (int(named),)


def rounded_axes(base: Base, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, int]:
    """Return the matrices that are held in 8 bits, with the axis of their outputs: layers, embeddings and head."""
    tables = ("model.embed_tokens.weight", "transformer.wte.weight", "lm_head.weight")
    layers = dict.fromkeys((f"{name}.weight" for name in base.modules), 1 if base.transposed else 0)
    return {**layers, **{name: 0 for name in tables if name in shapes}}


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files that devices read.

    Raises:
        ConfigError: if it is none that the package `tokenizers` reads.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        if not (Path(scratch) / bundles.TOKENIZER).is_file():
            expected, got = f"a tokenizer with a {bundles.TOKENIZER}", type(tokenizer).__name__
            raise ConfigError(Fault("model.base", expected, got, "convert it with transformers, and save it again"))
        for name in bundles.WORDS:
            if (file := Path(scratch) / name).is_file():
                fill(folder / name, file.read_bytes())


def compare(base: Base, folder: Path, rounded: Mapping[str, int]) -> float:
    """Return the largest difference of the graph's losses from torch's: at the base, and around weights far from it.

    Codes in 8 bits are compared with torch at the weights that they are codes of.

    Raises:
        ConfigError: if one is beyond the tolerance, or a loss changes with steps that are too small to change it.
    """
    from fedtune.edge.runtime import load_runtime
    from fedtune.model.onnx_reference import in_float32, losses_at

    reference = in_float32(base, rounded)
    bank = Kron(SEEDS, derive(0, "export.directions"))
    draw = generator(derive(0, "export.sums"))
    sums = draw.integers(-LARGEST, LARGEST + 1, SEEDS).astype(np.int32)
    ledgers = [
        SeedLedger(bank, EXPONENT, 0, base.manifest.digest, accumulators)
        for accumulators in (np.zeros(SEEDS, np.int32), sums)
    ]
    moves: Sequence[Move] = [(0, 0), *((seed, side * PERTURBATION) for seed in (37, 200) for side in (-1, 1))]
    close: Sequence[Move] = [(37, -SMALL_STEP), (37, SMALL_STEP)]
    trainable = trainable_ordinals(base.manifest, TensorSelection("kron"), base.matrices)
    rows, worst = sample_rows(base), 0.0
    runtime = load_runtime(read_bundle(folder), threads=1)
    for ledger in ledgers:
        expected = np.array(losses_at(reference, ledger, trainable, rows, moves))
        with runtime.at(ledger, trainable) as device:
            got, (minus, plus) = np.array(device.losses(rows, moves)), device.losses(rows, close)
        differences = np.abs(got - expected) / np.maximum(1.0, np.abs(expected))
        worst = max(worst, float(differences.max()))
        # Not `>`: a loss that is not a number differs too.
        if not worst <= TOLERANCE:
            where = int(differences.argmax())
            expectation = f"a loss of {expected[where]:.6f}, as torch computes it"
            hint = "the graph is not this model's, and nothing was signed; let its sites run clients with torch"
            raise ConfigError(Fault("model.base", expectation, f"{got[where]:.6f} from the graph", hint))
        if not abs(plus - minus) <= SMALL_DIFFERENCE:
            expectation = f"losses 1e-6 apart to differ by less than {SMALL_DIFFERENCE}"
            raise ConfigError(Fault("model.base", expectation, f"{abs(plus - minus):.2e}", "nothing was signed"))
    return worst


def sample_rows(base: Base) -> PaddedRows:
    """Return rows of unequal length, over the whole vocabulary, in part of which nothing counts."""
    draw, longest = generator(derive(0, "export.rows")), min(LENGTH, base.positions)
    vocabulary = base.model.config.vocab_size
    ids, labels = (np.full((ROWS, longest), value, np.int64) for value in (base.pad_id, -100))
    mask = np.zeros_like(ids)
    for row in range(ROWS):
        length = max(2, longest * (row + 1) // ROWS)
        ids[row, :length] = draw.integers(0, vocabulary, length)
        mask[row, :length] = 1
        labels[row, length // 3 : length] = ids[row, length // 3 : length]
    return PaddedRows(ids, mask, labels, count=int((labels[:, 1:] != -100).sum()), tokens=int(mask.sum()))


def sizes_of(folder: Path) -> Mapping[str, int]:
    """Return the bytes of weights, graph and everything else in a bundle."""
    sizes = {"weights": 0, "graph": 0, "rest": 0}
    for file in folder.iterdir():
        sizes[PARTS.get(file.name, "rest")] += file.stat().st_size
    return sizes
