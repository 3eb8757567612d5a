"""What a recipe may ask where virtual tokens train: what needs factors in the base's layers is refused."""

from __future__ import annotations

from collections.abc import Iterator

from fedtune.config.error_text import display
from fedtune.config.recipe import Recipe, method_type_of
from fedtune.errors import Fault
from fedtune.messages import Training
from fedtune.model.emulator_facts import ENDS
from fedtune.model.settings import AdapterSettings, layer_numbers

USUAL = AdapterSettings()
OF_LAYERS = ("targets", "layers", "alpha", "rslora", "modules_to_save")
"""Keys of `adapter` that say what of the base's layers trains, and how."""
OF_TOKENS = ("tokens", "hidden", "send", "init_text")
"""Keys of `adapter` that say what virtual tokens are."""
METHOD = "fedit"
"""The method that averages virtual tokens."""


def adapter_kind_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield what a recipe asks of an adapter that its kind does not have."""
    adapter, kind = recipe.adapter, recipe.adapter.kind
    read = {
        "tokens": kind != "lora",
        "hidden": kind == "p-tuning",
        "send": kind == "p-tuning",
        "init_text": kind == "prompt",
    }
    for key in OF_TOKENS:
        if not read[key] and getattr(adapter, key) != getattr(USUAL, key):
            hint = "leave it out, or choose another adapter.kind"
            yield Fault(f"adapter.{key}", f"nothing with adapter.kind = {display(kind)}", got(adapter, key), hint)
    if kind == "lora":
        return
    for key in OF_LAYERS:
        if getattr(adapter, key) != getattr(USUAL, key):
            expected = f"nothing with adapter.kind = {display(kind)}, whose virtual tokens belong to no layer"
            yield Fault(f"adapter.{key}", expected, got(adapter, key), "leave it out")
    if (method := method_type_of(recipe)).name != METHOD:
        expected = f"{METHOD!r} with adapter.kind = {display(kind)}: virtual tokens have one mean and no rank"
        got_method = f"{method.name!r}, whose rule is for factors or seeds"
        yield Fault("method", expected, got_method, f"set method.name = {METHOD!r}")
    if recipe.model.task != "causal":
        expected = f"'causal' with adapter.kind = {display(kind)}"
        hint = "a classifier reads its first or last place: set adapter.kind = 'lora'"
        yield Fault("model.task", expected, display(recipe.model.task), hint)
    if recipe.fleet is not None and recipe.fleet.proxy != "none":
        expected = f"'none' with adapter.kind = {display(kind)}: other bases stand in with factors"
        yield Fault("fleet.proxy", expected, display(recipe.fleet.proxy), "leave it out")
    yield from arm_faults(recipe)
    yield from training_faults(recipe)


def layers_faults(layers: str | None) -> Iterator[Fault]:
    """Yield that a text names no layers (blocks), in a recipe's or a site's table `adapter`."""
    if layers is not None and layers != ENDS and layer_numbers(layers) is None:
        expected = f"numbers of layers and ranges of them, the smaller one first, or {ENDS} of an emulator"
        yield Fault("adapter.layers", expected, display(layers), 'write, say, "8-15" or "0-3, 28"')


def arm_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield a part of the layers, or of the backward pass, that clients are asked to leave out."""
    asked = [("planner.back", getattr(recipe.planner, "back", 0.0))]
    asked += [(f"override.{place}.back", override.back) for place, override in enumerate(recipe.override)]
    for path, back in asked:
        if back:
            expected = "0 with virtual tokens, whose gradient comes through every layer"
            yield Fault(path, expected, f"{back:g}", "leave it out")


def training_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield how clients are asked to train, in the recipe or an override, that virtual tokens do not bear."""
    rows = [("client", {key: getattr(recipe.client, key) for key in REASONS})]
    rows += [(f"override.{place}", dict(override.training)) for place, override in enumerate(recipe.override)]
    usual = Training()
    for path, training in rows:
        for key, why in REASONS.items():
            if key == "gradient_checkpointing" and recipe.adapter.kind != "prefix":
                continue
            if (value := training.get(key, getattr(usual, key))) != getattr(usual, key):
                expected = f"{display(getattr(usual, key))} with adapter.kind = {display(recipe.adapter.kind)}, {why}"
                yield Fault(f"{path}.{key}", expected, display(value), "leave it out")


REASONS = {
    "gradient_checkpointing": "whose keys and values a layer that is computed again would find twice or not at all",
    "packing": "since texts that share a row would share their virtual tokens",
    "dropout": "since there is no input of a factor to leave out",
}


def got(adapter: AdapterSettings, key: str) -> str:
    value = getattr(adapter, key)
    return display(list(value)) if isinstance(value, tuple | list) else display(value)
