"""What a round of steps along seeds costs a client that probes, and one that descends: memory, operations, bytes."""

from __future__ import annotations

from dataclasses import replace
from math import isqrt

from fedtune.devices.cost import (
    Body,
    descend_flops_per_token,
    forward_flops_per_token,
    largest_tensor,
    move_flops,
    rebuild_flops,
)
from fedtune.devices.memory import Footprint
from fedtune.devices.simulated_clock import Load
from fedtune.messages import Training, Verb
from fedtune.methods.fedkseed_state import FedKSeedSettings
from fedtune.rounds.clock import CompletedWork

PROBING_READS = 4
"""Times that a forward pass at rewritten weights reads or writes as many bytes as the weights take: base and
displacements are read, and a copy is written, which the pass reads."""
DISPLACED_BYTES = 4.25
"""Of a weight whose displacement stays in memory, with the sign of one direction."""
DESCENDING_READS = 6
"""The same of a step: weights are rebuilt, read forward and backward, and gradients written and projected."""


def moves_beside(settings: FedKSeedSettings) -> bool:
    """Return whether clients read small products beside the base's weights, and no copy of these is moved."""
    return settings.bank == "kron"


def seed_footprint(usual: Footprint, body: Body, settings: FedKSeedSettings, verb: Verb) -> Footprint:
    """Return what the memory of a client depends on that steps along seeds; `usual` has its batch and its device."""
    beside = moves_beside(settings)
    usual = replace(usual, moved=0.0 if beside else float(body.parameters))
    if verb != "descend":
        # With hadamard displacements stay in memory only where twice as much is free: it is not needed.
        extra = DISPLACED_BYTES / body.layout.number_bytes if settings.bank == "gaussian" else 0.0
        return replace(usual, forward_only=True, moved=usual.moved * (1.0 + extra))
    rank = float(isqrt(settings.seeds)) if beside else 0.0
    return replace(
        usual,
        forward_only=False,
        descends="beside" if beside else "rewritten",
        # Gradients are of every layer, whichever of them `adapter` names.
        ranks=dict.fromkeys({*body.layout.sides, *body.modules}, rank),
        gradient=0.0 if beside else largest_tensor(body),
    )


def seed_flops(
    body: Body, settings: FedKSeedSettings, verb: Verb, training: Training, tokens: float, mean: float
) -> float:
    """Return the operations of a round in which so many tokens went forward, in examples of `mean` tokens."""
    rank = isqrt(settings.seeds) if moves_beside(settings) else 0
    rebuild, passes = rebuild_flops(body, settings.bank, settings.seeds), tokens / (training.batch * mean)
    if verb == "descend":
        # Weights are rebuilt once a step, gradients are projected with every batch.
        rebuilds = passes / training.accumulation + passes
        return descend_flops_per_token(body, mean, rank) * tokens + rebuild * rebuilds
    # The weights of the round once, and one direction more for each loss.
    return forward_flops_per_token(body, mean, rank) * tokens + rebuild + move_flops(body, settings.bank) * passes


def seed_load(done: CompletedWork, body: Body, settings: FedKSeedSettings, mean: float) -> Load:
    """Return the load of a finished round, whose bytes are those of seeds and numbers whatever the base is."""
    training, tokens, verb = done.plan.training, done.measured.tokens, done.verb or "probe"
    # The number of passes follows from the tokens: in probing it depends on the estimator.
    passes = tokens / (training.batch * mean)
    if verb == "descend":
        reads = 2 if moves_beside(settings) else DESCENDING_READS
    else:
        reads = 1 if moves_beside(settings) else PROBING_READS
    return Load(
        tflop=seed_flops(body, settings, verb, training, tokens, mean) / 1e12,
        gigabytes=reads * passes * body.parameters * body.layout.number_bytes / 1e9,
        bytes_down=done.traffic.down,
        bytes_up=done.traffic.up,
    )


def round_tokens(verb: Verb, settings: FedKSeedSettings, training: Training, mean: float) -> float:
    """Return the tokens that go forward in a round of a client whose examples have `mean` tokens."""
    steps = training.steps or 1
    if verb == "descend":
        return steps * training.accumulation * training.batch * mean
    # Both sides of every direction; or one for each, and the losses that they are compared with.
    passes = 2 * steps if settings.estimator == "two-sided" else steps + -(-steps // settings.queries)
    return passes * training.batch * mean
