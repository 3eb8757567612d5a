"""The settings that methods averaging LoRA factors have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

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
class AveragingSettings:
    """Settings of every method that averages factors; a method's own class names it and adds its keys after these."""

    name: str = ""
    """Name of the method."""
    server_learning_rate: Annotated[float, Gt(0)] = 1.0
    """Size of the server's step from its values towards the clients' mean; 1 takes the mean."""
    weights: Weighting = "examples"
    """examples: clients count in proportion to their training examples; uniform: all count the same."""
    wire_dtype: WireDtype = "bf16"
    """Number format in which factors travel, down and up; modules_to_save always travel in fp32."""


@dataclass(frozen=True)
class LinearSettings(AveragingSettings):
    """Settings of a `LinearMethod`, which any server optimiser works over."""

    server_optimizer: ServerOptimizer = field(default=ServerOptimizer(), metadata=OMIT_DEFAULT)
    """Rule of the server's step; a table, or the name of one."""
