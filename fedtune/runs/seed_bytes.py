"""The bytes of a round of steps along seeds, counted on messages that are encoded as a run encodes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedtune.directions.sampling import SHARED
from fedtune.messages import (
    Blueprint,
    ClientUpdate,
    DescendResult,
    DescendSeeds,
    Measured,
    PlannedClient,
    ProbeResult,
)
from fedtune.methods import METHODS
from fedtune.methods.fedkseed_state import FedKSeedSettings
from fedtune.wire.codec import encode_assignment, encode_update

MEASURED = Measured(seconds=1e3, peak_bytes=2**34, tokens=10**6, loss_before=1.0, loss_after=1.0)
"""As much as a client's measurements take in most messages."""
DIGESTS = b"\xff" * 16
"""First bytes of those of four blocks, by which a client shows that its weights are the server's."""


def seed_bytes(
    settings: FedKSeedSettings, blueprint: Blueprint, planned: PlannedClient, *, rounds: int, examples: int
) -> tuple[int, int]:
    """Return the most bytes (down, up) that one client's round takes, late in a run in which it takes part rarely.

    Args:
        settings: of the method.
        blueprint: of the base.
        planned: for the client.
        rounds: of the run.
        examples: of the client.
    """
    state = METHODS["fedkseed"].init(blueprint, settings)
    # In the last round, with all banks; one of the sums does not fit into 16 bits, so that all take 32.
    sums = np.ones(state.bank_of(rounds - 1).size, np.int32)
    sums[0] = 2**15
    state = replace(state, accumulators={"a": sums}, calibrated=True, round=rounds - 1)
    assignment = METHODS["fedkseed"].assign(state, blueprint.seed, planned)
    down = len(encode_assignment(replace(assignment, base="0" * 64)).header)
    result: ProbeResult | DescendResult
    if isinstance(assignment.task, DescendSeeds):
        numbers = np.ones(assignment.task.count, np.int8)
        result = DescendResult(numbers, 8, assignment.task.bits, bytes(8), DIGESTS)
    else:
        result = ProbeResult(np.ones(planned.plan.training.steps or 1, np.int8), bytes(8), DIGESTS)
    up = len(encode_update(ClientUpdate(planned.plan.client, rounds, examples, result, MEASURED)))
    return down, up


def measuring_bytes_up(settings: FedKSeedSettings, client: str, examples: int) -> int:
    """Return the most bytes up of a client in the first round, where that measures the learning rate of probing."""
    slopes = (1.0,) * min(SHARED, settings.seeds)
    result = ProbeResult(np.ones(0, np.int8), bytes(8), DIGESTS, slopes=slopes, curvatures=slopes)
    return len(encode_update(ClientUpdate(client, 1, examples, result, MEASURED)))
