"""The fields of an order that follow from the server's state or the site's data, and the bounds of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from fedtune.config.recipe import Recipe, method_of, probing_training
from fedtune.errors import ShapeError, expected_and_got
from fedtune.lora.virtual_tokens import are_virtual
from fedtune.messages import Assignment, DescendSeeds, ProbeSeeds, ScoreRequest, SeedTask, TailRank, Training, TrainLora
from fedtune.methods.fedkseed_state import MOST_HALVINGS
from fedtune.number_formats import CODES, FORMATS, SCALE_DTYPE, SCALES, scales_shape
from fedtune.planning.planner import PlanChoices
from fedtune.pruning.depth import module_ranks
from fedtune.pruning.least_squares import TRAVELLING, moment_shapes
from fedtune.pruning.ranking import PruningSettings, counts
from fedtune.pruning.structure import from_bitmap
from fedtune.tensors import Array, Tensors
from fedtune.wire.profile import ClientProfile


class Bounds(Protocol):
    """What is read here of a recipe's permission; see `consent.Permitted`."""

    @property
    def choices(self) -> PlanChoices: ...

    @property
    def training(self) -> Training: ...

    def ratio(self, ratio: float) -> bool:
        """Return whether a pruning ratio is permitted."""
        ...

    @property
    def ratio_text(self) -> str: ...


@dataclass(frozen=True)
class Difference:
    """One field of an order that is not as the recipe says."""

    key: str
    expected: str
    got: object

    def __str__(self) -> str:
        return f"{self.key}: {expected_and_got(self.expected, short_text(self.got))}"


def short_text(value: object) -> str:
    """Return a value as a short text."""
    if isinstance(value, Exception):
        text = f"{value}" or type(value).__name__
    else:
        text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class Comparison:
    """An order, or a request for scores, beside the permitted one that is nearest to it."""

    recipe: Recipe
    profile: ClientProfile
    allowed: Bounds
    expected: Any
    got: Any

    @property
    def order(self) -> Assignment:
        assert isinstance(self.got, Assignment)
        return self.got

    @property
    def request(self) -> ScoreRequest:
        assert isinstance(self.got, ScoreRequest)
        return self.got


def expected_by(error: ShapeError) -> str:
    """Return what an error says that was expected, of which a difference states itself what came."""
    return str(error).partition("expected ")[2].partition("; got ")[0] or str(error)


Rule: TypeAlias = Callable[[Comparison], str]
"""What is expected of a free field that is out of its bounds; empty if it is within them."""


def labels(one: Comparison) -> str:
    """Only the recipe's classes; without any in it, those of all sites, this one's among them."""
    named, came, own = one.recipe.data.labels, one.got.labels, one.profile.foundation.labels
    if not came:
        return ""
    if named:
        return "" if tuple(came) == tuple(named) else f"the classes of data.labels, {short_text(list(named))}"
    fits = one.recipe.model.task == "classification" and len(set(came)) == len(came) and set(own) <= set(came)
    return "" if fits else "each class once, this site's own among them"


def date(one: Comparison) -> str:
    named = one.recipe.data.date or ""
    return "" if one.got.date in ("", named) else f"the day of the recipe, {named or 'none'}"


def rank(one: Comparison) -> str:
    expected, came = one.expected.plan.rank, one.order.plan.rank
    # With HetLoRA's term clients cut their rank, and are asked for what is left of it.
    least = 1 if any(isinstance(term, TailRank) for term in terms(one.expected)) else expected
    return "" if least <= came <= expected else f"{expected}{' or less' if least < expected else ''}"


def terms(order: Assignment) -> tuple[Any, ...]:
    return order.task.terms if isinstance(order.task, TrainLora) else ()


def ratio(one: Comparison) -> str:
    return "" if one.allowed.ratio(one.order.plan.ratio) else one.allowed.ratio_text


