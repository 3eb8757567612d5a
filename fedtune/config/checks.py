"""What the settings of a recipe must satisfy together, beyond each one's own range."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeAlias

from fedtune.config.error_text import display, join_words, nearest, quote
from fedtune.config.recipe import Override
from fedtune.data.settings import TEMPLATES, DataSettings, Split, faults
from fedtune.errors import Fault
from fedtune.messages import VERBS, ProbeSeeds, Training, TrainLora
from fedtune.methods import METHODS
from fedtune.methods.method import Method
from fedtune.methods.settings import ServerOptimizer
from fedtune.planning.adaptive import AdaptiveSettings
from fedtune.planning.fixed import FixedSettings
from fedtune.pruning.ranking import PruningSettings
from fedtune.rounds.schedule import cohort_size
from fedtune.simulation.settings import DeviceOverride, FleetSettings
from fedtune.wire.probe import MAX_STEPS

Check: TypeAlias = tuple[tuple[str, ...], Callable[..., Iterable[Fault]]]
"""The dotted keys a check reads, and the check over their values."""


def check(values: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield the faults of all checks whose keys were bound.

    Args:
        values: the bound values by dotted key, defaults included; a key that is itself at fault is missing, and
            checks that read it are left out.
    """
    for keys, rule in CHECKS:
        if all(key in values for key in keys):
            yield from rule(*(values[key] for key in keys))


def steps_or_epochs(steps: int | None, epochs: float | None, path: str = "client") -> Iterator[Fault]:
    if (steps is None) == (epochs is None):
        got = "neither" if steps is None else f"steps = {steps} and epochs = {epochs}"
        yield Fault(path, "exactly one of steps and epochs", got, 'write, say, "steps = 20"')


def momentum_of(optimizer: str, momentum: float, overrides: Sequence[Override]) -> Iterator[Fault]:
    if optimizer != "sgd" and momentum > 0:
        yield Fault("client.momentum", f"0 with optimizer {optimizer!r}", str(momentum), 'or set optimizer = "sgd"')
    for place, override in enumerate(overrides):
        if not override.training.keys() & {"optimizer", "momentum"}:
            continue
        by, keeps = override.training.get("optimizer", optimizer), override.training.get("momentum", momentum)
        if by != "sgd" and keeps > 0:
            hint = "set optimizer and momentum in the same override"
            yield Fault(f"override.{place}.momentum", f"0 with optimizer {by!r}", str(keeps), hint)


def early_end(engine: str, over_select: float, fleet: FleetSettings | None) -> Iterator[Fault]:
    """Refuse to end rounds early where clients finish in any order: the same recipe would not give the same bits."""
    if fleet is not None and over_select > 1:
        hint = 'set fleet.late = "drop" for rounds that go on without the slow ones'
        expected = "1 with [fleet], whose clients finish in the order of this machine's work, not of their devices"
        yield Fault("rounds.over_select", expected, f"{over_select:g}", hint)
        return
    if engine != "inprocess" and over_select > 1:
        hint = 'set engine.name = "inprocess", or serve the recipe over a network'
        yield Fault("rounds.over_select", f"1 with the engine {engine!r}, whose clients race", f"{over_select:g}", hint)


def split_rules(split: Split) -> Iterable[Fault]:
    # Data knows its own rules; a stand-in source lets them be asked although another key of the table is at fault.
    return faults(DataSettings(source="-", split=split))


def template_text(template: str) -> Iterator[Fault]:
    meant = nearest(template, TEMPLATES)
    for fault in faults(DataSettings(source="-", split=Split("files"), template=template)):
        yield replace(fault, hint=f"did you mean {quote(meant)}?") if meant else fault


def some_client(only: Sequence[str] | None) -> Iterator[Fault]:
    if only is not None and not only:
        yield Fault("data.split.only", "at least one client's name", "an empty list", "leave it out to keep all")


