"""What the tables of pruning, planner and simulated devices must satisfy together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedtune.config.error_text import display, join_words, quote
from fedtune.config.recipe import ARM_KEYS, AT_SITES, PYTHON, Override, Recipe, method_type_of
from fedtune.errors import Fault
from fedtune.messages import ProbeSeeds
from fedtune.methods import METHODS
from fedtune.methods.fedkseed_state import FedKSeedSettings
from fedtune.methods.method import Method
from fedtune.planning.arms import AdaptiveSettings, goal_of, ratios_of
from fedtune.planning.expgrad import KEYS, ExpGradSettings, arms_of
from fedtune.planning.fedpipe import MEASURED, FedPipeSettings
from fedtune.planning.fixed import FixedSettings
from fedtune.pruning.ranking import PruningSettings

READERS: Mapping[str, Sequence[str]] = {
    "explore": ("deadline",),
    "deadline_s": ("bandit", "deadline"),
    "probe": ("bandit", "deadline"),
    "reward": ("ucb", "thompson"),
}
"""The planners that read a setting, where not all do."""


SENDS_NO_DEADLINE = ("expgrad", "fixed", "random", "s-ucb", "thompson", "ucb")
"""Planners whose plans say nothing of when a round should end; those of other packages may."""


def pruning_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield where a recipe prunes what cannot be pruned, or asks for ratios without pruning."""
    method, pruning, planner, overrides = method_type_of(recipe), recipe.pruning, recipe.planner, recipe.override
    if isinstance(planner, AdaptiveSettings):
        yield from chosen_by_planner_faults(planner, overrides)
    if pruning is None:
        yield from ratio_faults(recipe)
        if isinstance(planner, AdaptiveSettings) and planner.goal in ("deployed", "both"):
            hint = "write [pruning], whose target is what will be deployed; or set planner.goal = 'whole'"
            yield Fault("planner.goal", "'whole' without the table pruning", repr(planner.goal), hint)
        return
    if why := method.why_not_pruned:
        able = join_words([quote(name) for name, other in METHODS.items() if not other.why_not_pruned], joint="or")
        hint = f"use method = {able}, or leave pruning out"
        yield Fault("pruning", "no table with this method", f"{method.name!r}: {why}", hint)
    if pruning.score == "magnitude" and pruning.allocation == "global":
        hint = "weights of different blocks are of different size: global ranks by magnitude are worse than chance"
        yield Fault("pruning.allocation", "uniform with score = 'magnitude'", "'global'", hint)
    if pruning.repair != "none" and pruning.policy == "local":
        hint = 'set pruning.repair = "none", or pruning.policy = "nested"'
        yield Fault("pruning.repair", "none with policy = 'local', whose clients share no moments", "it", hint)
    if pruning.adapters == "two" and (pruning.target == 0 or pruning.policy != "nested"):
        got = "pruning.target = 0" if pruning.target == 0 else f"policy = {pruning.policy!r}"
        hint = 'set pruning.adapters = "one", or say what is deployed'
        yield Fault("pruning.adapters", "one deployed structure for all: a target above 0, policy nested", got, hint)
    if pruning.policy == "vote" and pruning.target == 0:
        hint = "the largest of planner.ratios" if isinstance(planner, AdaptiveSettings) else "your ratio"
        yield Fault("pruning.target", "above 0 with 'vote', whose clients vote for a mask of that size", "0", hint)
    if isinstance(planner, AdaptiveSettings):
        yield from adaptive_pruning_faults(planner, pruning)
    elif (
        isinstance(planner, FixedSettings)
        and pruning.policy == "vote"
        and len(requested_ratios(planner, overrides)) > 1
    ):
        expected = "one ratio for all with 'vote', whose clients share a mask"
        yield Fault("pruning.policy", expected, "several", "use nested")


def adaptive_pruning_faults(planner: AdaptiveSettings, pruning: PruningSettings) -> Iterator[Fault]:
    """Yield what a planner that chooses ratios, and the pruning that they are of, exclude."""
    ratios = ratios_of(planner, pruned=True, target=pruning.target)
    if 0 not in ratios and ratios and pruning.policy != "local" and pruning.ranking is None:
        hint = "add 0: the first round prunes no client, and asks for the scores; or name a file in pruning.ranking"
        yield Fault(
            "planner.ratios",
            "0 among them where pruning.ranking brings no order",
            f"at least {min(ratios):g}",
            hint,
        )
    bound = pruning.floor == "ramp" or goal_of(planner, pruning.target) != "whole"
    if ratios and bound and pruning.target and pruning.target not in ratios:
        hint = (
            f"add {pruning.target:g}: in the last rounds clients train what they deploy; or set planner.goal = 'whole'"
        )
        got = ", ".join(f"{ratio:g}" for ratio in ratios)
        yield Fault("planner.ratios", f"pruning.target = {pruning.target:g} among them", got, hint)
    if pruning.floor != "ramp" and pruning.ramp != PruningSettings().ramp:
        hint = "leave it out: planners are free to choose; or set pruning.floor = 'ramp' for what releases before did"
        yield Fault("pruning.ramp", "nothing with pruning.floor = 'deployed'", f"{pruning.ramp:g}", hint)
    if pruning.floor == "ramp" and planner.goal != "auto":
        hint = "leave one of the two out: a ramp binds all clients, whatever they deploy"
        yield Fault("planner.goal", "'auto' with pruning.floor = 'ramp'", repr(planner.goal), hint)
    if pruning.deployed_on and goal_of(planner, pruning.target) == "whole":
        hint = "leave it out, or set planner.goal = 'both'"
        yield Fault("pruning.deployed_on", "nothing where planner.goal is whole", display(pruning.deployed_on), hint)


