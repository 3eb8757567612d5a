"""How far one update may move the model: by what its plan can reach, and by what the cohort's median says.

Every update is bounded by itself first, whatever the cohort: in a cohort of one or two no median shows an outlier. The
optimiser gives that bound. A step of AdamW moves a number by little more than the learning rate, and one of SGD with a
clipped gradient by the learning rate times `clip_norm`, so the planned steps have a reach that honest training never
leaves. The bounds follow from state, assignment and update alone: a resumed run refuses the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from statistics import median
from sys import float_info
from typing import Any, Literal, TypeAlias

import numpy as np

from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    Failure,
    PlannedClient,
    Role,
    Size,
    Training,
    TrainLora,
)
from fedtune.methods.change import Extent, extent_of, quick_square, size_of
from fedtune.methods.method import LinearMethod, Method
from fedtune.number_formats import from_wire
from fedtune.tensors import Tensors, cast, l2_norm

NormCap: TypeAlias = Literal["plan"] | float | None

LARGEST_CHANGE = 1e6
"""Norm of any change where the plan has no reach: no model's weights are so large."""
FINITE = (float_info.max, "a finite one")
SUMMABLE = 1e30
"""Norm of numbers of which a few can be added in float32."""
BETA1, BETA2 = 0.9, 0.999
"""Of the clients' AdamW."""
FEATURES = 2.0
"""Times the cohort's median that one client's features may be: one encoder makes them all, of rows of one kind."""
MARGIN = 1.01
"""Room for the rounding of the clients' steps."""
EPSILON: Mapping[str, float] = {"fp32": 2.0**-20, "fp16": 2.0**-10, "bf16": 2.0**-7, "int8": 2.0**-5, "int4": 0.5}
"""By wire format, twice the rounding of a number on its way there and back, relative to it. Of codes, how
far rounding at random can lengthen 64 numbers x: its mean square is at most a step times the sum of |x|, and so at most
8 / 127 or 8 / 7 of |x|^2; where all groups are as unlucky as that, the norm grows by 3 or 46 %."""
SMALLEST: Mapping[str, float] = {"fp32": 0.0, "fp16": 2.0**-24, "bf16": 0.0, "int8": 0.0, "int4": 0.0}
"""By wire format, the spacing of the numbers next to zero, where a step can be as small as that."""
PARTS: Mapping[Role, str] = {
    "change": "the change of the layers, b a",
    "factors": "the change of the factors",
    "saved": "the change of modules_to_save",
    "scalars": "the scalars",
    "numbers": "the numbers",
    "features": "the features of its examples, root mean square",
    "mean": "what enters the mean, minus the server's values",
}