def cohort_bounds(cohort: int | float | None, least: int) -> Iterator[Fault]:
    if isinstance(cohort, float) and cohort > 1:
        yield Fault(
            "rounds.cohort", "a whole number of clients or a share of at most 1", str(cohort), "1.0 takes all clients"
        )
    if isinstance(cohort, int) and least > cohort:
        yield Fault("rounds.min_clients", f"at most rounds.cohort = {cohort}", str(least))


def fleet_size(split: Split, cohort: int | float | None, least: int) -> Iterator[Fault]:
    divided = len(split.sizes) if split.kind == "sizes" and split.sizes else split.clients  # key, files: at most these
    known = [size for size in (divided, len(set(split.only)) if split.only else None) if size is not None]
    if not known:
        return  # known only when the data are read
    fleet = min(known)
    if isinstance(cohort, int) and cohort > fleet:
        yield Fault("rounds.cohort", f"at most the {fleet} clients of data.split", str(cohort))
    elif least > fleet:
        yield Fault("rounds.min_clients", f"at most the {fleet} clients of data.split", str(least))
    elif isinstance(cohort, float) and least > (drawn := cohort_size(fleet, cohort)):
        expected = f"at most {drawn}, which rounds.cohort = {cohort} of {fleet} clients comes to"
        yield Fault("rounds.min_clients", expected, str(least))


def one_rank(method: Method[Any], rank: int, overrides: Sequence[Override]) -> Iterator[Fault]:
    if method.ranks != "equal":
        return
    ranks = {rank}
    for override in overrides:
        if override.rank is not None:
            ranks = {override.rank} if "*" in override.clients else ranks | {override.rank}
    if len(ranks) > 1:
        mixed = [name for name, other in METHODS.items() if other.ranks != "equal" and other.task is TrainLora]
        got = f"{join_words(sorted(ranks))} from adapter.rank and the overrides"
        yield Fault(
            "method", f"one rank, as {method.name!r} needs", got, f"use {join_words(mixed, joint='or')}, or one rank"
        )


def causal_only(task: str, packing: bool, generate: int, prompt: str | None) -> Iterator[Fault]:
    if task == "causal":
        return
    if packing:
        yield Fault("data.packing", f"false with model.task = {task!r}", "true", "only causal models read packed rows")
    if generate:
        yield Fault("evaluate.generate", f"0 with model.task = {task!r}", str(generate), "only causal models write")
    if prompt is not None:
        yield Fault("evaluate.prompt", f"none with model.task = {task!r}", display(prompt), "only causal models write")


def parts_of(task: str, fields: Mapping[str, str]) -> Iterator[Fault]:
    if task == "classification" and "output" in fields and "label" not in fields:
        yield Fault(
            "data.fields.label",
            "the column of the class, with model.task = 'classification'",
            "nothing",
            f"write label = {fields['output']!r} in place of output",
        )
    if task == "causal" and "label" in fields:
        yield Fault(
            "data.fields.label",
            "no entry with model.task = 'causal'",
            display(fields["label"]),
            'map output, or set model.task = "classification"',
        )


def some_source(source: str | Sequence[str]) -> Iterator[Fault]:
    if not labels_named(source):
        yield Fault("data.source", "at least one file, folder or hub name, none of them empty", display(source))


def some_test(test: str | Sequence[str] | None) -> Iterator[Fault]:
    if test is not None and not labels_named(test):
        yield Fault(
            "data.test", "at least one file, none of them empty", display(test), "leave it out for held-out rows"
        )


def labels_named(files: str | Sequence[str]) -> bool:
    return bool(files) and "" not in ((files,) if isinstance(files, str) else files)


def some_base(base: str) -> Iterator[Fault]:
    if not base:
        yield Fault("model.base", "a folder, a hub name or embedded", "an empty text")


def device_name(device: str) -> Iterator[Fault]:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        yield Fault("model.device", "auto, cpu, cuda, cuda:<number> or mps", display(device))


