"""What a planner decides and learns, in numbers alone: arms, what each would cost a client, and what came of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

Memory = TypeVar("Memory")


@dataclass(frozen=True)
class Arm:
    """One thing that a client may be asked to do."""

    ratio: float
    """Asked block sparsity, in [0, 0.875]."""
    rank: int
    """LoRA rank, at least 1."""


@dataclass(frozen=True)
class Candidate:
    """One client of a cohort, and what each arm would cost it; sequences run over the arms."""

    client: str
    weight: float
    """Share of the cohort's examples; the cohort's weights sum to 1."""
    feasible: tuple[bool, ...]
    """Whether the arm fits the client's memory, and the round's least ratio; at least one does."""
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


@dataclass(frozen=True)
class Choice:
    """What a planner asks of a cohort."""

    arms: Mapping[str, int]
    """Index of an arm by client; of every candidate one that is feasible for it."""
    deadline_s: float | None = None
    """When the round should have ended; None where the policy knows no times."""
    why: Mapping[str, str] = field(default_factory=dict)
    """A few words by client: what spoke for its arm."""


@dataclass(frozen=True)
class Observed:
    """What came of one client's arm in one round."""

    client: str
    arm: Arm
    tflop: float
    megabytes: float
    """As counted, down and up."""
    compute_s: float | None
    """None where nothing is known of it, as of a client that failed, or was given up."""
    transfer_s: float | None
    used: bool = True
    """Whether its work went into the round; else the arm brought nothing."""
    late_s: float | None = None
    """Seconds after which it was given up, where it was: it would have taken at least as long."""
    overhead_s: float = 0.0
    """As of a candidate, and so are the next two."""
    s_per_tflop: float | None = None
    s_per_mb: float | None = None
    loss_before: float | None = None
    """Before surgery, in the structure of the last participation."""
    loss_after: float | None = None
    """On the same rows, in the new structure."""
    importance: float | None = None
    """Mean over the steps of sum |theta * gradient| of the LoRA parameters."""

    @property
    def seconds(self) -> float | None:
        return None if self.compute_s is None or self.transfer_s is None else self.compute_s + self.transfer_s


class Policy(Protocol[Memory]):
    """Chooses among arms; a pure function of what it has learned, the round, and a key."""

    @property
    def arms(self) -> tuple[Arm, ...]:
        """What there is to choose from."""
        ...

    def start(self) -> Memory:
        """Return what is known before the first round."""
        ...

    def choose(self, memory: Memory, round: int, candidates: Sequence[Candidate], *, key: int) -> Choice:
        """Return an arm for every candidate; what comes out depends on the names, never on their order."""
        ...

    def learn(self, memory: Memory, observed: Sequence[Observed]) -> Memory:
        """Return what is known after a round."""
        ...
