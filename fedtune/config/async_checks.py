"""What the table `asynchronous` of a recipe needs of its other tables, and excludes."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from fedtune.config.error_text import quote
from fedtune.config.recipe import Recipe, method_type_of
from fedtune.data.settings import Split
from fedtune.errors import Fault
from fedtune.planning.fixed import FixedSettings


def trigger_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield the key that the trigger needs, and the one that it does not read."""
    if (chosen := recipe.asynchronous) is None:
        return
    reads, other = ("buffer", "budget_s") if chosen.trigger == "goal" else ("budget_s", "buffer")
    what = {"buffer": "the number of updates that end a round", "budget_s": "the seconds of a round"}
    if getattr(chosen, reads) is None:
        example = "buffer = 4" if reads == "buffer" else "budget_s = 60.0"
        yield Fault(f"asynchronous.{reads}", what[reads], "nothing", f"write, say, {example}")
    if getattr(chosen, other) is not None:
        expected = f"nothing with trigger = {quote(chosen.trigger)}, which does not read it"
        yield Fault(f"asynchronous.{other}", expected, f"{getattr(chosen, other):g}", "leave one of them out")


def buffer_faults(recipe: Recipe) -> Iterator[Fault]:
    """Refuse a buffer that the clients at work, or all there are, cannot fill."""
    if (chosen := recipe.asynchronous) is None:
        return
    rounds, fleet = recipe.rounds, fleet_bound(recipe.data.split)
    if chosen.concurrency is not None and rounds.cohort is not None:
        hint = "leave it out: asynchronous.concurrency says how many work at the same time"
        yield Fault("rounds.cohort", "nothing beside asynchronous.concurrency", f"{rounds.cohort:g}", hint)
    if chosen.concurrency is not None and fleet is not None and chosen.concurrency > fleet:
        expected = f"at most the {fleet} clients of data.split"
        yield Fault("asynchronous.concurrency", expected, str(chosen.concurrency))
    if chosen.trigger != "goal" or chosen.buffer is None:
        return
    if rounds.min_clients > chosen.buffer:
        expected = f"at most asynchronous.buffer = {chosen.buffer}"
        yield Fault("rounds.min_clients", expected, str(rounds.min_clients))
    cohort = rounds.cohort if isinstance(rounds.cohort, int) else None
    places = cohort if chosen.concurrency is None else chosen.concurrency
    if places is not None and chosen.buffer > (at_work := ceil(rounds.over_select * places - 1e-9)):
        expected = f"at most the {at_work} clients that work at the same time"
        yield Fault("asynchronous.buffer", expected, str(chosen.buffer), "raise asynchronous.concurrency")
    elif fleet is not None and chosen.buffer > fleet:
        expected = f"at most the {fleet} clients of data.split, each of which is in a buffer once"
        yield Fault("asynchronous.buffer", expected, str(chosen.buffer))


def fleet_bound(split: Split) -> int | None:
    """Return how many clients a split makes at most; None where that is known only when the data are read."""
    # With the kinds key and files `clients` is an upper bound, which is as good here.
    divided = len(split.sizes) if split.kind == "sizes" and split.sizes else split.clients
    sizes = [size for size in (divided, len(set(split.only)) if split.only else None) if size is not None]
    return min(sizes, default=None)


def overlap_faults(recipe: Recipe) -> Iterator[Fault]:
    """Refuse what reads a round as one cohort that starts from one state."""
    if recipe.asynchronous is None:
        return
    method, planner = method_type_of(recipe), recipe.planner
    if method.why_not_asynchronous:
        why, _, instead = method.why_not_asynchronous.partition("; ")
        expected, hint = f"none with {quote(method.name)}: {why}", instead or "leave it out"
        yield Fault("asynchronous", expected, "that table", hint)
    if not isinstance(planner, FixedSettings):
        expected = '"fixed" with [asynchronous]: other planners weigh the clients of a round against each other'
        yield Fault("planner", expected, quote(planner.name), 'set planner = "fixed", or leave the table out')
    if recipe.pruning is not None:
        hint = "leave one of them out"
        yield Fault("pruning", "no table beside [asynchronous], whose clients hold models of other rounds", "one", hint)
