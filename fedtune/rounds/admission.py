"""What the server takes from a client: an update that fits its assignment in every respect; others are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from fedtune.directions.downlink import MAX_SCALAR
from fedtune.errors import ShapeError
from fedtune.lora.adapter import norm, unpack
from fedtune.messages import Assignment, Blueprint, ClientUpdate, Failure, ProbeResult, Pruning
from fedtune.pruning.ranking import counts, unit_of
from fedtune.pruning.structure import BlockLayout, ModelStructure, cuts, from_bitmap, shapes
from fedtune.tensors import DTYPES, Array, Tensors, l2_norm, squared_norm

LARGEST = float(np.finfo(np.float32).max) / 2**16
"""Bound on |b| |a| of a module: its change, and the sum of a cohort's, must fit float32."""

LARGEST_LOSS = 1e12
"""A cohort's mean is taken over what clients say their losses were; nothing honest comes near this."""


LARGEST_RMS = 1e6
"""Of a client's gradients along its seeds, times the learning rate."""

MAX_SKIPPED = 0.1
"""Share of a client's scalars that may be missing because a loss was not finite."""


def admit(
    update: ClientUpdate, assignment: Assignment, blueprint: Blueprint, *, num_examples: int
) -> ClientUpdate | Failure:
    """Return the update if it answers the assignment, otherwise why not; `num_examples` is what the client enrolled.

    After this, methods need no checks of their own: every key is there and no other, shapes fit the modules, the rank
    is the planned one (or, where the assignment lets it shrink, at least 1), and every number is finite.
    """
    found = next(_reasons(update, assignment, blueprint, num_examples), None)
    if found is not None:
        code, reason = found
        return Failure(client=assignment.plan.client, reason=reason, kind="refused", code=code)
    if assignment.surgery is None:
        return update
    keep = kept_by(update, assignment.surgery, blueprint)
    return replace(update, keep=keep, ratio=assignment.plan.ratio if keep else 0.0)


def kept_by(update: ClientUpdate, surgery: Pruning, blueprint: Blueprint) -> ModelStructure | None:
    """Return the structure in whose coordinates an update is; None: the whole base.

    Raises:
        ShapeError: if the client's own structure is none of this base, or not the one that it states the digest of.
    """
    if not update.kept:
        return None
    assert blueprint.anatomy is not None  # no client is asked for surgery without it
    bits = update.mask if surgery.settings.policy == "local" else surgery.stages[-1] if surgery.stages else b""
    keep = from_bitmap(bits, blueprint.anatomy)
    if keep.digest != update.kept:
        raise ShapeError(
            f"expected what was kept to have the digest {keep.digest.hex()[:12]}; got {update.kept.hex()[:12]}"
        )
    return keep


def largest_update(assignment: Assignment, blueprint: Blueprint) -> int:
    """Return the bytes beyond which no honest answer to an assignment goes: factors in fp32, and a generous header."""
    if assignment.verb == "probe":
        return (assignment.plan.training.steps or 0) + 1024
    entries = sum(m + n for m, n in blueprint.modules.values()) * assignment.plan.rank
    entries += sum(array.size for array in blueprint.saved.values())
    tensors = 2 * len(blueprint.modules) + len(blueprint.saved)
    # A score is two bytes, a mask a bit; both are of the whole base at most.
    groups = sum(b.heads + b.kv_heads + b.channels for b in blueprint.anatomy.blocks) if blueprint.anatomy else 0
    return 4 * entries + 64 * 1024 + 512 * tensors + (3 * groups if assignment.surgery else 0)


def admit_norms(
    updates: Sequence[ClientUpdate], max_norm: float | None, *, assignments: Mapping[str, Assignment]
) -> tuple[Mapping[str, float], Sequence[Failure]]:
    """Return the norms of the admitted changes by client, and who is refused for one far above the others.

    Far above is more than max_norm times the cohort's median; none admits any norm. Two updates have no outlier that
    could be told from the other, and zero no multiple: then all are admitted. Assignments are by client.
    """
    norms = {update.client: change_norm(update, assignments[update.client]) for update in updates}
    middle = median(norms.values()) if norms else 0.0
    if max_norm is None or len(updates) < 3 or middle == 0:
        return norms, ()
    limit = max_norm * middle
    expected = f"expected a change of norm at most {limit:.4g}, {max_norm:g} times the cohort's median"
    refused = [
        Failure(client=name, reason=f"{expected}; got {size:.4g}", kind="refused", code="NORM_OVER_CAP")
        for name, size in sorted(norms.items())
        if size > limit
    ]
    return {name: size for name, size in norms.items() if size <= limit}, refused


