"""Robust rules over any linear method: clipping, trimmed mean, median and multi-Krum in place of the weighted mean.

A method with such a rule is no longer linear: the server must see every update, so it takes neither secure sums nor
anything else that needs a plain mean, and the types say so.

N: clients of the round, f: how many of them may be wrong, C: the bound of clip
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import ceil, floor, sqrt
from statistics import median
from typing import Any, TypeAlias

import numpy as np

from fedtune.errors import RoundError
from fedtune.lora.adapter import Adapter
from fedtune.messages import AdmittedUpdate, Blueprint, cohort_weights
from fedtune.methods.method import LinearMethod, Method, contribution_now
from fedtune.methods.settings import RobustRule
from fedtune.tensors import Array, Tensors, weighted_mean

PAST = 5
"""Rounds whose norms give the bound of clip: changes become smaller while training goes on."""
BLOCK = 2**20
"""Numbers of a cohort that are combined at a time."""
OUTLYING = 0.9
"""Share of a client's numbers that trimming has left out, from which on the client is named."""


@dataclass(frozen=True)
class Contribution:
    """What one client of a round contributes."""

    client: str
    tensors: Tensors
    share: float
    """p_k, its weight; those of a round add up to 1."""


@dataclass(frozen=True)
class Combined:
    """The result of a rule."""

    mean: Tensors
    """Float32."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What became of whose change, for the round's line."""
    norm: float = 0.0
    """Median norm of the changes, from which clip takes the bound of later rounds; 0 where none is taken from it."""


@dataclass(frozen=True)
class RobustState:
    """A linear method's state beside what its robust rule remembers."""

    inner: Any
    """The method's own state."""
    norms: Sequence[float] = ()
    """With clip: the median norm of the changes in each of the last rounds."""
    last: Mapping[str, float] = field(default_factory=dict)
    """Figures of the last round."""

    @property
    def round(self) -> int:
        """Rounds completed."""
        return int(self.inner.round)

    @property
    def saved(self) -> Tensors:
        """modules_to_save, which the rule combines like the factors."""
        saved: Tensors = self.inner.saved
        return saved


Rule: TypeAlias = Callable[[RobustRule, Tensors, Sequence[Contribution], Sequence[float]], Combined]
"""(settings, the server's values, contributions in cohort order, norms of earlier rounds) -> what takes the place of
the mean"""


def clip(rule: RobustRule, current: Tensors, cohort: Sequence[Contribution], past: Sequence[float]) -> Combined:
    """Return the weighted mean of changes that are scaled down to a norm of at most C.

    With f the attackers' share of the weights, the result is at most 2 f C from that of the honest clients alone:
    f of the mean is theirs, of norm at most C, and takes the place of as much of the honest mean, of norm at most C.
    """
    norms = {part.client: distance(part.tensors, current) for part in cohort}
    middle = median(norms.values())
    # Of earlier rounds, so that it is fixed before a client answers; in the first round a minority cannot move it far.
    bound = rule.bound if rule.bound != "median" else median(past) if past else middle
    scales = {name: 1.0 if size <= bound else bound / size for name, size in norms.items()}
    # A change within the bound stays as it is: where no client is clipped, this is the plain mean to the last bit.
    parts = [(scale_change(part.tensors, current, scales[part.client]), part.share) for part in cohort]
    clipped = {f"clipped.{name}": scale for name, scale in scales.items() if scale < 1}
    return Combined(weighted_mean(parts), {"clip_bound": bound, **clipped}, middle if rule.bound == "median" else 0.0)


def trimmed_mean(rule: RobustRule, current: Tensors, cohort: Sequence[Contribution], past: Sequence[float]) -> Combined:
    """Return of every number the mean without the f largest and the f smallest, f = floor(attackers * N)."""
    count = num_attackers(rule, len(cohort))
    outside = np.zeros(len(cohort))

    def combine(numbers: Array) -> Array:
        ordered = np.sort(numbers, axis=0)
        inner = ordered[count : len(cohort) - count]
        outside[:] += np.count_nonzero((numbers < inner[0]) | (numbers > inner[-1]), axis=1)
        mean: Array = inner.mean(axis=0)
        return mean

    mean = number_by_number(current, cohort, combine)
    size = max(1, sum(array.size for array in current.values()))
    shares = {part.client: float(count / size) for part, count in zip(cohort, outside, strict=True)}
    return Combined(mean, {f"trimmed.{name}": share for name, share in shares.items() if share >= OUTLYING})