def targets_overlap(targets: Sequence[str], in_full: Sequence[str]) -> Iterator[Fault]:
    if not targets:
        yield Fault("adapter.targets", "at least one module", "an empty list", 'targets = ["all-linear"] takes all')
    for module in sorted(set(targets) & set(in_full)):
        yield Fault(
            "adapter.modules_to_save", "modules that are not targets as well", display(module), "keep it in one list"
        )


KEPT = ("steps", "epochs", "batch", "learning_rate")
"""Keys of the table `client` that steps along seeds have as well."""
IDLE: Mapping[str, Any] = {each.name: each.default for each in fields(Training) if each.name not in KEPT}
"""The others, with their defaults."""


def seed_method_faults(method: Method[Any], overrides: Sequence[Override], *idle: Any) -> Iterator[Fault]:
    """Yield what a recipe asks for that steps along seeds do not have; `idle` are the values of `IDLE`'s keys."""
    if method.task is not ProbeSeeds:
        return
    hint = f"{method.name!r} has forward passes in the base's own format and no optimizer; leave it out"
    for (key, default), value in zip(IDLE.items(), idle, strict=True):
        if value != default and (key, value) != ("autocast", "off"):
            yield Fault(f"client.{key}", display(default), display(value), hint)
    for place, override in enumerate(overrides):
        for key in sorted(override.training.keys() - {*KEPT}):
            yield Fault(
                f"override.{place}.{key}", "batch, learning_rate, steps or epochs", key, f"with {method.name!r}"
            )
        if override.rank is not None:
            yield Fault(f"override.{place}.rank", "nothing", str(override.rank), f"{method.name!r} trains no adapter")


def one_verb(method: Method[Any], overrides: Sequence[Override]) -> Iterator[Fault]:
    """Yield where a recipe asks some clients for another verb than the method's: no such round is summed here."""
    # FedKSeed's weights are w0 plus a sum of integers, rounded once. A product of LoRA factors on top would round a
    # second time, and differ between machines.
    own = VERBS[method.task]
    for place, override in enumerate(overrides):
        if override.verb in (None, own):
            continue
        expected = f"{quote(own)}, as all clients of {method.name!r}"
        hint = "a round sums updates of one kind; start a run for each method"
        yield Fault(f"override.{place}.verb", expected, display(override.verb), hint)


def prunable(
    method: Method[Any], pruning: PruningSettings | None, planner: Any, overrides: Sequence[Override]
) -> Iterator[Fault]:
    """Yield where a recipe prunes what cannot be pruned, or asks for ratios without pruning."""
    asked = [(f"override.{place}.ratio", o.ratio) for place, o in enumerate(overrides) if o.ratio is not None]
    if isinstance(planner, FixedSettings) and planner.ratio > 0:
        asked.append(("planner.ratio", planner.ratio))
    if isinstance(planner, AdaptiveSettings):
        yield from chosen_by_planner(planner, overrides)
    if pruning is None:
        for path, ratio in asked:
            if ratio > 0:
                yield Fault(path, "0 without the table pruning", f"{ratio:g}", "write [pruning]")
        return
    if why := method.why_not_pruned:
        able = join_words([quote(name) for name, other in METHODS.items() if not other.why_not_pruned], joint="or")
        hint = f"use method = {able}, or leave pruning out"
        yield Fault("pruning", "no table with this method", f"{method.name!r}: {why}", hint)
    if pruning.score == "magnitude" and pruning.allocation == "global":
        hint = "weights of different blocks are of different size: global ranks by magnitude are worse than chance"
        yield Fault("pruning.allocation", "uniform with score = 'magnitude'", "'global'", hint)
    if pruning.policy == "vote" and pruning.target == 0:
        hint = "the largest of planner.ratios" if isinstance(planner, AdaptiveSettings) else "your ratio"
        yield Fault("pruning.target", "above 0 with 'vote', whose clients vote for a mask of that size", "0", hint)
    if isinstance(planner, AdaptiveSettings):
        if 0 not in planner.ratios and planner.ratios and pruning.policy != "local" and pruning.ranking is None:
            hint = "add 0: the first round prunes nobody, and asks for the scores; or name a file in pruning.ranking"
            got = f"at least {min(planner.ratios):g}"
            yield Fault("planner.ratios", "0 among them where pruning.ranking brings no order", got, hint)
        if planner.ratios and pruning.target and pruning.target not in planner.ratios:
            hint = f"add {pruning.target:g}: in the last rounds everybody trains what is deployed"
            got = ", ".join(f"{ratio:g}" for ratio in planner.ratios)
            yield Fault("planner.ratios", f"pruning.target = {pruning.target:g} among them", got, hint)
    elif isinstance(planner, FixedSettings) and pruning.policy == "vote" and len(ratios_of(planner, overrides)) > 1:
        yield Fault(
            "pruning.policy", "one ratio for all with 'vote', whose clients share a mask", "several", "use nested"
        )


