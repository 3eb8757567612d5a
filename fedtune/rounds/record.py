"""The record of one round: a line of rounds.jsonl, the event at the end of a round, and what a report is drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from fedtune.messages import Failure
from fedtune.planning.planner import ClientObservation

Metrics: TypeAlias = Mapping[str, float | int | None]
"""Scores of one model on one set of examples, by metric: `loss` in nats per token, `perplexity`, `accuracy`, ...

None is a number that JSON cannot hold, such as the loss of a model that has diverged.
"""

COUNTS = ("examples", "tokens", "generated")
"""Metrics that say how much was scored, of which a mean over clients says nothing."""


@dataclass(frozen=True)
class PersonalRecord:
    """Which state of its own model a client has started from, and which it has stored: 16 hex digits of the digest."""

    before: str = ""
    """Empty: none; it started from the server's values."""
    after: str = ""


@dataclass(frozen=True)
class ClientRecord:
    """What one client of the cohort was asked for and delivered."""

    status: Literal["ok", "failed", "refused", "late", "unfit"]
    """`ok`, or why the update was not used."""
    reason: str = ""
    """Why the update was not used; empty for `ok`."""
    rank: int | None = None
    """LoRA rank; None for a client that had no assignment, or that measured seeds."""
    steps: int | None = None
    """Optimizer steps, or seeds measured; None without an assignment."""
    examples: int = 0
    """Training examples, as enrolled."""
    counted: float | None = None
    """As how many examples it counts, where `rounds.weight_cap` makes that fewer."""
    bytes_down: int = 0
    """Bytes sent to the client, counted on the encoded message."""
    bytes_up: int = 0
    """Bytes of its update, counted on the encoded message."""
    ratio: float | None = None
    """Pruning ratio that was asked for; None without pruning."""
    deadline_s: float | None = None
    """When the planner expected the round to end; None if it expects nothing."""
    why: str = ""
    """The planner's reason for its choice; and why a client that was to descend has probed."""
    verb: Literal["", "adapt", "probe", "descend"] = ""
    """`descend`, or `probe` of a client that was to descend if it could; left out where it is what the method's clients
    do by themselves."""
    compute_s: float | None = None
    """Seconds of training on the client's device, simulated or measured; None without a clock."""
    transfer_s: float | None = None
    """Seconds of transfer, down and up; None without a clock."""
    overhead_s: float = 0.0
    """Seconds beside these two."""
    planned_s: float | None = None
    """Seconds that its device's profile and the cost model expect of all this; left out without a simulated device."""
    planned_bytes: float | None = None
    """Memory that the cost model expects it to take; left out for simulated devices, and bases without such a model."""
    down_s: float | None = None
    """Of `transfer_s`, that down; left out where the two ways are not known apart."""
    joules: float | None = None
    """Energy that its device took for all this: by its profile's power, or as its meter counted; left out where neither
    is known."""
    loss_before: float | None = None
    """Loss before the local steps, on some of the client's held-out rows, or of its training rows if it holds out none;
    None also where it is not finite."""
    loss_after: float | None = None
    """Loss after them, on the same rows."""
    seconds: float | None = None
    """Wall time of the local work; None without a used update, as are the next three."""
    peak_bytes: int | None = None
    """Most memory that the local work took."""
    tokens: int | None = None
    """Tokens that went forward in training."""
    norm: float | None = None
    """Frobenius norm of the admitted change."""
    importance: float | None = None
    """With pruning: mean over the steps of the sum of |parameter * gradient| over the trained factors."""
    skipped_steps: int = 0
    """Optimizer steps that it left out because their loss or gradient was not finite; left out where it is 0."""
    probed_s_per_tflop: float | None = None
    """Seconds for 1e12 operations, as it measured them before the round; left out without a probe, as is the next."""
    probed_s_per_mb: float | None = None
    """Seconds for a megabyte, likewise."""
    top: float = 1.0
    """Share of the blocks, from the top, whose modules it trained; this and those below are left out at their
    defaults."""
    share: float = 1.0
    """Share of the recipe's steps that it was asked for."""
    back: float = 0.0
    """Share of heads and channels that its backward passes left out."""
    down_rank: int | None = None
    """Largest rank of the global change that it was sent, where the planner chose one."""
    ranks: tuple[int, ...] = ()
    """LoRA rank by module, in sorted order of their names, where `top` does not say it."""
    base_dtype: Literal["", "int8", "nf4"] = ""
    """Number format of its frozen base, where that is not the recipe's."""
    view: Literal["whole", "deployed"] = "whole"
    """deployed: it trained an adapter of the pruned model alone."""
    whole_loss_before: float | None = None
    """As `loss_before`, in the whole model, where it trained a smaller one and holds the whole base."""
    whole_loss_after: float | None = None
    """The same after the local steps, with its change in the whole model."""
    batch: int | None = None
    """Examples per forward pass, where the planner chose others than the recipe's."""
    arm: int | None = None
    """Index of the arm that the planner `expgrad` drew for it."""
    arm_probability: float = 1.0
    """With which it drew that."""
    module_importance: tuple[float, ...] = ()
    """Importance of each module that it trained, in sorted order of their names, where it was asked for."""
    staleness: int = 0
    """Versions that its update has missed, in an asynchronous round; left out where it is 0."""
    discount: float = 1.0
    """Factor on its change because of that; left out where it is 1."""
    personal: PersonalRecord | None = None
    """Of its own model, where it has one that it stores; left out where it has none."""