def change_norm(update: ClientUpdate, assignment: Assignment) -> float:
    """Return the Frobenius norm of b @ a over all modules; of the tensors themselves where they are no such pair.

    Differences of factors, or b alone, do not multiply to the client's change; their own size stands for it, as that
    of its scalars does for a probe's.
    """
    if update.probed is not None:
        return float(np.linalg.norm(update.probed.scalars.astype(np.float64)))
    if assignment.local.upload == "difference" or assignment.local.train == "b":
        return l2_norm(update.tensors)
    return norm(unpack(update.tensors))


def _reasons(
    update: ClientUpdate, assignment: Assignment, blueprint: Blueprint, num_examples: int
) -> Iterator[tuple[str, str]]:
    """Yield what is wrong, first things first: each check may rely on those above it."""
    if update.client != assignment.plan.client:
        yield (
            "WRONG_CLIENT",
            f"expected an update of client {assignment.plan.client!r}; got one of {update.client[:80]!r}",
        )
    if update.base != assignment.base and assignment.verb == "adapt":  # a probe answers with the digest of its state
        yield (
            "WRONG_BASE",
            f"expected base digest {assignment.base[:16]!r}; got {update.base[:16]!r}; load the base the run uses",
        )
    if update.round != assignment.round:
        yield "WRONG_ROUND", f"expected round {assignment.round}; got {update.round}"
    if not 1 <= update.num_examples <= num_examples:
        yield "EXAMPLES_RANGE", f"expected 1 to {num_examples} examples, as enrolled; got {update.num_examples}"
    measured = update.measured
    for what, loss in (("loss_before", measured.loss_before), ("loss_after", measured.loss_after)):
        if loss is not None and not abs(loss) <= LARGEST_LOSS:
            yield "LOSS_RANGE", f"expected a finite {what}, at most {LARGEST_LOSS:g}; got {loss:g}"
    if assignment.probe is not None:
        yield from _probed(update.probed, assignment)
        return
    expected = {f"{name}.{side}" for name in blueprint.modules for side in assignment.local.train}
    yield from _keys("factors", expected, update.tensors)
    yield from _keys("modules_to_save", set(blueprint.saved), update.saved)
    modules = blueprint.modules
    if assignment.surgery is None:
        if update.kept or update.mask or update.scores:
            yield "STRUCTURE", "expected an update of the whole model; got one of a pruned one, or scores"
    else:
        assert blueprint.anatomy is not None  # no client is asked for surgery without it
        yield from _structure(update, assignment, assignment.surgery, blueprint, blueprint.anatomy)
        keep = kept_by(update, assignment.surgery, blueprint)
        modules = shapes(modules, cuts(keep, blueprint.anatomy)) if keep else modules
        yield from _scores(update, assignment.surgery, keep, blueprint.anatomy)
    for name, shape in modules.items():
        yield from _factors(update.tensors, name, shape, assignment)
    for name, array in sorted(update.saved.items()):
        if array.shape != blueprint.saved[name].shape:
            yield "TENSOR_SHAPE", f"{name}: expected shape {blueprint.saved[name].shape}; got {array.shape}"
        yield from _numbers(name, array, ("fp32",))


def _probed(probed: ProbeResult | None, assignment: Assignment) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with an answer to a probe, apart from what only the method's state can tell."""
    steps, probe = assignment.plan.training.steps or 0, assignment.probe
    if probed is None or probe is None:
        yield "SCALARS", "expected scalars of seeds; got tensors"
        return
    if probe.calibrate:
        if probed.skipped:
            yield (
                "NOT_FINITE",
                f"expected finite losses of the base around its own weights; got {probed.skipped} that are not",
            )
        if probed.rms is None or not 0 <= probed.rms <= LARGEST_RMS:
            yield "SCALAR_RANGE", f"expected a finite size of the gradient, at most {LARGEST_RMS:g}; got {probed.rms}"
        return
    if probed.skipped > MAX_SKIPPED * steps:
        yield (
            "NOT_FINITE",
            f"expected at most {MAX_SKIPPED:.0%} of its losses to be not finite; got {probed.skipped} of {steps}; "
            "lower client.learning_rate or method.perturbation",
        )
    if len(probed.scalars) != steps:
        yield "SCALARS", f"expected {steps} scalars, one per seed drawn; got {len(probed.scalars)}"
    if (probed.scalars < -MAX_SCALAR).any():
        yield "SCALAR_RANGE", f"expected scalars from -{MAX_SCALAR} to {MAX_SCALAR}; got {probed.scalars.min()}"


