"""What a run would ask of a site, as a table on a terminal, before the site has done anything for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fedtune.terminal.text import printable

if TYPE_CHECKING:
    from fedtune.deployment.join import DryRun


SCORES = {"send": "means are sent", "keep": "they stay in its own log", "refuse": "it does not score"}
"""What `policy.scores` means, in words."""
SCALARS = "signed bytes of scalars, a few hundred per round"


def show(write: Callable[[str], None], shown: DryRun) -> None:
    """Write line by line what the run asks, its recipe, and what the site's policy decides."""
    for name, text in facts(shown):
        write(f"{name:12} {printable(text)}")
    write("")
    write(printable(shown.recipe.strip(), lines=True))
    write("")
    for remark in shown.remarks:
        write(f"! {printable(remark)}")
    for refusal in shown.refusals:
        write(f"x {printable(refusal.note)}")
    write("allowed by this site's policy" if shown.allowed else "this site would decline")


def facts(shown: DryRun) -> Iterator[tuple[str, str]]:
    demand = shown.demand
    yield "server", shown.server
    yield "run", f"{shown.run}, recipe {shown.recipe_digest}"
    yield "method", demand.method
    yield (
        "rounds",
        f"{shown.rounds}, "
        + (
            f"{demand.cohort} clients each"
            if demand.cohort is not None
            else f"at least {shown.least_cohort} clients each"
        ),
    )
    yield "of this site", "what follows may be asked, and any other order is vetoed"
    for name, text in shown.permitted.items():
        yield f"  {name}", text
    yield "its data", ", ".join(f"{part} from {column}" for part, column in sorted(shown.columns.items())) or "by name"
    seeds = "signed numbers along seeds, as stated" if "bytes" in shown.permitted else SCALARS
    yield "leaves it", seeds if demand.rank is None else "LoRA factors of the named layers"
    yield "scores", f"of the global model on its held-out rows: {SCORES[shown.scores]}"
    losses = "losses, " * (shown.scores == "send")
    yield "and", f"number of examples, {losses}seconds, tokens and peak memory; its name and signature"