PROBE_FIELDS = ("probed_s_per_tflop", "probed_s_per_mb")
"""Of the same: what the client measured of its speed before the round."""
ARM_FIELDS = ("top", "share", "back", "down_rank", "ranks", "base_dtype", "view", "batch", "arm", "arm_probability")
"""Of a client's record and of what a planner observes: what was planned for it beside rank, ratio and steps."""


@dataclass(frozen=True)
class UnsolicitedRecord:
    """A reply that the round did not wait for."""

    client: str
    """Its name."""
    reason: str
    """Why the reply was not used."""
    num_bytes: int = 0
    """Size of the reply."""
    kind: str = "late"
    """`late`, or what else it was."""


@dataclass(frozen=True)
class ModuleRecord:
    """The global change of one module after a round."""

    rank: int
    """Rank of the global change."""
    norm: float | None = None
    """Frobenius norm."""
    singular_values: tuple[float, ...] = ()
    """The largest ones, descending."""
    energy_kept: float | None = None
    """Share of the squared norm that a client of the largest rank is sent, in [0, 1]; None if it is sent whole."""
    state_energy_kept: float | None = None
    """Squared norm over itself and all that the server has cut off so far, in [0, 1]; None if it has cut nothing."""

    @property
    def reaches_clients(self) -> float | None:
        """Share of what the server has summed that a client of the largest rank is sent; None if nothing was cut.

        >>> ModuleRecord(rank=4, energy_kept=0.9, state_energy_kept=0.5).reaches_clients
        0.45
        """
        if self.energy_kept is None and self.state_energy_kept is None:
            return None
        shares = (self.energy_kept, self.state_energy_kept)
        return math.prod(1.0 if share is None else share for share in shares)


@dataclass(frozen=True)
class RoundRecord:
    """One round; round 0 is the base before any training."""

    round: int
    """Its number; 0 is the base before any training."""
    seconds: float
    """Wall time of the round, in seconds."""
    state_digest: str = ""
    """SHA-256 (hex) of the state after the round; empty for round 0."""
    cohort: tuple[str, ...] = ()
    """Names of the clients that were asked."""
    loss_before: float | None = None
    """Mean over the used updates of the clients' losses before their local steps, weighted by examples."""
    loss_after: float | None = None
    """The same after the local steps: each client's loss on the same rows as before."""
    test: Metrics | None = None
    """Scores of the global model on the test data; None if it was not scored in this round."""
    held_out: Mapping[str, Metrics] = field(default_factory=dict)
    """Scores of the global model on each client's held-out rows."""
    clients: Mapping[str, ClientRecord] = field(default_factory=dict)
    """What each client of the cohort was asked for and delivered, by name."""
    unsolicited: tuple[UnsolicitedRecord, ...] = field(default=(), metadata={"key": "aside"})
    """Replies that the round did not wait for."""
    bytes_down: int = 0
    """Bytes sent to all clients."""
    bytes_up: int = 0
    """Bytes of all updates."""
    modules: Mapping[str, ModuleRecord] = field(default_factory=dict)
    """The global change, by module."""
    figures: Mapping[str, float | int] = field(default_factory=dict)
    """Numbers that the method reports about its state."""
    clock_s: float = 0.0
    """Simulated or measured seconds of the run so far."""
    rate_share: float = 1.0
    """The round's learning rate as a share of `client.learning_rate`, by `rounds.schedule`; left out where it is 1."""
    deployed: Metrics | None = None
    """Scores on the test data of the model pruned to what is deployed."""
    working: tuple[str, ...] = ()
    """Clients that were still at work when an asynchronous round ended; left out where there are none."""

    personal: Mapping[str, Metrics] = field(default_factory=dict)
    """Scores of each client's own model on its held-out rows; left out where they have none."""

    @property
    def used(self) -> int:
        """Number of updates that were aggregated."""
        return sum(client.status == "ok" for client in self.clients.values())


def observations(record: RoundRecord) -> Sequence[ClientObservation]:
    """Return what a planner learns from a record: the same as from the round itself, so a resumed run plans alike."""
    return [
        ClientObservation(
            client=name,
            num_examples=client.examples,
            ratio=client.ratio or 0.0,
            rank=client.rank or 0,
            status=client.status,
            # The record holds the reason as text alone, as a process that failed has sent it.
            out_of_memory=client.status == "failed" and Failure.from_text(name, client.reason).out_of_memory,
            compute_s=client.compute_s,
            transfer_s=client.transfer_s,
            loss_before=client.loss_before,
            loss_after=client.loss_after,
            importance=client.importance,
            bytes_down=client.bytes_down,
            bytes_up=client.bytes_up,
            steps=client.steps,
            whole_loss_before=client.whole_loss_before,
            whole_loss_after=client.whole_loss_after,
            peak_bytes=client.peak_bytes,
            module_importance=client.module_importance,
            **{key: getattr(client, key) for key in (*ARM_FIELDS, *PROBE_FIELDS)},
        )
        for name, client in record.clients.items()
    ]
