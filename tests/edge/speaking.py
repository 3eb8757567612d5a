"""A device for tests of chat and export: its file, a bundle, and a runtime that always says the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.directions.kron import Kron
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.trainable import TensorSelection, trainable_ordinals
from fedtune.edge.bundle import Bundle, read_bundle
from fedtune.edge.current_model import CurrentModel, store_model
from fedtune.edge.tokenizer import EdgeTokenizer, read_tokenizer
from fedtune.model.base import load, load_tokenizer
from fedtune.model.settings import AdapterSettings, ModelSettings
from tests.edge.torch_runtime import base_bundle

FILE = """
name = "kitchen"
[model]
base = "bundle"
[data]
source = "rows.txt"
[link]
address = "localhost:1"
[policy]
unsigned_base = true
"""


@dataclass
class Scripted:
    """A runtime that says the same to every prompt, and notes what it was asked."""

    says: str
    tokenizer: EdgeTokenizer
    prompts: list[list[int]] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)
    interrupted_after: int | None = None
    """Tokens after which Ctrl-C is pressed, the first time."""

    def at(self, ledger: Any, trainable: Any) -> Any:
        raise AssertionError("chat measures no losses")

    def continue_tokens(
        self, ledger: SeedLedger | None, trainable: Sequence[int], ids: Sequence[int], *, new_tokens: int
    ) -> Iterator[int]:
        self.prompts.append(list(ids))
        self.asked.append((ledger, tuple(trainable), new_tokens))
        for number, token in enumerate(self.tokenizer(self.says, add_special_tokens=False)["input_ids"][:new_tokens]):
            if number == self.interrupted_after:
                self.interrupted_after = None
                raise KeyboardInterrupt
            yield token


@cache
def bundle_of(checkpoint: Path) -> Path:
    """Return the bundle of a checkpoint of the session, beside it: to load a base takes longer than a test."""
    settings = ModelSettings(base=str(checkpoint), dtype="float32", device="cpu")
    tokenizer = load_tokenizer(settings, Path())
    base = load(settings, AdapterSettings(rank=1), tokenizer=tokenizer, root=Path(), seed=0, labels=())
    return base_bundle(checkpoint.with_name(f"{checkpoint.name}-bundle"), base)


def write_device(folder: Path, checkpoint: Path) -> tuple[Path, Scripted]:
    """Write a device's file, rows and bundle; return the file and the runtime to put in place of the bundle's."""
    bundle = read_bundle(shutil.copytree(bundle_of(checkpoint), folder / "bundle"))
    (folder / "rows.txt").write_text("the quick fox\n" * 40)
    (folder / "site.toml").write_text(FILE)
    return folder / "site.toml", Scripted("the lazy dog", read_tokenizer(bundle))


def tune(site: Path) -> tuple[Bundle, CurrentModel]:
    """Store a tuned model as a device does that has received one."""
    bundle = read_bundle(site.parent / "bundle")
    ordinals = tuple(trainable_ordinals(bundle.manifest, TensorSelection("kron"), bundle.facts.layers))
    ledger = SeedLedger(Kron(4, 9), 15, 3, bundle.manifest.digest, np.array([5, -3, 0, 9], np.int32))
    (site.parent / "state").mkdir(exist_ok=True)
    store_model(site.parent / "state", model := CurrentModel(ledger, ordinals))
    return bundle, model
