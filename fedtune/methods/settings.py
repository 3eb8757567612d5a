"""The settings that methods averaging LoRA factors have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol

from annotated_types import Gt, Interval

from fedtune.messages import OMIT_DEFAULT, Weighting, WireDtype


@dataclass(frozen=True)
class ServerOptimizer:
    """How the server steps from the old values towards the clients' mean; the recipe's `method.server_optimizer`.

    The adaptive rules are Algorithm 2 of Reddi et al., ICLR 2021 (arXiv 2003.00295); fedavgm is Hsu et al., 2019
    (arXiv 1909.06335). `method.server_learning_rate` is the step size of all of them.
    """

    name: Literal["none", "fedavgm", "fedadam", "fedyogi"] = "none"
    """none: the step goes straight to the mean; fedavgm: with momentum; fedadam and fedyogi: each number's step is
    divided by the size of its past changes, which needs a small `server_learning_rate`."""
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """With fedavgm: share of the last step that is repeated."""
    beta1: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """With fedadam and fedyogi: how much of the mean change is kept from round to round."""
    beta2: Annotated[float, Interval(ge=0, lt=1)] = 0.99
    """With fedadam and fedyogi: how much of the mean squared change is kept from round to round."""
    tau: Annotated[float, Gt(0)] = 1e-3
    """With fedadam and fedyogi: added to the root of the mean squared change; the larger, the less the steps of
    different numbers differ."""


@dataclass(frozen=True)
class RobustRule:
    """How the clients' changes are combined so that a few wrong ones move the result only so far; `method.robust`.

    A client's change is what it contributes minus the server's own values, all tensors together, in the L2 norm. Median
    and trimmed mean: Yin et al., ICML 2018 (arXiv 1803.01498); multikrum: Blanchard et al., NeurIPS 2017
    (arXiv 1703.02757).
    """

    name: Literal["none", "clip", "trimmed", "median", "multikrum"] = "none"
    """none: the weighted mean; clip: the weighted mean of changes that are scaled down to `bound`; trimmed: of every
    number the mean without the largest and smallest ones; median: of every number the median; multikrum: the weighted
    mean of the clients whose changes lie closest to those of others. trimmed and median count every client alike."""
    bound: Literal["median"] | Annotated[float, Gt(0)] = "median"
    """With clip: largest norm of a change. median: the median of the norms in the rounds before, in round 1 of its own;
    or a number, which is the same in every round."""
    attackers: Annotated[float, Interval(gt=0, lt=0.5)] = 0.2
    """With trimmed and multikrum: share of a round's clients that may be wrong, rounded down to whole clients."""


@dataclass(frozen=True)
class AveragingSettings:
    """Settings of every method that averages factors; a method's own class names it and adds its keys after these."""

    name: str = ""
    """Name of the method."""
    server_learning_rate: Annotated[float, Gt(0)] = 1.0
    """Size of the server's step from its values towards the clients' mean; 1 takes the mean."""
    weights: Weighting = "examples"
    """examples: clients count in proportion to their training examples; uniform: all count the same."""
    wire_dtype: WireDtype = "int8"
    """Number format in which clients send what their factors changed by: numbers of 32 or 16 bits, or codes of 8 or 4
    bits that share a scale with 63 neighbours. modules_to_save always travel in fp32."""
    down_dtype: WireDtype | None = field(default=None, metadata=OMIT_DEFAULT)
    """Number format in which clients are sent factors; none: as `wire_dtype`."""


class NumberFormats(Protocol):
    """Settings with the number formats of either direction."""

    @property
    def wire_dtype(self) -> WireDtype: ...
    @property
    def down_dtype(self) -> WireDtype | None: ...


def down_dtype(settings: NumberFormats) -> WireDtype:
    """Return the number format of what is sent down."""
    return settings.down_dtype or settings.wire_dtype


@dataclass(frozen=True)
class LinearSettings(AveragingSettings):
    """Settings of a `LinearMethod`, which any server optimiser and any robust rule works over."""

    server_optimizer: ServerOptimizer = field(default=ServerOptimizer(), metadata=OMIT_DEFAULT)
    """Rule of the server's step; a table, or the name of one."""
    robust: RobustRule = field(default=RobustRule(), metadata=OMIT_DEFAULT)
    """Rule that combines the clients' changes; a table, or the name of one."""