@dataclass(frozen=True)
class Bounds:
    """What every update of a round is held against."""

    method: Method[Any]
    state: Any
    """That the round starts from."""
    blueprint: Blueprint
    norm_cap: NormCap = "plan"
    """`Schedule.norm_cap`."""

    def bound(self, update: AdmittedUpdate, assignment: Assignment) -> AdmittedUpdate | Failure:
        """Return the update with the sizes of its change if each is within its bounds, otherwise why not."""
        extent = extent_of(self.method.change(self.state, self.blueprint, self._with_decoded_start(assignment), update))
        norms, limits = dict(extent.sizes), self.limits(extent, assignment)
        # A product b a can be small where a is huge and b tiny: their means are not.
        if not self.mean_is_within(min(limits.get("mean", FINITE)[0], SUMMABLE), extent):
            with np.errstate(over="ignore", invalid="ignore"):
                moved = {name: quick_square(part) for name, part in self.method.displacement(self.state, update)}
            if moved:
                norms["mean"] = size_of(moved)
        for role, size in norms.items():
            limit, why = limits.get(role, FINITE)
            # Not `size > limit`: a norm that is no number is within no bound.
            if not size.norm <= limit:
                return too_large(update.client, role, size, limit, why)
        return replace(update, sizes=norms)

    def _with_decoded_start(self, assignment: Assignment) -> Assignment:
        """Return an assignment with the start of its client in float32, as it has decoded it."""
        if not isinstance(assignment.task, TrainLora) or "local" not in assignment.task.blobs:
            return assignment
        local = assignment.task.blobs["local"]
        if id(local) not in self._starts:
            self._starts[id(local)] = local, cast(from_wire(local), "fp32")
        blobs = {**assignment.task.blobs, "local": self._starts[id(local)][1]}
        return replace(assignment, task=replace(assignment.task, blobs=blobs))

    @cached_property
    def _starts(self) -> dict[int, tuple[Tensors, Tensors]]:
        """What clients were sent, and the same decoded: once for all that were sent the same. Each holds what it is of,
        since another mapping may have the identity of one that is gone.
        """
        return {}

    def mean_is_within(self, limit: float, extent: Extent) -> bool:
        """Return whether what enters the mean is within a limit by the norms that are known already.

        Of a mean of factors they are: the factors of a client start from the server's own, rounded, and are padded with
        zeros, so they end no further from them than they moved and the server's are large.
        """
        if not isinstance(self.method, LinearMethod) or not self.method.averages_factors:
            return False
        sizes = [extent.sizes[role].norm for role in ("factors", "saved") if role in extent.sizes]
        # Twice: what is sent down may be rounded, by less than its own size.
        return sum(sizes) + 2 * self._own <= limit

    @cached_property
    def _own(self) -> float:
        """Norm of the server's factors and modules_to_save, once for a cohort."""
        assert isinstance(self.method, LinearMethod)
        return l2_norm(self.method.current(self.state))

    @cached_property
    def _saved(self) -> float:
        return l2_norm(self.state.saved)

    def limits(self, extent: Extent, assignment: Assignment) -> Mapping[Role, tuple[float, str]]:
        """Return the largest norm by role and where it comes from; `FINITE` for roles that are left out."""
        if self.norm_cap is None or not isinstance(assignment.task, TrainLora):
            return {}
        if not isinstance(self.norm_cap, str):
            cap = (self.norm_cap, "rounds.norm_cap")
            # In what enters a mean, ranks that the client does not train differ from the server's by all that is there.
            return {"change": cap, "factors": cap, "saved": cap, "mean": (LARGEST_CHANGE, "the most of any change")}
        plan, task = assignment.plan, assignment.task
        rounding = EPSILON[task.wire_dtype]
        spacing = SMALLEST[task.wire_dtype] * math.sqrt(sum(extent.factors.values()))
        factors = reach(plan.training, extent.factors, start=extent.start, scale=plan.scale)
        saved = reach(plan.training, extent.saved, start=self._saved)
        why = f"the reach of {plan.training.steps} planned steps"
        return {
            # Follow from the two below for the methods that fedtune has; another's mean may be of anything.
            "change": (LARGEST_CHANGE, "the most of any change"),
            "mean": (LARGEST_CHANGE, "the most of any change"),
            "factors": (min(LARGEST_CHANGE, MARGIN * factors + rounding * (extent.rounded + factors) + spacing), why),
            "saved": (min(LARGEST_CHANGE, MARGIN * saved + EPSILON["fp32"] * self._saved), why),
        }


def too_large(client: str, role: Role, size: Size, limit: float, why: str, *, key: str = "norm_cap") -> Failure:
    """Return the failure of a client whose change is larger than a limit, which a key of the recipe has set."""
    return Failure(
        client,
        expected=f"{PARTS[role]}, to have a norm of at most {limit:.4g}, {why}",
        got=f"{size.norm:.4g}",
        # No limit is one for what is infinite.
        hint=f"if it has trained as asked, set rounds.{key} higher" if math.isfinite(size.norm) else "",
        where=f"{role}, most of it in {size.largest}",
        kind="refused",
        code="NORM_OVER_CAP",
    )