def ranks(one: Comparison) -> str:
    """Of each module one, none above the plan's; which are trained, the planner must be one that chooses."""
    plan, modules, layout = one.order.plan, one.profile.foundation.modules, one.profile.foundation.anatomy
    if not plan.ranks:
        return ""
    choices = one.allowed.choices
    if not choices.module_ranks and not choices.tops:
        return "none: a planner that trains all modules alike"
    if not isinstance(one.order.task, TrainLora):
        return "none without an adapter"
    try:
        plan.rank_of(modules)
    except ShapeError as error:
        return expected_by(error)
    if choices.module_ranks:
        allowed = {0, *choices.ranks} if choices.ranks is not None else None
        return "" if allowed is None or set(plan.ranks) <= allowed else f"of each {numbers_text(allowed)}"
    tops = sorted(choices.tops)
    shares = [] if layout is None else [module_ranks(modules, layout, plan.rank, top) for top in tops]
    return "" if plan.ranks in shares else f"those of {numbers_text([*tops, 1.0])} of the blocks, from the top"


def back(one: Comparison) -> str:
    allowed = {0.0, *one.allowed.choices.backs}
    return "" if one.order.plan.back in allowed else numbers_text(allowed)


def base_dtype(one: Comparison) -> str:
    allowed, came = one.allowed.choices.base_dtypes, one.order.plan.base_dtype
    return "" if came in ("", *allowed) else f"{', '.join(sorted(allowed)) or 'none'} beside model.dtype"


def view(one: Comparison) -> str:
    allowed, pruning, plan = {"whole", *one.allowed.choices.views}, one.recipe.pruning, one.order.plan
    if pruning is not None and pruning.adapters == "two" and plan.ratio == pruning.target:
        allowed.add("deployed")
    return "" if plan.view in allowed else " or ".join(sorted(allowed))


def importance(one: Comparison) -> str:
    allowed, came = one.allowed.choices.importance, one.order.plan.importance
    return "" if came in ("", *allowed) else f"no scores of modules{''.join(f' but {name!r}' for name in allowed)}"


def numbers_text(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in sorted(set(numbers)))


def stages(one: Comparison) -> str:
    """As many as the recipe has, each of this base; the last with as many channels as the ratio leaves."""
    pruning, layout, plan = one.order.lora.pruning, one.profile.foundation.anatomy, one.order.plan
    assert pruning is not None
    settings = pruning_settings(one)
    most = 0 if plan.ratio == 0 or settings.policy == "local" else settings.stages
    if len(pruning.stages) > most:
        return f"at most {most} stages"
    if not pruning.stages:
        return ""
    if layout is None:
        return "none for a base that cannot be pruned"
    try:
        last = [from_bitmap(stage, layout) for stage in pruning.stages][-1]
    except ShapeError as error:
        return expected_by(error)
    wanted = counts(layout, settings, plan.ratio).channels
    channels = tuple(len(block.ff) for block in last.blocks)
    return "" if channels == wanted else f"{short_text(list(wanted))} channels by block, at the ratio {plan.ratio:g}"


def previous(one: Comparison) -> str:
    pruning, layout = one.order.lora.pruning, one.profile.foundation.anatomy
    assert pruning is not None
    if not pruning.previous:
        return ""
    if layout is None:
        return "none for a base that cannot be pruned"
    try:
        from_bitmap(pruning.previous, layout)
    except ShapeError as error:
        return expected_by(error)
    return ""


def scores_requested(one: Comparison) -> str:
    pruning = one.order.lora.pruning
    assert pruning is not None
    alone = pruning_settings(one).policy == "local" and pruning.scores_requested
    return "false, where each client ranks for itself" if alone else ""


def moments_requested(one: Comparison) -> str:
    pruning, ratio = one.order.lora.pruning, one.order.plan.ratio
    assert pruning is not None
    repaired = pruning_settings(one).repair != "none" and ratio == 0
    return "false, without pruning.repair or of a pruned model" if pruning.moments_requested and not repaired else ""


def moments_fault(moments: Tensors, one: Comparison) -> str:
    """Return what is expected of moments that are none of this base's layers; empty if they are, or there are none."""
    layout = one.profile.foundation.anatomy
    if not moments:
        return ""
    if layout is None or one.recipe.pruning is None or one.recipe.pruning.repair == "none":
        return "no moments, by pruning.repair"
    wanted = {name: (shape, TRAVELLING) for name, shape in moment_shapes(one.recipe.pruning, layout).items()}
    came = {name: (tensor.shape, tensor.dtype) for name, tensor in moments.items()}
    return "" if came == wanted else f"moments of this site's layers, {short_text(sorted(wanted))}"


