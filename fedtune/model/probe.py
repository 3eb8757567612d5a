"""The torch client's way to losses around a point of FedKSeed, which `probing` turns into scalars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch

from fedtune.directions.gaussian import Gaussian
from fedtune.directions.kron import Kron
from fedtune.directions.moves_torch import stored_bytes
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.errors import ClientError
from fedtune.model.base import Base
from fedtune.model.batches import Batch
from fedtune.model.device import spare_bytes
from fedtune.model.kron_forward import with_injected_paths
from fedtune.model.seed_rebuild import DisplacedPosition, RebuiltPosition, Trio, working_copy
from fedtune.model.train import out_of_memory
from fedtune.probing.measure import Position

Open = Callable[[SeedLedger, Sequence[int]], AbstractContextManager[Position[Batch]]]


@contextmanager
def at_position(base: Base, ledger: SeedLedger, trainable: Sequence[int]) -> Iterator[Position[Batch]]:
    """Give the position w(A) inside the block, in the way that suits the bank; the base is unchanged afterwards."""
    if isinstance(ledger.bank, Kron):
        with with_injected_paths(base, ledger, trainable) as position:
            yield position
        return
    with working_copy(base, trainable) as trios:
        kind = DisplacedPosition if stores_displacements(base, ledger, trios) else RebuiltPosition
        yield kind(base, ledger, trios)


def stores_displacements(base: Base, ledger: SeedLedger, trios: Sequence[Trio]) -> bool:
    """Return whether to hold the displacements in memory, four bytes a weight more, rather than rebuild each time.

    The bits are the same either way.
    """
    needed = stored_bytes(ledger.bank, [own.numel() for _, own, _ in trios])
    # A rebuild of the gaussian bank costs K random numbers per weight: hours, where there may be no room.
    return needed is not None and (ledger.bank.name == Gaussian.name or needed <= spare_bytes(base.device))


def measured_position(base: Base, *, client: str, batch: int) -> Open:
    """Return what gives a client a position to measure its losses at, and says in plain words that memory ran out."""
    return partial(_measured_position, base, client, batch)


@contextmanager
def _measured_position(
    base: Base, client: str, batch: int, ledger: SeedLedger, trainable: Sequence[int]
) -> Iterator[Position[Batch]]:
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
    try:
        with at_position(base, ledger, trainable) as position, torch.inference_mode():
            yield position
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ClientError(
            f"{client}: expected its batch of {batch} to fit; memory ran out; lower client.batch"
        ) from error
