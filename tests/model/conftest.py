"""Loaded tiny bases and a few examples for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from fedtune.data.encode import Example
from fedtune.directions.bank import BANKS, DirectionBank
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.model.base import Base, load, load_tokenizer
from fedtune.model.settings import AdapterSettings, ModelSettings

Loader = Callable[..., Base]


def bank_of(name: str, size: int = 16) -> DirectionBank:
    return BANKS[name](size, 0x0123456789ABCDEF)


def ledger_of(base: Base, name: str, *, size: int = 16, exponent: int = 10, largest: int = 8) -> SeedLedger:
    """Return a ledger over a base with whole numbers of at most `largest`, whose displacement is far from small."""
    sums = np.random.default_rng(size).integers(-largest, largest + 1, size).astype(np.int32)
    return SeedLedger(bank_of(name, size), exponent, 3, base.manifest.digest, sums)


@pytest.fixture
def loaded(checkpoints: dict[str, Path]) -> Loader:
    """Load one of the tiny checkpoints."""

    def make(
        name: str = "llama",
        *,
        targets: Sequence[str] = ("q_proj", "v_proj"),
        task: str = "causal",
        labels: Sequence[str] = (),
        saved: Sequence[str] = (),
        dtype: str = "float32",
        layers: str | None = None,
    ) -> Base:
        settings = ModelSettings(base=str(checkpoints[name]), task=task, dtype=dtype, device="cpu")  # type: ignore[arg-type]
        return load(
            settings,
            AdapterSettings(rank=4, targets=targets, modules_to_save=saved, layers=layers),
            tokenizer=load_tokenizer(settings, Path()),
            root=Path(),
            seed=0,
            labels=labels,
        )

    return make


@pytest.fixture
def examples() -> Callable[[int], list[Example]]:
    """Make causal examples of unequal length, the first third of each a prompt."""

    def make(count: int, *, classes: int = 0) -> list[Example]:
        rng = np.random.default_rng(count)
        rows = []
        for row in range(count):
            ids = rng.integers(3, 200, size=6 + 3 * (row % 4)).astype(np.int64)
            labels = ids.copy()
            labels[: len(ids) // 3] = -100
            rows.append(
                Example(
                    input_ids=ids,
                    labels=row % classes if classes else labels,
                    characters=2 * len(ids),
                    prompt_tokens=len(ids) // 3,
                    prompt="the fox",
                    reference="the dog",
                )
            )
        return rows

    return make