def whole_requested(one: Comparison) -> str:
    pruning = one.order.lora.pruning
    assert pruning is not None
    alone = pruning_settings(one).policy == "local" and pruning.whole_requested
    return "false, where each client ranks for itself" if alone else ""


def pruning_settings(one: Comparison) -> PruningSettings:
    """Return the recipe's: the order's own may be any."""
    assert one.recipe.pruning is not None  # or the permitted order had no pruning whose fields are compared
    return one.recipe.pruning


def measures_step(one: Comparison) -> bool:
    """Return whether the first round measures the step of a scalar, and not the learning rate alone."""
    return one.expected.probe.calibrate and getattr(one.recipe.method, "scalar_step", "auto") == "auto"


def learning_rate(one: Comparison) -> str:
    """As the recipe says; where it leaves the rate to the first round, up to the largest that it permits."""
    wanted, order = one.expected, one.order
    rates: list[tuple[Any, float, float]] = [
        (one.allowed.training.learning_rate, wanted.plan.training.rate, order.plan.training.rate)
    ]
    fallbacks = [task.fallback for task in (wanted.task, order.task) if isinstance(task, DescendSeeds)]
    if all(fallbacks) and len(fallbacks) == 2 and (probing := probing_training(one.recipe, order.plan.client)):
        permitted, came = (training.rate for training in fallbacks if training)
        rates.append((probing.learning_rate, permitted, came))
    steps = isinstance(order.task, SeedTask) and not order.probe.calibrate
    halvings = most_halvings(order) if steps else 0
    return next((fault for rate in rates if (fault := rate_fault(one, *rate, halvings=halvings))), "")


def most_halvings(order: Assignment) -> int:
    """Return how often the losses of earlier rounds may have halved the rate: once in each of them, at most."""
    return min(MOST_HALVINGS, order.round - 1)


def rate_fault(one: Comparison, stated: Any, expected: float, came: float, *, halvings: int) -> str:
    """Return what is expected of a rate in place of one that came, by what the recipe states; empty if it may be."""
    if stated == "auto":
        largest = getattr(one.recipe.method, "largest_rate", expected)
        return "" if 0 < came <= largest else f"at most {largest:g}, by method.largest_rate"
    # Halved where the clients' losses rise, by the method whose server then goes back.
    allowed = came in [expected * 0.5**count for count in range(halvings + 1)]
    return "" if allowed else f"{expected:g}" + f", or halved up to {halvings} times" * (halvings > 0)


def curvatures(one: Comparison) -> str:
    allowed = one.expected.probe.curvatures or not one.order.probe.curvatures
    return "" if allowed else "false, where client.learning_rate is a number"


def exponent(one: Comparison) -> str:
    # A recipe that names its step has one exponent; otherwise the first round measures it.
    expected = one.expected.probe
    return "" if measures_step(one) or one.order.probe.exponent == expected.exponent else str(expected.exponent)


def perturbation(one: Comparison) -> str:
    """The recipe's distance, in whatever unit; as whole units it is rounded by a 32nd at most."""
    wanted, came = (probe.perturbation * 2.0**-probe.exponent for probe in (one.expected.probe, one.order.probe))
    return "" if abs(came - wanted) <= wanted / 16 else f"{wanted:g} as a distance"


def shift(one: Comparison) -> str:
    # It grows by one with every round whose scalars were at their bound, and falls by one where the rate is halved.
    # The decoder holds it below 2^24.
    expected = one.expected.probe
    least = max(0, expected.shift - most_halvings(one.order))
    return "" if measures_step(one) or one.order.probe.shift >= least else f"at least {least}"


def seed_state(one: Comparison) -> str:
    return "" if one.order.probe.state.round == one.order.round - 1 else f"that after round {one.order.round - 1}"


def levels(one: Comparison) -> str:
    # A byte for each seed, as the decoder has checked; which, follows from what all clients have measured.
    return "" if len(one.order.probe.levels) in (0, one.expected.probe.seeds) else "a byte for each seed"