def ratio_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield the pruning ratios that a recipe without the table `pruning` asks for."""
    ratios = [(f"override.{place}.ratio", override.ratio) for place, override in enumerate(recipe.override)]
    if isinstance(recipe.planner, FixedSettings):
        ratios.append(("planner.ratio", recipe.planner.ratio))
    for path, ratio in ratios:
        if ratio:
            yield Fault(path, "0 without the table pruning", f"{ratio:g}", "write [pruning]")


def arm_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield what a recipe asks of some modules, or of what is sent down, that its method cannot do."""
    method, usual = method_type_of(recipe), FixedSettings()
    if isinstance(recipe.planner, AdaptiveSettings):
        yield from listed_arm_faults(recipe.planner, method)
    asked = [("planner", recipe.planner)] if isinstance(recipe.planner, FixedSettings) else []
    rows: Sequence[tuple[str, Any]] = [*asked, *((f"override.{at}", row) for at, row in enumerate(recipe.override))]
    for path, table in rows:
        for key in ARM_KEYS:
            value = getattr(table, key)
            if value is None or value == getattr(usual, key):
                continue
            if method.task is ProbeSeeds:
                yield Fault(f"{path}.{key}", "nothing", f"{value:g}", f"{method.name!r} trains no adapter")
            elif key != "back" and method.modules == "equal":
                yield modules_fault(f"{path}.{key}", method, f"{value:g}", of_modules=key == "top")


def listed_arm_faults(planner: AdaptiveSettings, method: Method[Any]) -> Iterator[Fault]:
    """Yield the arms listed for a planner that learns which the method cannot combine."""
    if method.modules == "any" or method.task is ProbeSeeds or method.ranks == "equal":
        return  # the last two take no such planner
    if any(top < 1.0 for top in planner.tops or ()):
        yield modules_fault("planner.tops", method, display(list(planner.tops or ())), of_modules=True)
    if planner.down_ranks:
        yield modules_fault("planner.down_ranks", method, display(list(planner.down_ranks)), of_modules=False)


def modules_fault(path: str, method: Method[Any], got: str, *, of_modules: bool) -> Fault:
    able = join_words([quote(name) for name, other in METHODS.items() if other.modules == "any"], joint="or")
    what = "all modules of every client" if of_modules else "one global change for every client"
    hint = f"use method = {able}, or leave it out"
    return Fault(path, f"nothing with {method.name!r}, which needs {what}", got, hint)


def requested_ratios(planner: FixedSettings, overrides: Sequence[Override]) -> set[float]:
    """Return the ratios that the planner `fixed` may ask clients for."""
    ratios = {planner.ratio}
    for override in overrides:
        if override.ratio is not None:
            ratios = {override.ratio} if "*" in override.clients else ratios | {override.ratio}
    return ratios


def chosen_by_planner_faults(planner: AdaptiveSettings, overrides: Sequence[Override]) -> Iterator[Fault]:
    """Yield what a recipe says of some clients that its planner chooses."""
    for place, override in enumerate(overrides):
        for key in ("ratio", "rank", *ARM_KEYS):
            value = getattr(override, key)
            if value is not None:
                hint = 'the planner chooses it; set planner = "fixed" to say it yourself'
                expected = f"nothing with the planner {planner.name!r}"
                yield Fault(f"override.{place}.{key}", expected, f"{value:g}", hint)


