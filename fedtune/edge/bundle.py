"""A bundle: the folder by which a device without torch runs a base, listed with digests and signed by its coordinator.

`fedtune.json`, the manifest of every folder that fedtune writes, also says what is in it (`BundleFacts`). Beside the
files of its runtime a bundle holds `manifest.ftkm`, the list of the base's tensors in their source number format: seed
directions and the digest of a run's state follow from that list, so every client of a run has the same one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedtune.directions.seed_ledger import Manifest, decode_manifest
from fedtune.errors import ConfigError, Fault, StoreError, WireError
from fedtune.link.pki.roster import Roster
from fedtune.link.provenance import verify_folder
from fedtune.pruning.structure import BlockLayout
from fedtune.store import manifest as manifests
from fedtune.store import typed_json
from fedtune.store.manifest import ResultFolder

KEY, FORMAT = "bundle", 1
TENSORS = "manifest.ftkm"
TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
WORDS = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE)
"""Files of the tokenizer; a base may lack the last one."""
MAX_READ = 64 * 1024 * 1024
"""Bytes of a file that is read into memory in full; weights are mapped instead."""
BANK = "kron"
AGAIN = "get the bundle again, or write it with fedtune export --edge"

Runtime = Literal["onnx", "gguf"]


@dataclass(frozen=True)
class Module:
    """A linear layer, by the sizes of its input and output."""

    out: int
    width: int
    """Of its input."""


@dataclass(frozen=True)
class BundleFacts:
    """What the manifest says of a bundle beside the digests of its files."""

    runtime: Runtime
    family: str
    """Architecture of the base, as its config.json names it: llama, qwen2, qwen3, gpt2."""
    dtype: str
    """Number format of the weights in this folder; that of the base is in the manifest of its tensors."""
    layers: tuple[str, ...]
    """Names of the matrices of linear layers that seeds may move: `directions.trainable` asks for them."""
    modules: Mapping[str, Module]
    """The layers that hold these matrices."""
    transposed: bool
    """Whether the checkpoint holds these matrices as (in, out)."""
    parameters: int
    positions: int
    """Longest input in tokens."""
    vocabulary: int
    pad_id: int
    eos_ids: tuple[int, ...]
    bos_id: int | None = None
    anatomy: BlockLayout | None = None
    """Of the base's blocks, as clients with torch state it; None for a family that cannot be pruned."""
    bank: str = BANK
    """Bank of directions that the runtime's files are written for."""
    layout: int = FORMAT
    details: Mapping[str, int | str] = field(default_factory=dict)
    """What the runtime alone asks for."""


@dataclass(frozen=True)
class Bundle:
    """A base as a device holds it; the files of its runtime are checked as they are read."""

    folder: ResultFolder
    base_name: str
    base_digest: str
    """SHA-256 (hex) of the base, as assignments name it."""
    facts: BundleFacts
    manifest: Manifest
    """Of the base's tensors, in the number format of their source."""
    signer: str = ""
    """Coordinator that has signed it; empty where that was not verified."""
    warnings: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return self.folder.path

    def read(self, name: str) -> bytes:
        """Return the bytes of a small file, checked against the manifest.

        Raises:
            StoreError: if it is missing, another one than is listed, or too large to be read in full.
        """
        return read_small(self.folder, name)


def manifest_facts(facts: BundleFacts, *, base_name: str, base_digest: str) -> Mapping[str, Any]:
    """Return what the manifest of a bundle says beside the digests, for `store.manifest.write`."""
    return {"name": base_name, "base": base_digest, KEY: asdict(facts)}


def read_bundle(path: Path, roster: Roster | None = None, *, unsigned: bool = False, now: int | None = None) -> Bundle:
    """Return the bundle in a folder, whose files are those that a coordinator of the roster has signed.

    Every file is read once for its digest. Without a roster (before enrolment) the digests alone are checked, which
    finds damage but no forgery.

    Args:
        path: of the folder.
        roster: of the federation; its signature has been verified.
        unsigned: take a bundle without a signature, with a warning. One with a wrong signature is never taken.
        now: seconds since 1970; this machine's clock without it.

    Raises:
        StoreError: if a file is missing or another one, or the signature does not hold.
        ConfigError: if the folder is no bundle, is unsigned, or is of another format or bank than this program's.
    """
    if not (path / manifests.NAME).is_file():
        got = "no such folder" if not path.is_dir() else f"one without {manifests.NAME}"
        raise ConfigError(Fault("model.base", f"a bundle at {path}", got, AGAIN))
    signer, warnings = "", tuple[str, ...]()
    if roster is not None and (os.path.lexists(path / manifests.SIGNATURE) or not unsigned):
        if not os.path.lexists(path / manifests.SIGNATURE):
            expected, got = f"a bundle signed by a coordinator of {roster.federation}", f"{path} without a signature"
            hint = "have it signed with fedtune sign, or set policy.unsigned_base = true if you know where it is from"
            raise ConfigError(Fault("model.base", expected, got, hint))
        signer = verify_folder(path, roster, now=now).signer.name
        opened = manifests.open_folder(path)
    else:
        opened = manifests.open_folder(path)
        opened.check()
        warnings = (f"{path}: no signature was checked: its files are whole, but may come from anyone",)
    facts, names = read_facts(opened), (text(opened, "name"), text(opened, "base"))
    try:
        tensors = decode_manifest(read_small(opened, TENSORS))
    except WireError as error:
        raise StoreError(f"{path / TENSORS}: {error}; {AGAIN}") from error
    check_numbers(facts, path)
    check_layers(facts, tensors, path)
    return Bundle(opened, *names, facts, tensors, signer, warnings)