def ratios_of(planner: FixedSettings, overrides: Sequence[Override]) -> set[float]:
    """Return the ratios that clients may be asked for by a planner that asks every one for its own."""
    found, left = set[float](), True
    for override in overrides:
        if override.ratio is not None:
            found, left = ({override.ratio}, False) if "*" in override.clients else (found | {override.ratio}, left)
    return found | {planner.ratio} if left else found


def chosen_by_planner(planner: AdaptiveSettings, overrides: Sequence[Override]) -> Iterator[Fault]:
    """Yield what a recipe says of some clients that its planner chooses."""
    for place, override in enumerate(overrides):
        for key, value in (("ratio", override.ratio), ("rank", override.rank)):
            if value is not None:
                hint = 'the planner chooses it; set planner = "fixed" to say it yourself'
                expected = f"nothing with the planner {planner.name!r}"
                yield Fault(f"override.{place}.{key}", expected, f"{value:g}", hint)


def arms(planner: Any) -> Iterator[Fault]:
    if not isinstance(planner, AdaptiveSettings):
        return
    for key in ("ratios", "ranks"):
        if not getattr(planner, key):
            yield Fault(f"planner.{key}", "at least one number", "an empty list", "leave it out for the usual ones")
    usual = AdaptiveSettings()
    for key, readers in READERS.items():
        value = getattr(planner, key)
        if planner.name not in readers and value != getattr(usual, key):
            expected = f"nothing with the planner {planner.name!r}, which does not read it"
            yield Fault(f"planner.{key}", expected, display(value), f"it is of {join_words(readers)}")


READERS: Mapping[str, Sequence[str]] = {
    "explore": ("deadline",),
    "deadline_s": ("deadline",),
    "reward": ("ucb", "thompson"),
}
"""The planners that a setting means something to."""


SENDS_NO_DEADLINE = ("fixed", "random", "s-ucb", "thompson", "ucb")
"""Planners whose plans say nothing of when a round should be over."""


def learning_planner(method: Method[Any], planner: Any) -> Iterator[Fault]:
    if not isinstance(planner, AdaptiveSettings):
        return
    if method.task is ProbeSeeds or method.ranks == "equal":
        why = "trains no adapter" if method.task is ProbeSeeds else "needs one rank for all"
        yield Fault(
            "planner", f"'fixed' with method {method.name!r}, which {why}", repr(planner.name), "use method = 'flora'"
        )


