"""What the server takes from a client: an update that answers its assignment in every respect; others are refused."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedtune.class_sums import ClassSums, Head, find_head, impossible
from fedtune.directions.downlink import MAX_SCALAR
from fedtune.directions.numbers import LARGEST_NUMBER, is_shortest
from fedtune.directions.sampling import SHARED
from fedtune.errors import ShapeError
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    ClientUpdate,
    DescendResult,
    DescendSeeds,
    Failure,
    LoraResult,
    Plan,
    ProbeResult,
    ProbeSeeds,
    Pruning,
    SeedResult,
    SumClasses,
    TailRank,
    Task,
    Training,
    TrainLora,
)
from fedtune.methods.change import quick_square
from fedtune.number_formats import CODES, FORMATS, LARGEST_CODE, SCALES, from_wire, scales_shape
from fedtune.probing.descent import MAX_SKIPPED as MAX_SKIPPED_STEPS
from fedtune.pruning.least_squares import check_moments, moment_shapes
from fedtune.pruning.ranking import counts, unit_of
from fedtune.pruning.structure import BlockLayout, ModelStructure, cuts, from_bitmap, shapes
from fedtune.tensors import DTYPES, Array, Tensors
from fedtune.wire.class_sums import largest_bytes

LARGEST = float(np.finfo(np.float32).max) / 2**16
"""Bound on |b| |a| of a module: its change, and the sum of a cohort's, must fit float32."""

LARGEST_LOSS = 1e12
"""A cohort's mean is taken over the losses that clients state; no honest loss is near this."""

WHOLE = 1e-3
"""How far from 1 the sum of a client's shares of modules may be: what rounding thousands of them to float32 leaves."""

LARGEST_RMS = 1e6
"""Of a client's gradients along its seeds, times the learning rate."""

LARGEST_CURVATURE = 1e12
"""Of a slope or a curvature of a client's loss along a seed; what is within it cannot leave float64 in a sum."""

CODES_BYTES = 8
"""Of the digest of a quantised base's codes, in an update."""

MAX_SKIPPED = 0.1
"""Share of a client's scalars that may be missing because a loss was not finite."""


class _RefusedError(Exception):
    """An update does not answer its assignment."""

    def __init__(self, code: str, expected: str, got: str, hint: str = "", where: str = "") -> None:
        self.failure = Failure("", expected=expected, got=got, hint=hint, where=where, kind="refused", code=code)


def _require(holds: bool, code: str, expected: str, got: object, hint: str = "", where: str = "") -> None:
    """Return if a condition holds; refuse the update if not."""
    if not holds:
        raise _RefusedError(code, expected, str(got), hint, where)


def admit(
    update: ClientUpdate, assignment: Assignment, blueprint: Blueprint, *, num_examples: int
) -> AdmittedUpdate | Failure:
    """Return the update if it answers the assignment, otherwise why not; `num_examples` is what the client enrolled.

    After this, methods need no checks of their own: every key is there and no other, shapes fit the modules, the rank
    is the planned one (or, where the assignment lets it shrink, at least 1), and every number is finite.
    """
    try:
        # First things first: each check may rely on those before it.
        _check_author(update, assignment)
        _check_round(update, assignment, num_examples)
        match assignment.task:
            case ProbeSeeds() as task:
                _check_scalars(update.result, task, assignment.plan.training.steps or 0)
                return AdmittedUpdate(update)
            case DescendSeeds() as task:
                _check_descent(update.result, task, assignment.plan.training.steps or 0)
                return AdmittedUpdate(update)
            case SumClasses():
                _check_sums(update, assignment, head_of(blueprint))
                return AdmittedUpdate(update)
            case TrainLora() as task:
                with np.errstate(over="ignore", invalid="ignore"):  # numbers that are not finite are looked for
                    _check_importance(update, assignment.plan, blueprint)
                    admitted, structure = _check_adapter(update, task, assignment, blueprint)
                ratio = assignment.plan.ratio if structure else 0.0
                return AdmittedUpdate(admitted, structure, ratio, upload=task.upload, view=assignment.plan.view)
    except _RefusedError as why:
        return replace(why.failure, client=assignment.plan.client)


