"""The first arrays of a Flower run from a PEFT directory, without torch: of a run that ended, or of another program."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord

from fedtune.flower.peft_records import PeftState, to_record
from fedtune.lora.adapter import Factors, draw_a, pack
from fedtune.seeds import derive
from fedtune.store.peft_import import read_adapter
from fedtune.tensors import Array


def read_arrays(
    path: str | Path, *, alpha: float | Callable[[int], float], use_rslora: bool = False, seed: int = 0
) -> ArrayRecord:
    """Return what `strategy.start(initial_arrays=...)` takes, of an adapter in PEFT's format.

    They have one rank, the adapter's largest, and are the same change of the base under the strategy's alpha.

    Args:
        path: of the folder.
        alpha: as the strategy's.
        use_rslora: as the strategy's.
        seed: of the rows of A in modules of smaller rank, whose b is zero.

    Raises:
        ConfigError: if it is no LoRA adapter.
        StoreError: if a file cannot be read.
    """
    read = read_adapter(Path(path))
    rank = read.rank
    scale = (alpha(rank) if callable(alpha) else alpha) / (math.sqrt(rank) if use_rslora else rank)
    key = derive(seed, "lora.shared_a")
    flat = dict[str, Array]()
    for name, factors in read.adapter.items():
        a = draw_a(key, name, rank, factors.shape[1])
        a[: factors.rank] = factors.a
        b = np.zeros((factors.shape[0], rank), np.float32)
        b[:, : factors.rank] = factors.b / np.float32(scale)
        flat |= pack({name: Factors(a=a, b=b)})
    return to_record(PeftState(flat, read.saved))
