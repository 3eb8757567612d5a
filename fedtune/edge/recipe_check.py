"""What of a recipe a device cannot do, said before it takes part in the run."""

from __future__ import annotations

from fedtune.config.recipe import Recipe, method_of, requested_verb
from fedtune.edge.bundle import BANK
from fedtune.errors import ConfigError, Fault
from fedtune.messages import ProbeSeeds
from fedtune.methods.fedkseed_state import FedKSeedSettings

FULL = "take part with fedtune-client, which has torch"


def check_recipe(recipe: Recipe, client: str = "") -> None:
    """Check that a device can do what a recipe asks of its clients, or of the client of this name.

    Raises:
        ConfigError: naming every setting that it cannot follow.
    """
    faults = list[Fault]()
    if recipe.model.task != "causal":
        faults.append(Fault("model.task", "'causal' for a device", repr(recipe.model.task), FULL))
    if method_of(recipe).task is not ProbeSeeds or not isinstance(recipe.method, FedKSeedSettings):
        expected = "'fedkseed', whose clients need forward passes alone"
        got = f"{recipe.method.name!r}, which trains LoRA factors"
        faults.append(Fault("method.name", expected, got, f'{FULL}, or ask for method = "fedkseed"'))
    else:
        faults += probe_faults(recipe.method)
        if requested_verb(recipe, client) == "descend":
            hint = f"{FULL}, or ask for method.verb = 'auto'"
            expected = "'probe' or 'auto' for a device, which has forward passes alone"
            faults.append(Fault("method.verb", expected, "'descend'", hint))
    if faults:
        raise ConfigError(faults, source="the server's recipe")


def probe_faults(method: FedKSeedSettings) -> list[Fault]:
    """Return what of the method's settings a bundle has no graph for."""
    faults = list[Fault]()
    if method.bank != BANK:
        hint = f"{FULL}, or ask for method.bank = {BANK!r}"
        faults.append(Fault("method.bank", f"{BANK!r} for a device", repr(method.bank), hint))
    faults += [
        Fault(f"method.{name}", "false for a device, which moves linear layers alone", "true", FULL)
        for name in ("vectors", "embeddings")
        if getattr(method, name)
    ]
    for name, usual in (("groups", 1), ("redraw", 0)):
        if (value := getattr(method, name)) != usual:
            faults.append(Fault(f"method.{name}", f"{usual} for a device", repr(value), FULL))
    return faults
