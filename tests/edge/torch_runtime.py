"""A runtime over torch, and the bundle of a base that torch has loaded: what devices send is compared with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedtune.client.site import blocks
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.edge.bundle import TENSORS, BundleFacts, Module, manifest_facts
from fedtune.model import libraries
from fedtune.model.base import Base
from fedtune.model.batches import Batch
from fedtune.model.edge_tokenizer import tokenizer_files
from fedtune.model.load_checks import embedding_rows
from fedtune.model.probe import at_position
from fedtune.probing.measure import Position
from fedtune.probing.rows import PaddedRows
from fedtune.probing.steps import Move
from fedtune.store import manifest
from fedtune.store.files import fill, new_folder


@dataclass(frozen=True)
class TorchPosition:
    """The torch client's position, for batches of a device."""

    position: Position[Batch]

    def losses(self, batch: PaddedRows, moves: Sequence[Move]) -> Sequence[float]:
        ids, mask, labels = map(torch.from_numpy, (batch.input_ids, batch.attention_mask, batch.labels))
        return self.position.losses(Batch(ids, mask, labels, count=batch.count, tokens=batch.tokens), moves)

    def move(self, seed: int, amount: int) -> None:
        self.position.move(seed, amount)


@dataclass(frozen=True)
class TorchRuntime:
    """Forward passes by torch."""

    base: Base

    @contextmanager
    def at(self, ledger: SeedLedger, trainable: Sequence[int]) -> Iterator[TorchPosition]:
        # Another number of threads changes the last bits of a loss.
        with libraries.threads(1), at_position(self.base, ledger, trainable) as position, torch.inference_mode():
            yield TorchPosition(position)

    def continue_tokens(self, *arguments: Any, **options: Any) -> Iterator[int]:
        raise NotImplementedError("no test asks this runtime for text")


def base_bundle(path: Path, base: Base) -> Path:
    """Write the bundle of a base that was loaded with the targets `all-linear`; without a graph."""
    facts = BundleFacts(
        runtime="onnx",
        family=base.model.config.model_type,
        dtype="float32",
        layers=tuple(sorted(base.matrices)),
        modules={name: Module(*shape) for name, shape in base.modules.items()},
        transposed=base.transposed,
        parameters=base.num_parameters,
        positions=base.positions,
        vocabulary=embedding_rows(base.model),
        pad_id=base.pad_id,
        eos_ids=(base.tokenizer.eos_token_id,),
        bos_id=base.tokenizer.bos_token_id,
        anatomy=blocks(base),
    )
    with new_folder(path) as folder:
        fill(folder / TENSORS, base.manifest.encode())
        for name, data in tokenizer_files(base.tokenizer).items():
            fill(folder / name, data)
        manifest.write(folder, manifest_facts(facts, base_name=base.name, base_digest=base.digest))
    return path
