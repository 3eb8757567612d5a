"""A recipe as it would run on this machine: its data and base loaded, every default written out, nothing trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedtune.config import bind, render
from fedtune.config.pinning import pin_digest
from fedtune.rounds.schedule import rate_text
from fedtune.runs.start import saturation_notes
from fedtune.store.files import write_text


@dataclass(frozen=True)
class Planned:
    """A recipe as it would run on this machine, before anything is trained."""

    recipe: str
    """As bound, in TOML, with the base's digest."""
    notes: Sequence[str]
    """Remarks of the preparation, and what each client holds."""


def plan(recipe: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = (), pin: bool = False) -> Planned:
    """Load a recipe's data and base, train nothing, and return the recipe as it would run.

    Args:
        recipe: path, text or tables.
        overrides: `table.key=value`, as for `simulate`.
        pin: write the base's digest into the file `recipe`.

    Raises:
        ConfigError: with what is wrong with recipe, data or base.
    """
    bound = bind(recipe, overrides=overrides)
    if pin:  # the digest that the file has may be the one to be replaced
        bound = replace(bound, model=replace(bound.model, digest=None))
    from fedtune.runs.local import prepare

    experiment = prepare(bound)
    digest = experiment.base.digest
    whole = replace(experiment.recipe, model=replace(experiment.recipe.model, digest=digest))
    counts = ", ".join(f"{name} {count:,}" for name, count in list(experiment.fleet.items())[:8])
    more = ", ..." * (len(experiment.fleet) > 8)
    notes = [*experiment.federation.notes, *experiment.base.notes, f"training examples: {counts}{more}"]
    if (rounds := whole.rounds).schedule != "constant" or rounds.warmup:
        notes.append(f"learning rate: {rate_text(whole.client.learning_rate, rounds)}")
    notes += saturation_notes(whole, experiment.blueprint, list(experiment.fleet))
    if pin:
        path = Path(str(recipe))
        write_text(path, pin_digest(path.read_text(encoding="utf-8"), digest, label=path.name))
        notes.append(f"wrote model.digest into {path}")
    return Planned(render(whole), notes)