def largest_update(
    task: type[Task],
    *,
    rank: int,
    scalar_bytes: int,
    blueprint: Blueprint,
    pruned: bool = False,
    ranks: Sequence[int] = (),
) -> int:
    """Return the bytes beyond which no honest answer to a task goes: factors in fp32, and a generous header.

    Args:
        task: its kind.
        rank: of the adapter, for `TrainLora`.
        scalar_bytes: of the scalars or numbers of seeds, for the others; see `scalar_bytes_of`.
        blueprint: of the base model.
        pruned: whether the task says how to prune, which asks for scores or a mask.
        ranks: by module, in sorted order of their names, where they are not all `rank`.
    """
    if task is SumClasses:
        head = head_of(blueprint)
        return largest_bytes(head.classes, head.features)
    if task is not TrainLora:
        return scalar_bytes + 1024
    shapes_in_order = [shape for _, shape in sorted(blueprint.modules.items())]
    widths = ranks if len(ranks) == len(shapes_in_order) else [rank] * len(shapes_in_order)
    entries = sum((m + n) * width for (m, n), width in zip(shapes_in_order, widths, strict=True))
    entries += sum(array.size for array in blueprint.saved.values())
    tensors = 2 * len(blueprint.modules) + len(blueprint.saved)
    if pruned and blueprint.anatomy and blueprint.pruning:
        shapes_sent = moment_shapes(blueprint.pruning, blueprint.anatomy) if blueprint.pruning.repair != "none" else {}
        # Two bytes each, counted in entries of four.
        entries += sum(math.prod(shape) for shape in shapes_sent.values()) // 2 + 1
        tensors += len(shapes_sent)
    # A score is two bytes, a mask a bit; both are of the whole base at most.
    groups = sum(b.heads + b.kv_heads + b.channels for b in blueprint.anatomy.blocks) if blueprint.anatomy else 0
    return 4 * entries + 64 * 1024 + 512 * tensors + (3 * groups if pruned else 0)


