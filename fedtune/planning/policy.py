"""What a planner that learns decides and observes, in numbers alone: arms, their costs, and their outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, TypeVar

Memory = TypeVar("Memory")


@dataclass(frozen=True)
class Arm:
    """What a planner chooses for a client: of the model what is pruned, what is trained, and for how long."""

    ratio: float
    """Share of the blocks' weights that is pruned, in [0, 0.875]."""
    rank: int
    """LoRA rank, at least 1."""
    top: float = 1.0
    """Share of the blocks, from the top, whose modules are trained, in (0, 1]; rounded to at least one block."""
    back: float = 0.0
    """Share of heads and channels that the backward pass leaves out, in [0, 0.875]."""
    share: float = 1.0
    """Share of the steps that are taken, in (0, 1]; at least one is."""
    down_rank: int | None = None
    """Largest rank of the global change that is sent; None: as the method's settings say."""


GainOf: TypeAlias = Literal["own", "whole", "both"]
"""The model in which a client's gain counts: the one that it trains, the whole one, or both alike."""


@dataclass(frozen=True)
class Probe:
    """What a client measured of its own speed for the coming round; nothing where it was not asked, or did not say."""

    s_per_tflop: float | None = None
    s_per_mb: float | None = None


@dataclass(frozen=True)
class Candidate:
    """One client of a cohort, with the cost of every arm; sequences run over the arms."""

    client: str
    weight: float
    """Share of the cohort's examples; the cohort's weights sum to 1."""
    feasible: tuple[bool, ...]
    """Whether the arm fits the client's memory and the ratios that the round allows; at least one arm does."""
    tflop: tuple[float, ...]
    """Work of a round in 1e12 floating point operations, above 0."""
    megabytes: tuple[float, ...]
    """Bytes down and up of a round in 1e6, above 0."""
    memory_gb: tuple[float, ...]
    overhead_s: float = 0.0
    """Seconds of a round that no arm changes."""
    s_per_tflop: float | None = None
    """From the device's profile, over its mean mode; None where there is none."""
    s_per_mb: float | None = None
    gain_of: GainOf = "own"
    probe: Probe = Probe()


@dataclass(frozen=True)
class Choice:
    """The arm of every client of a cohort."""

    arms: Mapping[str, int]
    """Index of an arm by client; of every candidate one that is feasible for it."""
    deadline_s: float | None = None
    """Seconds after which the round should be over; None where the policy knows no times."""
    why: Mapping[str, str] = field(default_factory=dict)
    """By client, the reason for its arm in a few words."""


@dataclass(frozen=True)
class Observed:
    """The outcome of one client's arm in one round."""

    client: str
    arm: Arm
    tflop: float
    megabytes: float
    """As counted, down and up."""
    compute_s: float | None
    """None where it is not known, as for a client that failed or was given up."""
    transfer_s: float | None
    used: bool = True
    """Whether its update was aggregated."""
    late_s: float | None = None
    """Seconds after which the client was given up: it would have taken at least as long. None where it was not."""
    overhead_s: float = 0.0
    """This and the next three as in `Candidate`."""
    s_per_tflop: float | None = None
    s_per_mb: float | None = None
    probe: Probe = Probe()
    loss_before: float | None = None
    """Before this round's pruning, in the structure of the last participation."""
    loss_after: float | None = None
    """On the same rows, in the new structure."""
    importance: float | None = None
    """Mean over the steps of sum |theta * gradient| of the LoRA parameters."""
    whole_loss_before: float | None = None
    """As `loss_before`, in the whole model, where the client trained a smaller one and holds the whole base."""
    whole_loss_after: float | None = None

    @property
    def seconds(self) -> float | None:
        return None if self.compute_s is None or self.transfer_s is None else self.compute_s + self.transfer_s


class Policy(Protocol[Memory]):
    """Chooses among arms: a pure function of what it has learned, the round and a key."""

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms to choose from."""
        ...

    def start(self) -> Memory:
        """Return what is known before the first round."""
        ...

    def choose(self, memory: Memory, round: int, candidates: Sequence[Candidate], *, key: int) -> Choice:
        """Return an arm for every candidate; the choice does not depend on the order of the candidates."""
        ...

    def learn(self, memory: Memory, observed: Sequence[Observed]) -> Memory:
        """Return what is known after a round."""
        ...