def largest_shift(one: Comparison) -> str:
    # What the sums have room for, which only the server's state says; a smaller one bounds the site's own steps.
    return ""


def head(one: Comparison) -> str:
    return head_fault(one, one.order.probe.head, after=one.order.round - 1)


def head_fault(one: Comparison, came: Tensors, *, after: int) -> str:
    """Return what is expected of a head in the place of the base's, after so many rounds; empty if it is that."""
    if not came:
        return ""
    if one.recipe.adapter.head == "drawn" or after < 1:
        return "none, by adapter.head"
    own = {name: (tensor.shape, tensor.dtype) for name, tensor in one.profile.foundation.saved.items()}
    fits = all(own.get(name) == (tensor.shape, tensor.dtype) for name, tensor in came.items())
    return "" if fits else f"tensors of the head in this site's shapes, among {short_text(sorted(own))}"


def calibrate(one: Comparison) -> str:
    if isinstance(one.order.task, DescendSeeds):
        return "false, of a client that descends" if one.order.probe.calibrate else ""
    return "" if one.expected.probe.calibrate or not one.order.probe.calibrate else "false, by method.scalar_step"


def order_blobs(one: Comparison) -> str:
    blobs, pruned = dict(one.order.lora.blobs), one.order.lora.pruning is not None
    kind = one.recipe.adapter.kind
    if are_virtual(one.profile.foundation.saved) != (kind != "lora"):
        return f"those of adapter.kind = {kind!r}, which this site's file must name too"
    if fault := moments_fault(blobs.pop("moments", {}), one):
        return fault
    try:
        trained = one.order.plan.rank_of(one.profile.foundation.modules)
    except ShapeError:
        return ""  # as the rule of the ranks says
    personal = one.recipe.personal
    # What stays with this client, by the recipe, is in no order.
    keeps = personal.in_full().keeps if personal is not None and personal.has_state else keeps_nothing
    if kept_here := sorted(name for role in ("local", "saved") for name in blobs.get(role, {}) if keeps(name)):
        return f"nothing of what stays here, by personal.keep; not {short_text(kept_here[0])}"
    return next(blob_faults(blobs, one, ranks=trained, pruned=pruned, keeps=keeps), "")


def keeps_nothing(name: str) -> bool:
    """Return that a tensor does not stay with its client."""
    return False


def score_blobs(one: Comparison) -> str:
    if method_of(one.recipe).task is ProbeSeeds:
        # Beside the ledger, the head that its weights start from.
        if one.request.blobs and (set(one.request.blobs) != {"saved"} or not one.request.ledger):
            return "none, but a ledger of seeds"
        return head_fault(one, one.request.blobs.get("saved", {}), after=one.request.round)
    return next(blob_faults(one.request.blobs, one, ranks=None, pruned=False, roles=("global", "saved")), "")


def ledger(one: Comparison) -> str:
    if method_of(one.recipe).task is ProbeSeeds:
        # The base, before the first round, is scored as it is.
        return "" if one.request.ledger or one.request.round == 0 else "a ledger of seeds"
    return "none, but an adapter" if one.request.ledger else ""


def own_training(one: Comparison) -> str:
    # As a whole: the rules of an order's training read what only an order has.
    wanted, came = one.expected.personal, one.request.personal
    same = wanted is not None and came is not None and wanted.training == came.training
    return "" if same else "the training of a client's own model that the recipe says"


def ordinals(one: Comparison) -> str:
    return "" if one.request.ledger or not one.request.trainable else "none without a ledger"