def device_faults(
    method: Method[Any],
    fleet: FleetSettings | None,
    devices: Sequence[DeviceOverride],
    planner: Any,
    steps: int | None,
    overrides: Sequence[Override],
) -> Iterator[Fault]:
    if planner.name == "oracle":
        if fleet is None or fleet.by != "round":
            hint = "it is told the simulated clock's times, which must not depend on what was chosen before"
            yield Fault("planner", "another, without fleet.by = 'round'", "'oracle'", hint)
        if steps is None or any("epochs" in each.training for each in overrides):
            hint = "it is told the simulated clock's times, which follow from the recipe alone"
            yield Fault("client.epochs", "none, but client.steps", "epochs", hint)
    if fleet is not None and method.task is ProbeSeeds:
        expected, hint = f"no table with {method.name!r}", "what its forward passes cost a device is not modelled yet"
        yield Fault("fleet", expected, repr(fleet.name), hint)
    if fleet is not None and fleet.late == "drop" and planner.name in SENDS_NO_DEADLINE:
        hint = 'take planner = "deadline", or leave fleet.late out'
        yield Fault("fleet.late", f"'wait' with the planner {planner.name!r}, which sends no deadline", "'drop'", hint)
    if fleet is None and devices:
        yield Fault("device", "no tables without [fleet]", f"{len(devices)}", 'write fleet = { name = "fedspine80" }')


def method_faults(
    method: Method[Any], settings: Any, steps: int | None, overrides: Sequence[Override]
) -> Iterator[Fault]:
    """Yield what the method itself says of its settings, given the steps of a round of each kind of client."""
    kinds = [steps, *(o.training.get("steps") for o in overrides if o.training.keys() & {"steps", "epochs"})]
    yield from method.faults(settings, kinds)
    known = [count for count in kinds if count is not None]
    if method.task is ProbeSeeds and any(count > MAX_STEPS for count in known):
        yield Fault("client.steps", f"at most {MAX_STEPS} scalars a round", str(max(known)))


def optimizer_keys(optimizer: ServerOptimizer) -> Iterator[Fault]:
    """Yield the keys of a server optimiser that the rule it names does not read."""
    usual = ServerOptimizer()
    for key, readers in OPTIMIZER_READERS.items():
        value = getattr(optimizer, key)
        if optimizer.name not in readers and value != getattr(usual, key):
            expected = f"nothing with {optimizer.name!r}, which does not read it"
            yield Fault(f"method.server_optimizer.{key}", expected, display(value), f"it is of {join_words(readers)}")


OPTIMIZER_READERS: Mapping[str, Sequence[str]] = {
    "momentum": ("fedavgm",),
    "beta1": ("fedadam", "fedyogi"),
    "beta2": ("fedadam", "fedyogi"),
    "tau": ("fedadam", "fedyogi"),
}
"""The server optimisers that read a key."""


CHECKS: Sequence[Check] = (
    (("model.base",), some_base),
    (("model.device",), device_name),
    (("adapter.targets", "adapter.modules_to_save"), targets_overlap),
    (("method:type", "adapter.rank", "override"), one_rank),
    (("client.steps", "client.epochs"), steps_or_epochs),
    (("client.optimizer", "client.momentum", "override"), momentum_of),
    (("method:type", "override", *(f"client.{key}" for key in IDLE)), seed_method_faults),
    (("method:type", "override"), one_verb),
    (("method:type", "method", "client.steps", "override"), method_faults),
    (("method:type", "pruning", "planner", "override"), prunable),
    (("method.server_optimizer",), optimizer_keys),
    (("planner",), arms),
    (("method:type", "planner"), learning_planner),
    (("method:type", "fleet", "device", "planner", "client.steps", "override"), device_faults),
    (("rounds.cohort", "rounds.min_clients"), cohort_bounds),
    (("engine.name", "rounds.over_select", "fleet"), early_end),
    (("data.split", "rounds.cohort", "rounds.min_clients"), fleet_size),
    (("data.split",), split_rules),
    (("data.split.only",), some_client),
    (("data.source",), some_source),
    (("data.test",), some_test),
    (("data.template",), template_text),
    (("model.task", "data.fields"), parts_of),
    (("model.task", "data.packing", "evaluate.generate", "evaluate.prompt"), causal_only),
)
