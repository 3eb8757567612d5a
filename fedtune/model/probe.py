"""The torch client's way to losses around a point of FedKSeed, which `probing` turns into scalars."""

from __future__ import annotations

import logging
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
from fedtune.model.descend_memory import spare_bytes
from fedtune.model.kron_forward import with_injected_paths
from fedtune.model.seed_rebuild import DisplacedPosition, RebuiltPosition, Trio, working_copy
from fedtune.model.train import out_of_memory
from fedtune.probing.measure import Position

LOGGER = logging.getLogger("fedtune.client")
Open = Callable[[SeedLedger, Sequence[int]], AbstractContextManager[Position[Batch]]]


@contextmanager
def at_position(
    base: Base, ledger: SeedLedger, trainable: Sequence[int], *, max_bytes: int | None = None
) -> Iterator[Position[Batch]]:
    """Give the position w(A) inside the block, in the way that suits the bank; the base is unchanged afterwards.

    Args:
        base: whose weights are replaced inside the block.
        ledger: with the accumulators.
        trainable: ordinals of the tensors that are moved.
        max_bytes: that the process may take in all; None: what the machine has.
    """
    # By its name: several banks or groups of kron are none of its class.
    if ledger.bank.name == Kron.name:
        with with_injected_paths(base, ledger, trainable) as position:
            yield position
        return
    with working_copy(base, trainable) as trios:
        kind = DisplacedPosition if stores_displacements(base, ledger, trios, max_bytes) else RebuiltPosition
        yield kind(base, ledger, trios)


def stores_displacements(base: Base, ledger: SeedLedger, trios: Sequence[Trio], max_bytes: int | None) -> bool:
    """Return whether to hold displacements in memory, four bytes a weight more, rather than rebuild for every loss.

    The bits are the same either way.
    """
    if (needed := stored_bytes(ledger.bank, [own.numel() for _, own, _ in trios])) is None:
        return False
    spare = spare_bytes(base.device, max_bytes)
    # A rebuild of the gaussian bank costs K random numbers per weight: hours, where there may be no room.
    if fits := ledger.bank.name == Gaussian.name or needed <= spare:
        LOGGER.info("displacements stay in memory: %.3g GB", needed / 1e9)
    else:
        LOGGER.info(
            "weights are rebuilt for every loss: displacements would take %.3g GB, and %.3g GB may be taken for speed",
            needed / 1e9,
            spare / 1e9,
        )
    return fits


def measured_position(base: Base, *, client: str, batch: int, max_bytes: int | None = None) -> Open:
    """Return what gives a client a position to measure its losses at, and says in plain words that memory ran out."""
    return partial(_measured_position, base, client, batch, max_bytes)


@contextmanager
def _measured_position(
    base: Base, client: str, batch: int, max_bytes: int | None, ledger: SeedLedger, trainable: Sequence[int]
) -> Iterator[Position[Batch]]:
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
    try:
        with at_position(base, ledger, trainable, max_bytes=max_bytes) as position, torch.inference_mode():
            yield position
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ClientError(
            f"{client}: expected its batch of {batch} to fit; memory ran out; lower client.batch"
        ) from error