def _structure(
    update: ClientUpdate, assignment: Assignment, surgery: Pruning, blueprint: Blueprint, anatomy: BlockLayout
) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the structure that a client says it trained in, or with its vote."""
    ratio, policy = assignment.plan.ratio, surgery.settings.policy
    pruned = bool(surgery.stages) if policy != "local" else ratio > 0
    if pruned != bool(update.kept):
        asked = f"a model pruned by {ratio:g}" if pruned else "the whole model"
        yield "STRUCTURE", f"expected an update of {asked}; got one of {'the whole' if pruned else 'a pruned'} one"
    if bool(update.mask) != ((policy == "local" and pruned) or (policy == "vote" and surgery.wanted)):
        yield "STRUCTURE", f"expected {'no ' if update.mask else 'a '}mask with the policy {policy!r}"
    try:
        keep = kept_by(update, surgery, blueprint)
        mask = from_bitmap(update.mask, anatomy) if update.mask else keep
    except ShapeError as error:
        yield "STRUCTURE", str(error)
        return
    if mask is None or not update.mask:
        return
    count = counts(anatomy, surgery.settings, ratio if policy == "local" else max(ratio, surgery.settings.target))
    units = tuple(
        len(kept.kv) if unit_of(surgery.settings, block) == "kv_group" else len(kept.q) // max(1, len(kept.kv))
        for kept, block in zip(mask.blocks, anatomy.blocks, strict=True)
    )
    if sum(units) != count.total or (count.units is not None and units != count.units):
        yield (
            "STRUCTURE",
            f"expected {count.total} units of attention; got {sum(units)}, {units[:4]} in the first blocks",
        )
    channels = tuple(len(kept.ff) for kept in mask.blocks)
    if channels != count.channels:
        yield "STRUCTURE", f"expected {count.channels[:4]} channels in the first blocks; got {channels[:4]}"


def _scores(
    update: ClientUpdate, surgery: Pruning, keep: ModelStructure | None, anatomy: BlockLayout
) -> Iterator[tuple[str, str]]:
    wanted = surgery.wanted and surgery.settings.policy == "nested"
    if bool(update.scores) != wanted:
        yield "SCORES", f"expected {'scores' if wanted else 'no scores'}; got {sorted(update.scores) or 'none'}"
    if not update.scores:
        return
    kept = keep.blocks if keep else [None] * len(anatomy.blocks)
    pairs = list(zip(anatomy.blocks, kept, strict=True))
    sizes = {
        "heads": sum(len(one.q) if one else block.heads for block, one in pairs),
        "channels": sum(len(one.ff) if one else block.channels for block, one in pairs),
    }
    yield from _keys("scores", set(sizes), update.scores)
    for name, size in sizes.items():
        array = update.scores[name]
        if array.shape != (size,):
            yield "TENSOR_SHAPE", f"scores of {name}: expected shape ({size},), as kept; got {array.shape}"
        yield from _numbers(f"scores of {name}", array, ("fp16",))
        if (array < 0).any():
            yield "SCORES", f"scores of {name}: expected none below 0; got {float(array.min()):.3g}"


def _keys(what: str, expected: set[str], tensors: Tensors) -> Iterator[tuple[str, str]]:
    missing, extra = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or extra:
        named = f"{missing[0]!r} is missing" if missing else f"{extra[0][:80]!r} was not asked for"
        counts = f"{len(missing)} missing, {len(extra)} extra"
        yield "TENSOR_NAMES", f"expected {len(expected)} {what}; got {len(tensors)}: {counts}; {named}"


def _factors(tensors: Tensors, name: str, shape: tuple[int, int], assignment: Assignment) -> Iterator[tuple[str, str]]:
    (m, n), planned = shape, assignment.plan.rank
    b = tensors[f"{name}.b"]
    rank = b.shape[1] if b.ndim == 2 else -1
    least = 1 if assignment.local.rank_decay < 1 else planned
    if b.shape != (m, rank) or not least <= rank <= planned:
        ranks = f"{planned}" if least == planned else f"{least}..{planned}"
        yield "RANK_RANGE", f"{name}.b: expected shape ({m}, {ranks}); got {b.shape}"
    yield from _numbers(f"{name}.b", b, tuple(DTYPES))
    if assignment.local.train == "b":
        return
    a = tensors[f"{name}.a"]
    if a.shape != (rank, n):
        yield "TENSOR_SHAPE", f"{name}.a: expected shape ({rank}, {n}), b having rank {rank}; got {a.shape}"
    yield from _numbers(f"{name}.a", a, tuple(DTYPES))
    bound = float(np.sqrt(squared_norm(a) * squared_norm(b)))
    if bound > LARGEST:
        yield (
            "NORM_OVER_CAP",
            f"{name}: expected factors whose product fits float32, norm below {LARGEST:.3g}; got up to {bound:.3g}",
        )


def _numbers(name: str, array: Array, formats: Sequence[str]) -> Iterator[tuple[str, str]]:
    if array.dtype not in [DTYPES[format] for format in formats]:
        yield "TENSOR_DTYPE", f"{name}: expected numbers of format {' or '.join(formats)}; got {array.dtype.name}"
    if not np.isfinite(squared_norm(array)):
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        yield "NOT_FINITE", f"{name}: expected finite numbers; got {bad} of {array.size} that are not"
