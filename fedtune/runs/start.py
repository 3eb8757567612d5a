"""The state that a run starts from: the method's own, or one whose global model is an adapter that is there already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

from fedtune.config import Recipe
from fedtune.config.recipe import method_of, planned_training
from fedtune.devices.cost import BYTES
from fedtune.errors import ConfigError, Fault, ShapeError
from fedtune.lora.adapter import pack
from fedtune.lora.virtual_tokens import are_virtual
from fedtune.messages import Blueprint
from fedtune.methods.class_head import head_round
from fedtune.methods.flora import FloraSettings, is_bounded
from fedtune.methods.method import Method
from fedtune.methods.saturation import forecast
from fedtune.methods.settings import down_dtype
from fedtune.planning.arms import AdaptiveSettings
from fedtune.rounds.schedule import cohort_size
from fedtune.runs.context import first_state
from fedtune.store.peft_import import ForeignAdapter, read_adapter
from fedtune.tensors import Tensors, count_not_finite


def start_state(recipe: Recipe, blueprint: Blueprint) -> Any:
    """Return the state before round 1.

    Raises:
        ConfigError: if the adapter that the recipe starts from cannot be read, or does not fit base, targets or method.
    """
    state, start = first_state(recipe, blueprint), start_adapter(recipe)
    if start is None:
        return state
    check_fit(start, blueprint)
    method = method_of(recipe)
    assert method.start is not None  # checked when the recipe is bound
    return method.start(state, start.adapter, start.saved)


def first_round(recipe: Recipe, blueprint: Blueprint, labels: Sequence[str]) -> Method[Any] | None:
    """Return the method of a first round that only makes a classifier's head; None where all rounds train.

    Raises:
        ConfigError: if the base has no head such as is made.
    """
    if recipe.adapter.head != "lda":
        return None
    try:
        return head_round(method_of(recipe), blueprint, labels)
    except ShapeError as error:
        key, _, text = str(error).partition(": expected ")
        expected, _, got = text.partition("; got ")
        raise ConfigError(Fault(key, expected, got)) from error


def start_adapter(recipe: Recipe) -> ForeignAdapter | None:
    """Return the adapter that a recipe starts from; None if it starts from the base."""
    return None if recipe.adapter.start is None else read_adapter(recipe.root / recipe.adapter.start)


def check_fit(start: ForeignAdapter, blueprint: Blueprint) -> None:
    """Refuse an adapter of layers that the run does not train, or that have other sizes in its base."""
    if are_virtual(start.saved) or are_virtual(blueprint.saved):
        check_virtual(start, blueprint)
    faults = []
    for name, factors in start.adapter.items():
        if name not in blueprint.modules:
            hint = "add its layers to adapter.targets"
            faults.append(Fault("adapter.start", "layers that adapter.targets names", f"{name} in {start.path}", hint))
        elif factors.shape != blueprint.modules[name]:
            expected = f"(out, in) {blueprint.modules[name]} for {name}, as in the base"
            faults.append(Fault("adapter.start", expected, f"{factors.shape} in {start.path}", "take its own base"))
    for name, array in {**pack(start.adapter), **start.saved}.items():
        if count := count_not_finite(array):
            faults.append(Fault("adapter.start", f"finite numbers in {name}", f"{count} that are not in {start.path}"))
    for name, array in start.saved.items():
        if name not in blueprint.saved:
            hint = "name it there as well"
            faults.append(Fault("adapter.start", "tensors of adapter.modules_to_save", f"{name} in {start.path}", hint))
        elif array.shape != blueprint.saved[name].shape:
            expected = f"{blueprint.saved[name].shape} for {name}, as in the base"
            faults.append(Fault("adapter.start", expected, f"{array.shape} in {start.path}"))
    if faults:
        raise ConfigError(faults[:3])  # one layer that does not fit seldom stays alone


def check_virtual(start: ForeignAdapter, blueprint: Blueprint) -> None:
    """Refuse virtual tokens where others train: of another kind, or of P-tuning without the encoder that trains."""
    came, trained = ((outline(saved) if are_virtual(saved) else "factors") for saved in (start.saved, blueprint.saved))
    if came != trained:
        hint = "set adapter.kind, tokens and send to those of the run that wrote it"
        expected = f"an adapter of what the recipe trains: {trained}"
        raise ConfigError(Fault("adapter.start", expected, f"{came} in {start.path}", hint))


def outline(saved: Tensors) -> str:
    """Return the names and shapes of virtual tokens in words."""
    shapes = [f"{name} {tuple(array.shape)}" for name, array in sorted(saved.items())]
    return ", ".join(shapes) if len(shapes) < 8 else f"{', '.join(shapes[:2])} and {len(shapes) - 2} more"


def check_start_base(start: ForeignAdapter | None, digest: str) -> None:
    """Refuse an adapter of fedtune's that was trained over other weights than those that are loaded."""
    if start is not None and start.base_digest and start.base_digest != digest:
        expected = f"an adapter of the base that is loaded (digest {digest[:12]})"
        got = f"{start.path}, of another (digest {start.base_digest[:12]})"
        raise ConfigError(Fault("adapter.start", expected, got, "load the same model in the same revision and dtype"))


def saturation_notes(recipe: Recipe, blueprint: Blueprint, clients: Sequence[str]) -> Iterator[str]:
    """Yield what an exact state of flora grows to in this run; nothing of other methods and of bounded states."""
    settings = recipe.method
    if not isinstance(settings, FloraSettings) or is_bounded(settings) or not clients:
        return
    ranks = [min(planned_training(recipe, client)[0], blueprint.max_rank) for client in clients]
    if isinstance(recipe.planner, AdaptiveSettings):
        ranks = [blueprint.max_rank] * len(clients)
    taking_part = cohort_size(len(clients), recipe.rounds.cohort)
    yield from forecast(
        blueprint.modules,
        grows_by=ceil(sum(ranks) * taking_part / len(clients)),
        largest=blueprint.max_rank,
        rounds=recipe.rounds.count,
        number_bytes=BYTES[down_dtype(settings)],
    )