def planner_key_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield empty lists of a planner that chooses, and the keys that it does not read."""
    planner, usual = recipe.planner, AdaptiveSettings()
    if not isinstance(planner, AdaptiveSettings):
        return
    for key in ("ratios", "ranks", "tops", "backs", "shares", "down_ranks"):
        if (numbers := getattr(planner, key)) is not None and not numbers:
            hint = "leave it out for the default ones"
            yield Fault(f"planner.{key}", "at least one number", "an empty list", hint)
    for key, readers in READERS.items():
        value = getattr(planner, key)
        if planner.name not in readers and value != getattr(usual, key):
            expected = f"nothing with the planner {planner.name!r}, which does not read it"
            yield Fault(f"planner.{key}", expected, display(value), f"it is of {join_words(readers)}")


def fedpipe_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield what the planner `fedpipe` cannot plan: ranks that it may not give, and what it is not built for."""
    planner, method = recipe.planner, method_type_of(recipe)
    if not isinstance(planner, FedPipeSettings):
        return
    if 1 not in planner.ranks:
        got = ", ".join(map(str, planner.ranks)) or "an empty list"
        yield Fault("planner.ranks", "1 among them, which every module gets first", got, "add 1")
    budgets = [("adapter.rank", recipe.adapter.rank)]
    budgets += [(f"override.{place}.rank", override.rank or 0) for place, override in enumerate(recipe.override)]
    for path, rank in budgets:
        if planner.ranks and rank > max(planner.ranks):
            hint = f"it is a site's budget: lower it, or add {rank} to planner.ranks"
            yield Fault(path, f"at most the largest of planner.ranks, {max(planner.ranks)}", f"{rank}", hint)
    if planner.importance in MEASURED and planner.warmup >= recipe.rounds.count:
        hint = 'lower it, or set planner.importance = "uniform", which measures nothing'
        expected = f"fewer than the {recipe.rounds.count} rounds of the run"
        yield Fault("planner.warmup", expected, f"{planner.warmup}", hint)
    if recipe.pruning is not None:
        hint = 'leave pruning out; a site that cannot hold the base takes planner.base_dtypes, or planner = "bandit"'
        got = "one: ranks by module are chosen for whole layers, whose sides pruning changes"
        yield Fault("pruning", "no table with the planner 'fedpipe'", got, hint)
    if method.task is ProbeSeeds or method.ranks == "equal":
        why = "trains no adapter" if method.task is ProbeSeeds else "needs one rank for all"
        yield Fault("planner", f"'fixed' with method {method.name!r}, which {why}", "'fedpipe'", "use method = 'flora'")


MOST_ARMS = 64
"""Of the planner `expgrad`: a run has some tens or hundreds of rounds to tell them apart in."""


def expgrad_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield what the planner `expgrad` cannot learn from, and what each of its arms cannot be."""
    planner, method = recipe.planner, method_type_of(recipe)
    if not isinstance(planner, ExpGradSettings):
        return
    if method.task is ProbeSeeds:
        expected = f"'fixed' with method {method.name!r}, which trains no adapter"
        yield Fault("planner", expected, "'expgrad'", "use method = 'flora'")
    for name, key in KEYS.items():
        values = getattr(planner, name)
        if len(set(values)) < len(values):
            yield Fault(f"planner.{name}", "each value once", display(list(values)), "leave out what is there twice")
        for place, override in enumerate(recipe.override):
            same = {key, "epochs"} if key == "steps" else {key}
            for own in sorted(same & override.training.keys()) if values else ():
                hint = f"leave one of the two out: planner.{name} sets client.{key} for every client"
                got = display(override.training[own])
                yield Fault(f"override.{place}.{own}", f"nothing with planner.{name}", got, hint)
    arms = arms_of(planner)
    if not 2 <= len(arms) <= MOST_ARMS:
        hint = "list values to try, such as learning_rates = [0.0003, 0.001, 0.003]" if len(arms) < 2 else "list fewer"
        expected = f"2 to {MOST_ARMS} arms, which are the combinations of its lists"
        yield Fault("planner", expected, f"{len(arms)}", hint)
    if recipe.data.held_out == 0 and recipe.data.source not in (AT_SITES, PYTHON):
        hint = "set data.held_out, say to 0.1"
        yield Fault("data.held_out", "above 0 with the planner 'expgrad', which learns from rows held out", "0", hint)


def planner_method_faults(recipe: Recipe) -> Iterator[Fault]:
    method, planner = method_type_of(recipe), recipe.planner
    if not isinstance(planner, AdaptiveSettings):
        return
    if method.task is ProbeSeeds or method.ranks == "equal":
        why = "trains no adapter" if method.task is ProbeSeeds else "needs one rank for all"
        expected = f"'fixed' with method {method.name!r}, which {why}"
        yield Fault("planner", expected, repr(planner.name), "use method = 'flora'")


def fleet_table_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield what the tables `fleet` and `device` exclude, and what the planner `oracle` needs of them."""
    method, fleet, planner = method_type_of(recipe), recipe.fleet, recipe.planner.name
    if planner == "oracle":
        if fleet is None or fleet.by != "round":
            hint = "it reads the simulated clock's times, which must not depend on what was chosen before"
            yield Fault("planner", "another, without fleet.by = 'round'", "'oracle'", hint)
        if recipe.client.steps is None or any("epochs" in override.training for override in recipe.override):
            hint = "it reads the simulated clock's times, which follow from the recipe alone"
            yield Fault("client.epochs", "none, but client.steps", "epochs", hint)
    if fleet is not None and method.task is ProbeSeeds and not isinstance(recipe.method, FedKSeedSettings):
        hint = "leave it out: what its clients' work costs a device is not modelled"
        yield Fault("fleet", f"no table with {method.name!r}", repr(fleet.name), hint)
    if fleet is not None and fleet.late == "drop" and planner in SENDS_NO_DEADLINE:
        hint = 'take planner = "deadline", or leave fleet.late out'
        yield Fault("fleet.late", f"'wait' with the planner {planner!r}, which sends no deadline", "'drop'", hint)
    if fleet is None and recipe.device:
        expected, hint = "no tables without [fleet]", 'write fleet = { name = "fedspine80" }'
        yield Fault("device", expected, f"{len(recipe.device)}", hint)