def reach(training: Training, moved: Mapping[str, int], *, start: float, scale: float = 1.0) -> float:
    """Return the largest norm of the change that planned steps can make of some numbers.

    Args:
        training: with `steps` set.
        moved: how many they are, by name; names of factors end in `.a` or `.b`.
        start: norm of the numbers before training, by which weight decay shrinks them.
        scale: that b carries.
    """
    steps, rate = training.steps or 0, training.rate
    scales = {name: scale if name.endswith(".b") else 1.0 for name in moved}
    decay = rate * training.weight_decay * steps
    if training.optimizer == "adamw":
        size = math.sqrt(sum(scales[name] ** 2 * count for name, count in moved.items()))
        free = rate * adam_steps(steps) * size
    elif training.clip_norm is not None:
        # Momentum repeats every step: 1 + m + m^2 + ... times in all.
        repeats = 1 / (1 - training.momentum)
        free = rate * training.clip_norm * steps * repeats * max(scales.values(), default=0.0)
        decay *= repeats
    else:
        return math.inf
    return (free + decay * start) / (1 - decay) if decay < 1 else math.inf


@lru_cache(maxsize=64)
def adam_steps(steps: int) -> float:
    """Return how many learning rates a number can move by in so many steps of Adam, whatever the gradients.

    With t the step, |m| / sqrt(v) is largest for gradients g_i in proportion to (beta1 / beta2)^(t - i)
    (Cauchy-Schwarz): 1 in the first step, never above 7.3.

    >>> adam_steps(1), adam_steps(10) < 15
    (1.0, True)
    """
    t = np.arange(1, steps + 1, dtype=np.float64)
    ratio = BETA1**2 / BETA2
    sums = (1 - ratio**t) / (1 - ratio)
    bias = np.sqrt((1 - BETA2**t) / (1 - BETA2)) * (1 - BETA1) / (1 - BETA1**t)
    return float(np.sum(np.sqrt(sums) * bias))


def planned_moves(planned: Mapping[str, PlannedClient]) -> Mapping[str, float] | None:
    """Return learning rate times steps of each client, where a planner draws such settings for each; None elsewhere.

    Of arms a hundredfold apart in their rates the larger would be refused as outliers, and learned to be bad.
    """
    if all(client.arm is None for client in planned.values()):
        return None
    training = {name: client.plan.training for name, client in planned.items()}
    return {name: one.rate * (one.steps or 1) for name, one in training.items()}


def refuse_outliers(
    updates: Sequence[AdmittedUpdate], max_norm: float | None, moves: Mapping[str, float] | None = None
) -> tuple[Mapping[str, float], Sequence[Failure]]:
    """Return the norms of the changes by client, and who is refused for one far above the others.

    Far above is more than max_norm times the cohort's median of a role; none admits any multiple. Of two updates
    neither is an outlier, and zero has no multiple: then the bounds of each update by itself are all there are. Clients
    that measure seeds and clients that descend have roles of their own, so neither are outliers among the others. With
    `moves`, how far each client's plan lets it go, changes are compared as multiples of that; see `planned_moves`.
    """
    refused: dict[str, Failure] = {}
    roles = sorted({role for update in updates for role in update.sizes} - {"mean"})
    for role in roles if max_norm is not None and len(updates) >= 3 else ():
        stated = {update.client: update.sizes[role] for update in updates if role in update.sizes}
        if len(stated) < 3:
            continue
        # The median, because a mean would be moved by the very update that it is to expose.
        far = {name: moves[name] if moves else 1.0 for name in stated}
        middle = median(size.norm / far[name] for name, size in stated.items())
        multiple = max_norm or math.inf
        if role == "features":
            multiple = min(multiple, FEATURES)
        why = f"{multiple:g} times the cohort's median{' for its rate and steps' * bool(moves)}"
        limits = {name: multiple * middle * far[name] for name in stated}
        over = {name: size for name, size in stated.items() if middle > 0 and not size.norm <= limits[name]}
        refused |= {
            name: too_large(name, role, size, limits[name], why, key="max_norm")
            for name, size in over.items()
            if name not in refused
        }
    # Sorted by name, so that a resumed run refuses in the same order and writes the same record.
    return (
        {update.client: update.norm for update in updates if update.client not in refused},
        [refused[name] for name in sorted(refused)],
    )