def blob_faults(
    blobs: Mapping[str, Tensors],
    one: Comparison,
    *,
    ranks: Mapping[str, int] | None,
    pruned: bool,
    roles: tuple[str, ...] = ("global", "local", "saved"),
    keeps: Callable[[str], bool] = keeps_nothing,
) -> Iterator[str]:
    """Yield what is expected of tensors that are none of this site's layers; `ranks`: of those that are trained."""
    model = one.profile.foundation
    if strange := sorted(set(blobs) - set(roles)):
        yield f"the roles {', '.join(roles)}; not {short_text(strange[0])}"
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in blobs.get("saved", {}).items()}
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in model.saved.items() if not keeps(name)}
    # All of them or, before there is a model to score, none: which are trained is the site's own word.
    if shapes != wanted and (shapes or ranks is not None):
        yield f"as saved {short_text(sorted(wanted))} in this site's shapes"
    for role in ("global", "local"):
        tensors = blobs.get(role, {})
        for name, tensor in tensors.items():
            if name.endswith(SCALES):
                fault = scales_fault(name, tensor, tensors)
            else:
                module = name.rpartition(".")[0]
                most = ranks.get(module, 0) if role == "local" and ranks is not None else None
                fault = factor_fault(name, tensor, model.modules, most, pruned=pruned)
                fault = fault or codes_fault(name, tensor, tensors)
            if fault:
                yield f"as {role} {fault}"


def factor_fault(
    name: str, tensor: Array, modules: Mapping[str, tuple[int, int]], rank: int | None, *, pruned: bool
) -> str:
    """Return what is expected of a factor, or a dense change, that is none of a site's layers; empty if it is one."""
    module, _, side = name.rpartition(".")
    shape = modules.get(module)
    if shape is None or side not in ("a", "b", "w"):
        return f"factors of this site's layers; not {short_text(name)}"
    if tensor.dtype not in FORMATS.values() or tensor.ndim != 2:
        return f"{short_text(name)} as a matrix of numbers in 16 or 32 bits, or of codes"
    m, n = shape
    rows, columns = tensor.shape
    width = {"a": rows, "b": columns, "w": 0}[side]
    outer = {"a": (columns, n), "b": (rows, m), "w": (rows, m)}[side]
    inner = (columns, n) if side == "w" else (0, 0)
    for came, most in (outer, inner):
        if came > most or (came != most and not pruned):
            return f"{short_text(name)} of this site's shape {shape}"
    if width > (max(m, n) if rank is None else rank):
        return f"{short_text(name)} of at most rank {max(m, n) if rank is None else rank}"
    return ""


def codes_fault(name: str, tensor: Array, tensors: Tensors) -> str:
    """Return what is expected beside codes; empty if it is there, or the tensor holds none."""
    coded, scaled = tensor.dtype in CODES.values(), name + SCALES in tensors
    return "" if coded == scaled else f"{short_text(name)} as {'codes with' if coded else 'numbers without'} scales"


def scales_fault(name: str, scales: Array, tensors: Tensors) -> str:
    """Return what is expected of scales that are none of a factor's codes; empty if they are."""
    codes = tensors.get(of := name.removesuffix(SCALES))
    if codes is None or codes.ndim != 2 or scales.dtype != SCALE_DTYPE or scales.shape != scales_shape(of, codes.shape):
        return f"{short_text(name)} as a scale for every group of codes"
    return ""


FREE: Mapping[str, Rule] = {
    "Assignment.labels": labels,
    "Assignment.date": date,
    "Training.learning_rate": learning_rate,
    "Plan.rank": rank,
    "Plan.ratio": ratio,
    "Plan.ranks": ranks,
    "Plan.back": back,
    "Plan.base_dtype": base_dtype,
    "Plan.view": view,
    "Plan.importance": importance,
    "TrainLora.blobs": order_blobs,
    "Pruning.stages": stages,
    "Pruning.previous": previous,
    "Pruning.scores_requested": scores_requested,
    "Pruning.moments_requested": moments_requested,
    "Pruning.whole_requested": whole_requested,
    "ProbeSeeds.exponent": exponent,
    "ProbeSeeds.shift": shift,
    "ProbeSeeds.perturbation": perturbation,
    "ProbeSeeds.state": seed_state,
    "ProbeSeeds.levels": levels,
    "ProbeSeeds.calibrate": calibrate,
    "ProbeSeeds.head": head,
    "DescendSeeds.largest_shift": largest_shift,
    "ProbeSeeds.curvatures": curvatures,
    "ScoreRequest.blobs": score_blobs,
    "ScoreRequest.ledger": ledger,
    "ScoreRequest.trainable": ordinals,
    "PersonalRequest.training": own_training,
    "ScoreRequest.labels": labels,
    "ScoreRequest.date": date,
}
"""The bounds of what follows from the server's state and the sites' data: all other fields follow from the recipe."""