def read_facts(opened: ResultFolder) -> BundleFacts:
    """Return what a manifest says of its bundle.

    Raises:
        StoreError: if a value is missing or of another type.
        ConfigError: if the folder is another result, or a bundle of another format or bank.
    """
    where, table = opened.path, opened.facts.get(KEY)
    if not isinstance(table, Mapping) or opened.listed is None:
        expected, hint = "a bundle of a base for devices", "write one with fedtune export RECIPE --edge DIR"
        raise ConfigError(Fault("model.base", expected, f"another folder of fedtune's, {where}", hint))
    # Before all other values: those of another format may be of other types.
    if (layout := table.get("layout")) != FORMAT:
        expected, hint = (
            f"a bundle of format {FORMAT}",
            "update this program, or export the base again with its release",
        )
        raise ConfigError(Fault("model.base", expected, f"{where} of format {layout!r}", hint))
    if (bank := table.get("bank")) != BANK:
        hint = 'export the base again; a device runs method.bank = "kron"'
        raise ConfigError(Fault("model.base", f"a bundle for the bank {BANK!r}", f"{where} for {bank!r}", hint))
    return typed_json.decode(BundleFacts, table, f"{where / manifests.NAME}: {KEY}")


def check_numbers(facts: BundleFacts, where: Path) -> None:
    """Check that a bundle's base has room for a prediction, and that what pads or begins a text is one of its tokens.

    Raises:
        StoreError: naming the first number that cannot be.
    """
    tokens = range(facts.vocabulary)
    numbers = {
        "positions": (facts.positions, "at least 2", facts.positions >= 2),
        "vocabulary": (facts.vocabulary, "at least 1", facts.vocabulary >= 1),
        "pad_id": (facts.pad_id, "a token of the vocabulary", facts.pad_id in tokens),
        "bos_id": (facts.bos_id, "a token of the vocabulary", facts.bos_id is None or facts.bos_id in tokens),
        "parameters": (facts.parameters, "at least 1", facts.parameters >= 1),
    }
    for name, (got, expected, fits) in numbers.items():
        if not fits:
            raise StoreError(f"{where / manifests.NAME}: {KEY}.{name}: expected {expected}; got {got}; {AGAIN}")


def check_layers(facts: BundleFacts, tensors: Manifest, where: Path) -> None:
    """Check that the layers of a bundle are matrices of its base, of the sizes that it says.

    Raises:
        StoreError: naming the first that is not.
    """
    shapes = {entry.name: entry.shape for entry in tensors.entries}
    named = {f"{name}.weight": module for name, module in facts.modules.items()}
    if wrong := sorted(set(facts.layers) ^ named.keys()):
        raise StoreError(f"{where}: expected the sizes of every layer; {wrong[0]} has none, or is none; {AGAIN}")
    for name in facts.layers:
        sizes = (named[name].out, named[name].width)
        expected = sizes[::-1] if facts.transposed else sizes
        if shapes.get(name) != expected:
            got = shapes.get(name, "no such tensor")
            raise StoreError(f"{where}: expected {name} of shape {expected} in {TENSORS}; got {got}; {AGAIN}")


def read_small(opened: ResultFolder, name: str) -> bytes:
    """See `Bundle.read`."""
    listed = (opened.listed or {}).get(name)
    if listed is not None and listed.num_bytes > MAX_READ:
        raise StoreError(f"{opened.path / name}: expected at most {MAX_READ} bytes; got {listed.num_bytes}; {AGAIN}")
    return opened.read(name)


def text(opened: ResultFolder, key: str) -> str:
    """Return a text that the manifest states.

    Raises:
        StoreError: if it is missing.
    """
    value = opened.facts.get(key)
    if not isinstance(value, str) or not value:
        raise StoreError(f"{opened.path / manifests.NAME}: expected a text under {key!r}; got {value!r}; {AGAIN}")
    return value