def coordinate_median(
    rule: RobustRule, current: Tensors, cohort: Sequence[Contribution], past: Sequence[float]
) -> Combined:
    """Return of every number the median: of an even number of clients the mean of the two in the middle."""
    return Combined(number_by_number(current, cohort, lambda numbers: np.median(numbers, axis=0)))


def multikrum(rule: RobustRule, current: Tensors, cohort: Sequence[Contribution], past: Sequence[float]) -> Combined:
    """Return the weighted mean of the N - f clients of the best scores, equal ones by name.

    A client's score is the sum of its N - f - 2 smallest squared distances to others.
    """
    count = num_attackers(rule, len(cohort))
    distances = squared_distances(current, cohort)  # (N, N)
    # The first of a sorted row is the distance to itself, or to an equal client, which is zero as well.
    scores = np.sort(distances, axis=1)[:, 1 : len(cohort) - count - 1].sum(axis=1)
    ordered = sorted(range(len(cohort)), key=lambda place: (scores[place], cohort[place].client))
    chosen = set(ordered[: len(cohort) - count])
    worst = float(max(scores[place] for place in chosen))
    # By how much it lies further out than the furthest one that is used; 1 for a tie.
    ratios = {cohort[place].client: float(scores[place] / worst) if worst else 1.0 for place in ordered[len(chosen) :]}
    parts = [(part.tensors, part.share) for place, part in enumerate(cohort) if place in chosen]
    return Combined(weighted_mean(parts), {f"dropped.{name}": ratio for name, ratio in sorted(ratios.items())})


RULES: Mapping[str, Rule] = {
    "clip": clip,
    "trimmed": trimmed_mean,
    "median": coordinate_median,
    "multikrum": multikrum,
}


