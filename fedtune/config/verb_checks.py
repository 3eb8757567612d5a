"""What a recipe may ask of clients that differ in how they compute an update: those that probe, and that descend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedtune.config.error_text import display, join_words, quote
from fedtune.config.recipe import Recipe, method_type_of, requested_verbs
from fedtune.directions.space import MAX_ACCUMULATORS, MAX_BANKS
from fedtune.errors import Fault
from fedtune.messages import VERBS, ProbeSeeds, Training
from fedtune.methods.fedkseed_state import FedKSeedSettings
from fedtune.planning.verbs import DESCENDING
from fedtune.wire.probe import MAX_STEPS

ALONG_SEEDS = ("probe", "descend", "auto")
"""What clients of `fedkseed` may do, all in one round."""


def override_verb_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield where a recipe asks some clients for what does not sum up with the method's updates."""
    # FedKSeed's weights are w0 plus a sum of integers, rounded once. A product of LoRA factors on top would round a
    # second time, and differ between machines.
    method = method_type_of(recipe)
    able = ALONG_SEEDS if method.task is ProbeSeeds and hasattr(recipe.method, "verb") else (VERBS[method.task],)
    for place, override in enumerate(recipe.override):
        if override.verb not in (None, *able):
            expected = f"{join_words(map(quote, able), joint='or')}, as all clients of {method.name!r}"
            hint = "a round sums updates of one kind; start a run for each method"
            yield Fault(f"override.{place}.verb", expected, display(override.verb), hint)


def descend_table_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield what a recipe says of descending where no client descends, and too many steps of it."""
    if not requested_verbs(recipe) & {*DESCENDING}:
        hint = "set method.verb, or verb in an [[override]], to 'descend' or 'auto' with method = 'fedkseed'"
        said = {"descend": recipe.descend is not None}
        said |= {f"override.{place}.descend": bool(row.descend) for place, row in enumerate(recipe.override)}
        for path in (path for path, there in said.items() if there):
            yield Fault(path, "no table where no client descends", "one", hint)
        return
    rows = [("descend", recipe.descend.steps)] if recipe.descend is not None else []
    for place, override in enumerate(recipe.override):
        rows += [(f"override.{place}.descend", override.descend.get("steps", 1))] if override.descend else []
    for path, steps in rows:
        if steps > MAX_STEPS:
            yield Fault(f"{path}.steps", f"at most {MAX_STEPS} steps a round", str(steps))


def probing_key_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield how the method lets clients probe, where no client does."""
    if requested_verbs(recipe) != {"descend"} or not isinstance(recipe.method, FedKSeedSettings):
        return
    usual = FedKSeedSettings()
    for key in ("estimator", "queries", "normalise", "clip", "largest_rate"):
        if (value := getattr(recipe.method, key)) != (default := getattr(usual, key)):
            expected = f"{display(default)} where every client descends, and none probes"
            yield Fault(f"method.{key}", expected, display(value), "leave it out")


def client_steps_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield what a recipe says of probing where no client probes."""
    if requested_verbs(recipe) != {"descend"}:
        return
    client = recipe.client
    usual = {"learning_rate": client.learning_rate} if client.learning_rate != Training.learning_rate else {}
    rows: list[tuple[str, Mapping[str, Any]]] = [
        ("client", {"steps": client.steps, "epochs": client.epochs, **usual}),
        *((f"override.{place}", override.training) for place, override in enumerate(recipe.override)),
    ]
    for path, values in rows:
        for key in ("steps", "epochs", "learning_rate"):
            if (value := values.get(key)) is not None:
                got, instead = display(value), "steps" if key == "epochs" else key
                table = "descend" if path == "client" else f"{path}.descend"
                expected = "nothing where every client descends, and none probes"
                yield Fault(f"{path}.{key}", expected, got, f"write {table}.{instead}")


def scalar_bits_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield the bits of numbers that no client sends."""
    bits = getattr(recipe.method, "scalar_bits", 8)
    if bits != 8 and not requested_verbs(recipe) & {*DESCENDING}:
        hint = "a probing client's scalars are always bytes; leave it out, or set method.verb = 'descend'"
        yield Fault("method.scalar_bits", "8 where no client descends", str(bits), hint)


def accumulator_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield more banks or numbers than a run can hold by its last round."""
    settings = recipe.method
    redraw, groups, count = getattr(settings, "redraw", 0), getattr(settings, "groups", 1), recipe.rounds.count
    banks = 1 + (count // redraw if redraw else 0)
    if banks > MAX_BANKS:
        hint = f"at least {-(-count // (MAX_BANKS - 1))}, or fewer rounds"
        yield Fault("method.redraw", f"at most {MAX_BANKS} banks in {count} rounds", f"{banks}", hint)
        return
    # How many tensors there are only the base says.
    numbers = banks * getattr(settings, "seeds", 1) * (groups if isinstance(groups, int) else 1)
    if numbers > MAX_ACCUMULATORS:
        expected = f"at most {MAX_ACCUMULATORS} numbers: method.seeds x method.groups x {banks} banks"
        yield Fault("method.groups", expected, f"{numbers}", "take fewer seeds or groups, or redraw less often")
