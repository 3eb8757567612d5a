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
    """none: a plain step; fedavgm: momentum; fedadam and fedyogi: a step for every number by the size of its past
    changes, which needs a small server_learning_rate."""
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """fedavgm: share of the last step that is repeated."""
    beta1: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """fedadam, fedyogi: decay of the mean change."""
    beta2: Annotated[float, Interval(ge=0, lt=1)] = 0.99
    """fedadam, fedyogi: decay of the mean squared change."""
    tau: Annotated[float, Gt(0)] = 1e-3
    """fedadam, fedyogi: added to the root of the mean squared change; large values adapt less."""


@dataclass(frozen=True)
class AveragingSettings:
    """Settings of every method that averages factors; a method's own class names it and adds its keys after these."""

    name: str = ""
    """Name of the method."""
    server_learning_rate: Annotated[float, Gt(0)] = 1.0
    """Step from the old values towards the clients' mean; 1 takes the mean."""
    weights: Weighting = "examples"
    """`examples`: a client counts in proportion to its training examples; `uniform`: all clients count the same."""
    wire_dtype: WireDtype = "bf16"
    """Number format of everything that is trained, down and up, but of modules_to_save, which travel in fp32."""


@dataclass(frozen=True)
class LinearSettings(AveragingSettings):
    """Settings of a `LinearMethod`, which any server optimiser works over."""

    server_optimizer: ServerOptimizer = field(default=ServerOptimizer(), metadata=OMIT_DEFAULT)
    """Rule of the server's step; a table, or the name of one."""