def with_robust_rule(method: LinearMethod[Any], rule: RobustRule) -> Method[RobustState]:
    """Return the method with a robust rule in place of the mean; all else stays as the method has it."""
    combine = RULES[rule.name]

    def init(blueprint: Blueprint, settings: Any) -> RobustState:
        return RobustState(method.init(blueprint, settings))

    def start(state: RobustState, adapter: Adapter, saved: Tensors) -> RobustState:
        assert method.start is not None
        return replace(state, inner=method.start(state.inner, adapter, saved))

    def aggregate(state: RobustState, updates: Sequence[AdmittedUpdate]) -> RobustState:
        cohort = [
            Contribution(update.client, contribution_now(method, state.inner, update, inner_of(update.origin)), share)
            for update, share in cohort_weights(updates, method.weights(state.inner))
        ]
        if len(cohort) < (least := least_clients(rule)):
            raise too_few(state.round + 1, rule, len(cohort), least)
        combined = combine(rule, method.current(state.inner), cohort, state.norms)
        # A round in which most clients change nothing says nothing of how large a change may be.
        norms = [*state.norms, combined.norm][-PAST:] if combined.norm else state.norms
        return RobustState(method.advance(state.inner, combined.mean), norms, combined.figures)

    def inner_of(origin: RobustState | None) -> Any:
        return None if origin is None else origin.inner

    def figures(state: RobustState) -> Mapping[str, Any]:
        return {**method.figures(state.inner), **state.last}

    def remarks(state: RobustState) -> Sequence[str]:
        return remarks_on(state.last)

    def on_inner(operation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda state, *rest: operation(state.inner, *rest)

    # A plain `Method` again: what only a linear one has must not be found on it.
    own = [field.name for field in fields(Method)]
    operations = {name: on_inner(operation) for name, operation in method.operations.items() if name in own}
    return Method(
        **{
            **{name: getattr(method, name) for name in own},
            **operations,
            "init": init,
            "start": start if method.start else None,
            "aggregate": aggregate,
            "figures": figures,
            "remarks": remarks,
        }
    )


def remarks_on(last: Mapping[str, float]) -> Sequence[str]:
    """Return a line for each thing that a rule has done to named clients.

    >>> remarks_on({"clip_bound": 0.5, "clipped.anna": 0.04, "clipped.bob": 1 / 3})
    ['clipped to a norm of 0.5: anna (4 % of its change is used), bob (33 %)']
    >>> remarks_on({"dropped.eve": 74 / 13}), remarks_on({"trimmed.eve": 0.97})
    (['dropped, as far from the others: eve'], ['almost all numbers trimmed: eve'])
    """
    groups = {
        kind: {name.partition(".")[2]: value for name, value in last.items() if name.startswith(f"{kind}.")}
        for kind in ("clipped", "dropped", "trimmed")
    }
    lines = []
    if clipped := [f"{name} ({value:.0%}" for name, value in groups["clipped"].items()]:
        shares = [text.replace("%", " %") for text in clipped]
        used = ", ".join([f"{shares[0]} of its change is used)", *(f"{text})" for text in shares[1:])])
        lines.append(f"clipped to a norm of {last['clip_bound']:.4g}: {used}")
    if groups["dropped"]:
        lines.append(f"dropped, as far from the others: {', '.join(groups['dropped'])}")
    if groups["trimmed"]:
        lines.append(f"almost all numbers trimmed: {', '.join(groups['trimmed'])}")
    return lines


def num_attackers(rule: RobustRule, clients: int) -> int:
    """Return f for a round of so many clients."""
    # 0.29 * 100 is a little less than 29 in binary.
    return floor(rule.attackers * clients + 1e-9)


def least_clients(rule: RobustRule) -> int:
    """Return with how many clients, and any larger number, a rule leaves out at least one and is defined.

    >>> [least_clients(RobustRule(name)) for name in ("clip", "median", "trimmed", "multikrum")]
    [1, 3, 5, 5]
    """
    if rule.name == "median":
        return 3
    if rule.name not in ("trimmed", "multikrum"):
        return 1

    def is_enough(clients: int) -> bool:
        count = num_attackers(rule, clients)
        return count >= 1 and (rule.name == "trimmed" or clients >= 2 * count + 3)

    # From the larger of these two on, both hold for every number.
    above = ceil(max(1 / rule.attackers, 3 / (1 - 2 * rule.attackers))) + 1
    return 1 + max((clients for clients in range(1, above) if not is_enough(clients)), default=0)


def too_few(round: int, rule: RobustRule, clients: int, least: int) -> RoundError:
    return RoundError(
        f"round {round}: expected at least {least} updates, which method.robust = {rule.name!r} needs; got {clients}; "
        f"set rounds.min_clients to {least}, or use the rule 'clip'"
    )


def distance(tensors: Tensors, current: Tensors) -> float:
    """Return the L2 norm of a change, over all its tensors."""
    # `np.sum` and not BLAS, whose threads would decide the last bits.
    return sqrt(sum(float(np.sum(np.square(tensors[name].astype(np.float64) - x))) for name, x in in_float64(current)))


def scale_change(tensors: Tensors, current: Tensors, scale: float) -> Tensors:
    """Return the contribution whose change is so many times as large, in float64."""
    if scale == 1:
        return tensors
    return {name: x + scale * (tensors[name].astype(np.float64) - x) for name, x in in_float64(current)}


def in_float64(tensors: Tensors) -> Iterator[tuple[str, Array]]:
    """Yield the tensors by name, in float64: sums over them must not depend on who made the mapping."""
    return ((name, tensors[name].astype(np.float64)) for name in sorted(tensors))


def blocks(current: Tensors, cohort: Sequence[Contribution]) -> Iterator[tuple[str, slice, Array]]:
    """Yield name, place and numbers (N, block) of parts of the contributions, in float64."""
    width = max(1, BLOCK // len(cohort))
    for name in sorted(current):
        flat = [part.tensors[name].reshape(-1) for part in cohort]
        for start in range(0, current[name].size, width):
            place = slice(start, start + width)
            yield name, place, np.stack([array[place].astype(np.float64) for array in flat])


def number_by_number(current: Tensors, cohort: Sequence[Contribution], combine: Callable[[Array], Array]) -> Tensors:
    """Return what a function makes of the clients' numbers at each place, as float32."""
    combined = {name: np.empty(array.size, np.float32) for name, array in current.items()}
    for name, place, numbers in blocks(current, cohort):
        combined[name][place] = combine(numbers)
    return {name: array.reshape(current[name].shape) for name, array in combined.items()}


def squared_distances(current: Tensors, cohort: Sequence[Contribution]) -> Array:
    """Return the squared distance of every two contributions, (N, N).

    From differences and not from inner products: those of equal contributions are zero, and equal ones have equal
    scores, so that the name alone decides between them on any machine.
    """
    total = np.zeros((len(cohort), len(cohort)))
    for _, _, numbers in blocks(current, cohort):
        for place in range(len(cohort) - 1):
            apart = np.square(numbers[place + 1 :] - numbers[place]).sum(axis=1)
            total[place, place + 1 :] += apart
            total[place + 1 :, place] += apart
    return total