def scalar_bytes_of(task: Task, training: Training) -> int:
    """Return the most bytes that the scalars or numbers of seeds take in an answer to a task; 0 for other tasks."""
    match task:
        case ProbeSeeds():
            return training.steps or 0
        case DescendSeeds():
            # A client that cannot descend sends scalars instead.
            measured = (task.fallback.steps or 0) if task.fallback else 0
            return max(-(-task.count * task.bits // 8), measured)
        case TrainLora() | SumClasses():
            return 0


def head_of(blueprint: Blueprint) -> Head:
    """Return the output layer of a classifier that is trained in full."""
    assert blueprint.classes  # no client is asked for sums without it
    return find_head({name: array.shape for name, array in blueprint.saved.items()}, blueprint.classes)


def _check_sums(update: ClientUpdate, assignment: Assignment, head: Head) -> None:
    result = update.result
    if not isinstance(result, ClassSums):
        raise _RefusedError("TENSOR_NAMES", "sums of features by class", "another result")
    _check_base(result.base, assignment.base)
    expected, got = impossible(result, head, update.num_examples)
    _require(not expected, "SCALAR_RANGE", expected, got, where="class sums")


def _check_base(own: str, base: str) -> None:
    _require(own == base, "WRONG_BASE", f"base digest {base[:16]!r}", f"{own[:16]!r}", "load the base the run uses")


def _check_author(update: ClientUpdate, assignment: Assignment) -> None:
    client, base = assignment.plan.client, assignment.base
    author = f"one of {update.client[:80]!r}"
    _require(update.client == client, "WRONG_CLIENT", f"an update of client {client!r}", author)
    # The answer to a task of seeds names no base: the digest of its state covers it.
    if isinstance(assignment.task, TrainLora):
        own = update.result.base if isinstance(update.result, LoraResult) else ""
        _check_base(own, base)
    if isinstance(update.result, LoraResult):
        _check_base_format(update.result, assignment.plan.base_dtype)


def _check_base_format(result: LoraResult, planned: str) -> None:
    """Check that an update was trained over the format that its plan names; without one that is the site's choice."""
    stated, codes = result.base_dtype, result.codes
    expected = f"an update over the base in {planned}"
    _require(planned in ("", stated), "WRONG_BASE", expected, stated or "one that is not quantised")
    length = CODES_BYTES if stated else 0
    _require(len(codes) == length, "WRONG_BASE", f"{length} bytes of a digest of its codes", f"{len(codes)}")


def refuse_other_codes(updates: Sequence[AdmittedUpdate]) -> Sequence[Failure]:
    """Return refusals of updates over codes that differ from those of most of the round's clients of one format.

    All machines get the same codes of one base: others are those of another release, of a damaged file, or made up.
    Where no codes are those of most, the first client's by name count.
    """
    results = {update.client: update.update.result for update in updates}
    stated = {name: result for name, result in results.items() if isinstance(result, LoraResult) and result.base_dtype}
    refused = []
    for kind in sorted({result.base_dtype for result in stated.values()}):
        codes = {name: result.codes for name, result in sorted(stated.items()) if result.base_dtype == kind}
        # `most_common` keeps the order of first sight among equals.
        (usual, count), *_ = Counter(codes.values()).most_common(1)
        refused += [
            Failure(
                name,
                expected=f"the {kind} codes {usual.hex()} of {count} of {len(codes)} clients",
                got=own.hex(),
                hint="load the same base by the same release of fedtune",
                kind="refused",
                code="WRONG_BASE",
            )
            for name, own in codes.items()
            if own != usual
        ]
    return refused


def _check_round(update: ClientUpdate, assignment: Assignment, num_examples: int) -> None:
    _require(update.round == assignment.round, "WRONG_ROUND", f"round {assignment.round}", update.round)
    # More than it enrolled would buy a client more weight in the mean.
    honest = 1 <= update.num_examples <= num_examples
    _require(honest, "EXAMPLES_RANGE", f"1 to {num_examples} examples, as enrolled", update.num_examples)
    measured = update.measured
    for name in ("loss_before", "loss_after", "whole_loss_before", "whole_loss_after"):
        loss = getattr(measured, name)
        # A comparison with NaN is false, so NaN is refused too.
        if loss is not None and not abs(loss) <= LARGEST_LOSS:
            raise _RefusedError("LOSS_RANGE", f"a finite {name}, at most {LARGEST_LOSS:g}", f"{loss:g}")


def _check_importance(update: ClientUpdate, plan: Plan, blueprint: Blueprint) -> None:
    """Check that a client scores each module that it trained, by shares of one whole; none where it was not asked."""
    shares = np.array(update.measured.module_importance)
    count = len(plan.rank_of(blueprint.modules)) if plan.importance else 0
    _require(len(shares) == count, "SCORES", f"{count} shares of modules", len(shares))
    if not count:
        return
    sound = bool(np.isfinite(shares).all() and (shares >= 0).all())
    got = f"{int((~np.isfinite(shares)).sum())} that are not finite, the least {float(np.nanmin(shares)):.3g}"
    _require(sound, "SCORES", "finite shares of modules, none below 0", got)
    total = float(shares.sum())
    # Shares, and not sizes: one client's would otherwise count a million times as much as another's.
    _require(abs(total - 1) <= WHOLE, "SCORES", "shares of modules whose sum is 1", f"{total:.6g}")


def _check_scalars(result: LoraResult | SeedResult | ClassSums, task: ProbeSeeds, steps: int) -> None:
    """Check an answer to a `ProbeSeeds` task, apart from what only the method's state can tell."""
    if not isinstance(result, ProbeResult):
        got = "tensors" if isinstance(result, LoraResult) else "numbers of a client that descends"
        raise _RefusedError("SCALARS", "scalars of seeds", got)
    if task.calibrate:
        if result.skipped:
            expected = "finite losses of the base around its own weights"
            raise _RefusedError("NOT_FINITE", expected, f"{result.skipped} that are not")
        if task.curvatures:
            _check_curvatures(result, min(SHARED, task.seeds))
        elif result.rms is None or not 0 <= result.rms <= LARGEST_RMS:
            expected = f"a finite size of the gradient, at most {LARGEST_RMS:g}"
            raise _RefusedError("SCALAR_RANGE", expected, f"{result.rms}")
    # The method reads from them what a client was asked.
    asked = task.curvatures or not (result.slopes or result.curvatures)
    _require(asked, "SCALARS", "no slopes and curvatures", f"{len(result.slopes)} and {len(result.curvatures)}")
    if task.calibrate:
        return
    # A few losses may overflow along steep directions; many mean that training diverges, which a mean would hide.
    if result.skipped > MAX_SKIPPED * steps:
        expected = f"at most {MAX_SKIPPED:.0%} of its losses to be not finite"
        hint = "lower client.learning_rate or method.perturbation"
        raise _RefusedError("NOT_FINITE", expected, f"{result.skipped} of {steps}", hint)
    if len(result.scalars) != steps:
        raise _RefusedError("SCALARS", f"{steps} scalars, one per seed drawn", f"{len(result.scalars)}")
    # -128 fits int8 and is no scalar: clients round to -127 to 127, so that a sign can be turned.
    if (result.scalars < -MAX_SCALAR).any():
        raise _RefusedError("SCALAR_RANGE", f"scalars from -{MAX_SCALAR} to {MAX_SCALAR}", f"{result.scalars.min()}")


def _check_descent(result: LoraResult | SeedResult | ClassSums, task: DescendSeeds, steps: int) -> None:
    """Check an answer to a `DescendSeeds` task, which is one to its fallback where the client could only measure."""
    if isinstance(result, ProbeResult):
        if task.fallback is None:
            raise _RefusedError("SCALARS", "the numbers of a client that descends", "scalars of seeds")
        _check_scalars(result, task.probe, task.fallback.steps or 0)
        return
    if not isinstance(result, DescendResult):
        raise _RefusedError("SCALARS", "numbers of seeds", "tensors")
    _require(result.bits == task.bits, "SCALARS", f"numbers of {task.bits} bits", f"{result.bits}")
    _require(len(result.numbers) == task.count, "SCALARS", f"{task.count} numbers", len(result.numbers))
    # As many as a client may leave out before it fails itself; of few steps a tenth would be none.
    if result.skipped > MAX_SKIPPED_STEPS or result.skipped >= steps:
        expected = f"a finite loss and gradient in all but {MAX_SKIPPED_STEPS} steps, and in one at least"
        raise _RefusedError("NOT_FINITE", expected, f"{result.skipped} of {steps}", "lower descend.learning_rate")
    # What the sums have room for, as the server has reckoned before the round began.
    if not 0 <= result.shift <= task.largest_shift:
        expected = f"numbers times 2^{task.largest_shift} at most"
        raise _RefusedError("SCALAR_RANGE", expected, f"numbers times 2^{result.shift}")
    bound = LARGEST_NUMBER[task.bits]
    # The least that the bits hold has no counterpart above 0: clients round to the bound on both sides.
    largest = int(np.abs(result.numbers.astype(np.int16)).max(initial=0))
    _require(largest <= bound, "SCALAR_RANGE", f"numbers from -{bound} to {bound}", f"one of size {largest}")
    if not is_shortest(result.numbers, result.shift, task.bits):
        expected = f"the smallest shift that keeps the largest number within {bound}"
        raise _RefusedError("SCALAR_RANGE", expected, f"a shift of {result.shift} for numbers up to {largest}")


def _check_curvatures(result: ProbeResult, count: int) -> None:
    """Check the slopes and curvatures that a learning rate is chosen from."""
    for name in ("slopes", "curvatures"):
        numbers = getattr(result, name)
        _require(len(numbers) == count, "SCALARS", f"{count} {name}, one per shared direction", len(numbers))
        # A comparison with NaN is false, so NaN is refused too.
        wrong = [number for number in numbers if not abs(number) <= LARGEST_CURVATURE]
        _require(not wrong, "SCALAR_RANGE", f"finite {name}, at most {LARGEST_CURVATURE:g}", wrong[:1])


def _check_adapter(
    update: ClientUpdate, task: TrainLora, assignment: Assignment, blueprint: Blueprint
) -> tuple[ClientUpdate, ModelStructure | None]:
    """Check an answer to a `TrainLora` task; return it without codes, and the structure in whose coordinates it is."""
    result = update.result
    if not isinstance(result, LoraResult):
        raise _RefusedError("TENSOR_NAMES", "tensors", "scalars of seeds")
    # Names before shapes, shapes before numbers: what is missing or extra cannot be looked up.
    ranks = assignment.plan.rank_of(blueprint.modules)
    keeps = task.personal.keeps if task.personal is not None else keeps_nothing
    factors = {f"{name}.{side}" for name in ranks for side in task.train if not keeps(f"{name}.{side}")}
    coded = {name + SCALES for name in factors} if task.wire_dtype in CODES else set()
    _check_keys("factors", factors | coded, result.tensors)
    _check_keys("modules_to_save", {name for name in blueprint.saved if not keeps(name)}, result.saved)
    stored = task.personal is not None and task.personal.has_state
    stated = "digests of a personal state" if stored else "none of a personal state"
    _require((result.personal is not None) == stored, "TENSOR_NAMES", stated, "another answer")
    modules, structure = blueprint.modules, None
    if task.pruning is not None:
        modules, structure = _check_pruned(result, task.pruning, assignment.plan.ratio, blueprint)
    else:
        whole = not (result.structure_digest or result.mask or result.scores or result.moments)
        _require(whole, "STRUCTURE", "an update of the whole model", "one of a pruned one, or scores")
    modules = {name: shape for name, shape in modules.items() if name in ranks}
    for name, shape in modules.items():
        _check_shapes(result.tensors, name, shape, task, ranks[name])
    # Only now: numbers take four times as much memory as codes.
    wide = from_wire(result.tensors)
    for name in modules:
        _check_factors(wide, name)
    for name, array in sorted(result.saved.items()):
        own = blueprint.saved[name].shape
        _require(array.shape == own, "TENSOR_SHAPE", f"shape {own}", array.shape, where=name)
        _check_format(name, array, ("fp32",))
        _check_finite(name, array)
    widened = wide is not result.tensors
    return replace(update, result=replace(result, tensors=wide)) if widened else update, structure


def _check_pruned(
    result: LoraResult, pruning: Pruning, ratio: float, blueprint: Blueprint
) -> tuple[Mapping[str, tuple[int, int]], ModelStructure | None]:
    """Check structure and scores of a pruned client; return (out, in) of its modules, and the structure."""
    assert blueprint.anatomy is not None  # no client is asked to prune without it
    structure = _check_structure(result, pruning, ratio, blueprint.anatomy)
    _check_scores(result, pruning, structure, blueprint.anatomy)
    _check_moments(result, pruning, blueprint.anatomy)
    modules = blueprint.modules
    return shapes(modules, cuts(structure, blueprint.anatomy)) if structure else modules, structure


def _check_structure(result: LoraResult, pruning: Pruning, ratio: float, anatomy: BlockLayout) -> ModelStructure | None:
    """Check the structure that a client says it trained in, and its vote; return that structure, None: all."""
    policy = pruning.settings.policy
    pruned = bool(pruning.stages) if policy != "local" else ratio > 0
    if pruned != bool(result.structure_digest):
        asked = f"a model pruned by {ratio:g}" if pruned else "the whole model"
        raise _RefusedError("STRUCTURE", f"an update of {asked}", f"one of {'the whole' if pruned else 'a pruned'} one")
    if bool(result.mask) != ((policy == "local" and pruned) or (policy == "vote" and pruning.scores_requested)):
        raise _RefusedError("STRUCTURE", f"{'no ' if result.mask else 'a '}mask with the policy {policy!r}", "")
    mask = _structure(result.mask, anatomy) if result.mask else None
    structure = None
    if pruned:
        structure = mask if policy == "local" else _structure(pruning.stages[-1], anatomy)
    if structure is not None and structure.digest != result.structure_digest:
        expected = f"what was kept to have the digest {structure.digest.hex()[:12]}"
        raise _RefusedError("STRUCTURE", expected, result.structure_digest.hex()[:12])
    if mask is not None:
        # By count and not by content: which units are worth keeping is the client's own finding.
        target = ratio if policy == "local" else max(ratio, pruning.settings.target)
        _check_counts(mask, target, pruning, anatomy)
    return structure


def _structure(bits: bytes, anatomy: BlockLayout) -> ModelStructure:
    try:
        return from_bitmap(bits, anatomy)
    except ShapeError as error:
        why = Failure.from_text("", str(error))
        raise _RefusedError("STRUCTURE", why.expected, why.got, where=why.where) from None


def _check_counts(mask: ModelStructure, ratio: float, pruning: Pruning, anatomy: BlockLayout) -> None:
    """Check that a structure is as large as a ratio says."""
    count = counts(anatomy, pruning.settings, ratio)
    units = tuple(
        len(part.kv) if unit_of(pruning.settings, block) == "kv_group" else len(part.q) // max(1, len(part.kv))
        for part, block in zip(mask.blocks, anatomy.blocks, strict=True)
    )
    if sum(units) != count.total or (count.units is not None and units != count.units):
        got = f"{sum(units)}, {units[:4]} in the first blocks"
        raise _RefusedError("STRUCTURE", f"{count.total} units of attention", got)
    channels = tuple(len(part.ff) for part in mask.blocks)
    if channels != count.channels:
        raise _RefusedError("STRUCTURE", f"{count.channels[:4]} channels in the first blocks", f"{channels[:4]}")


def _check_scores(result: LoraResult, pruning: Pruning, structure: ModelStructure | None, anatomy: BlockLayout) -> None:
    requested = pruning.scores_requested and pruning.settings.policy == "nested"
    if bool(result.scores) != requested:
        expected = "scores" if requested else "no scores"
        raise _RefusedError("SCORES", expected, f"{sorted(result.scores) or 'none'}")
    if not result.scores:
        return
    parts = structure.blocks if structure else [None] * len(anatomy.blocks)
    pairs = list(zip(anatomy.blocks, parts, strict=True))
    sizes = {
        "heads": sum(len(part.q) if part else block.heads for block, part in pairs),
        "channels": sum(len(part.ff) if part else block.channels for block, part in pairs),
    }
    _check_keys("scores", set(sizes), result.scores)
    for name, size in sizes.items():
        array, where = result.scores[name], f"scores of {name}"
        if array.shape != (size,):
            raise _RefusedError("TENSOR_SHAPE", f"shape ({size},), as kept", f"{array.shape}", where=where)
        _check_format(where, array, ("fp16",))
        _check_finite(where, array)
        # Scores are sizes; one below zero would let a client push units out of everybody's ranking.
        if (array < 0).any():
            raise _RefusedError("SCORES", "none below 0", f"{float(array.min()):.3g}", where=where)


def _check_moments(result: LoraResult, pruning: Pruning, anatomy: BlockLayout) -> None:
    if bool(result.moments) != pruning.moments_requested:
        expected = "moments" if pruning.moments_requested else "no moments"
        raise _RefusedError("SCORES", expected, f"{len(result.moments) or 'none'}")
    if not result.moments:
        return
    try:
        check_moments(result.moments, pruning.settings, anatomy)
    except ShapeError as error:
        why = Failure.from_text("", str(error))
        raise _RefusedError("SCORES", why.expected, why.got, where=why.where) from None
    for name, array in result.moments.items():
        _check_format(f"moments, {name}", array, ("fp16",))


def _check_keys(what: str, expected: set[str], tensors: Tensors) -> None:
    missing, extra = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or extra:
        named = f"{missing[0]!r} is missing" if missing else f"{extra[0][:80]!r} was not asked for"
        got = f"{len(tensors)}: {len(missing)} missing, {len(extra)} extra"
        raise _RefusedError("TENSOR_NAMES", f"{len(expected)} {what}", got, named)


def _check_shapes(tensors: Tensors, name: str, shape: tuple[int, int], task: TrainLora, planned: int) -> None:
    """Check what the factors of a module are made of: shapes, number formats, codes and scales."""
    (m, n), sides = shape, [side for side in task.train if f"{name}.{side}" in tensors]
    # Without b, which may stay with a client, a alone says what its rank is.
    b = tensors[f"{name}.b"] if "b" in sides else np.empty((m, planned), np.int8)
    rank = b.shape[1] if b.ndim == 2 else -1
    # Only HetLoRA's term lets a client return fewer ranks than planned; elsewhere numpy would broadcast rank 1.
    shrinks = any(isinstance(term, TailRank) and term.decay < 1 for term in task.terms)
    least = 1 if shrinks else planned
    ranks = f"{planned}" if least == planned else f"{least}..{planned}"
    fits = b.shape == (m, rank) and least <= rank <= planned
    _require(fits, "RANK_RANGE", f"shape ({m}, {ranks})", b.shape, where=f"{name}.b")
    if "a" in sides:
        a = tensors[f"{name}.a"]
        expected = f"shape ({rank}, {n}), b having rank {rank}"
        _require(a.shape == (rank, n), "TENSOR_SHAPE", expected, a.shape, where=f"{name}.a")
    for key in [f"{name}.{side}" for side in sorted(sides, reverse=True)]:
        if task.wire_dtype in CODES:
            _check_format(key, tensors[key], (task.wire_dtype,))
            _check_codes(key, tensors[key], tensors[key + SCALES], LARGEST_CODE[task.wire_dtype])
        else:
            _check_format(key, tensors[key], tuple(DTYPES))


def _check_codes(name: str, codes: Array, scales: Array, largest: int) -> None:
    """Check that codes and scales are such as `number_formats` makes them: of one tensor there is one encoding."""
    where, shape = name + SCALES, scales_shape(name, codes.shape)
    _require(scales.shape == shape, "TENSOR_SHAPE", f"shape {shape}, one scale a group", scales.shape, where=where)
    _check_format(where, scales, ("bf16",))
    _check_finite(where, scales)
    _require(not np.signbit(scales).any(), "TENSOR_DTYPE", "scales of at least 0", "negative ones", where=where)
    least = int(codes.astype(np.int8).min(initial=0))
    _require(least >= -largest, "TENSOR_DTYPE", f"codes from -{largest} to {largest}", least, where=name)


def _check_factors(tensors: Tensors, name: str) -> None:
    """Check the numbers of a module's factors, as many of the two as a client sends."""
    squares = [_check_finite(key, tensors[key]) for key in (f"{name}.b", f"{name}.a") if key in tensors]
    if len(squares) == 2:
        # Each factor may be finite and their product not: then the global change would be infinite for all.
        bound = math.sqrt(squares[0]) * math.sqrt(squares[1])
        expected = f"factors whose product fits float32, norm below {LARGEST:.3g}"
        _require(bound <= LARGEST, "NORM_OVER_CAP", expected, f"up to {bound:.3g}", where=name)


def keeps_nothing(name: str) -> bool:
    """Return that a tensor does not stay with its client."""
    return False


def _check_format(name: str, array: Array, formats: Sequence[str]) -> None:
    known = array.dtype in [FORMATS[format] for format in formats]
    _require(known, "TENSOR_DTYPE", f"numbers of format {' or '.join(formats)}", array.dtype.name, where=name)


def _check_finite(name: str, array: Array) -> float:
    """Check that every number is finite, and return their sum of squares."""
    # One sum instead of a mask of the tensor's size: it is finite where, and only where, every number is.
    square = quick_square(array)
    if not math.isfinite(square):
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        raise _RefusedError("NOT_FINITE", "finite numbers", f"{bad} of {array.size} that are not", where=name)
    return square
