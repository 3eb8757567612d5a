"""What the tables of a recipe must satisfy beyond each value's own type and range."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeAlias

from fedtune.config.adapter_kinds import adapter_kind_faults, layers_faults
from fedtune.config.async_checks import buffer_faults, fleet_bound, overlap_faults, trigger_faults
from fedtune.config.error_text import display, join_words, nearest, quote
from fedtune.config.personal_checks import personal_faults
from fedtune.config.planner_checks import (
    arm_faults,
    expgrad_faults,
    fedpipe_faults,
    fleet_table_faults,
    planner_key_faults,
    planner_method_faults,
    pruning_faults,
)
from fedtune.config.preference_checks import preference_faults
from fedtune.config.recipe import Recipe, method_type_of, requested_verbs
from fedtune.config.search_checks import search_faults
from fedtune.config.split_checks import match_faults
from fedtune.config.tables import apply_rule
from fedtune.config.trainer_checks import names_trainer, trainer_faults
from fedtune.config.verb_checks import (
    accumulator_faults,
    client_steps_faults,
    descend_table_faults,
    override_verb_faults,
    probing_key_faults,
    scalar_bits_faults,
)
from fedtune.data.settings import TEMPLATES, DataSettings, Split
from fedtune.data.settings import faults as data_faults
from fedtune.errors import Fault
from fedtune.messages import ProbeSeeds, Training, TrainLora
from fedtune.methods import METHODS
from fedtune.methods.method import LinearMethod
from fedtune.methods.robust import least_clients
from fedtune.methods.settings import LinearSettings, RobustRule, ServerOptimizer
from fedtune.model.settings import quantised_format
from fedtune.rounds.schedule import Schedule, cohort_size
from fedtune.wire.probe import MAX_STEPS

Rule: TypeAlias = Callable[[Recipe], Iterable[Fault]]
"""From a recipe to its faults of one kind. The recipe may lack keys that have faults of their own; see `apply_rule`."""


def check(recipe: Recipe) -> Iterator[Fault]:
    """Yield the faults of all rules that can be decided."""
    for rule in RULES:
        yield from apply_rule(rule, recipe)


def length_faults(steps: int | None, epochs: float | None, path: str) -> Iterator[Fault]:
    """Yield a fault unless exactly one of the two ways to say how long a client trains is used."""
    if (steps is None) == (epochs is None):
        got = "neither" if steps is None else f"steps = {steps} and epochs = {epochs}"
        yield Fault(path, "exactly one of steps and epochs", got, 'write, say, "steps = 20"')


def training_length_faults(recipe: Recipe) -> Iterator[Fault]:
    if requested_verbs(recipe) != {"descend"}:  # else `verb_checks.client_steps_faults`
        yield from length_faults(recipe.client.steps, recipe.client.epochs, "client")


def momentum_faults(recipe: Recipe) -> Iterator[Fault]:
    optimizer, momentum = recipe.client.optimizer, recipe.client.momentum
    if optimizer != "sgd" and momentum > 0:
        yield Fault("client.momentum", f"0 with optimizer {optimizer!r}", str(momentum), 'or set optimizer = "sgd"')
    for place, override in enumerate(recipe.override):
        if not override.training.keys() & {"optimizer", "momentum"}:
            continue
        changed = {"optimizer": optimizer, "momentum": momentum, **override.training}
        if changed["optimizer"] != "sgd" and changed["momentum"] > 0:
            expected = f"0 with optimizer {changed['optimizer']!r}"
            hint = "set optimizer and momentum in the same override"
            yield Fault(f"override.{place}.momentum", expected, str(changed["momentum"]), hint)


def early_end_faults(recipe: Recipe) -> Iterator[Fault]:
    """Refuse to end rounds early where clients finish in any order: the same recipe would not give the same bits."""
    over_select, engine, fleet = recipe.rounds.over_select, recipe.engine.name, recipe.fleet
    # Asynchronous rounds end in the order of the clock.
    if over_select <= 1 or recipe.asynchronous is not None:
        return
    if fleet is not None:
        expected = "1 with [fleet], whose clients finish in the order of this machine's work, not of their devices"
        hint = 'set fleet.late = "drop" for rounds that go on without the slow ones'
        yield Fault("rounds.over_select", expected, f"{over_select:g}", hint)
    elif engine != "inprocess":
        hint = 'set engine.name = "inprocess", or serve the recipe over a network'
        yield Fault("rounds.over_select", f"1 with the engine {engine!r}, whose clients race", f"{over_select:g}", hint)


def schedule_faults(recipe: Recipe) -> Iterator[Fault]:
    """Refuse a warm-up without a round after it, and a key that the constant schedule does not read."""
    rounds = recipe.rounds
    if rounds.warmup >= rounds.count:
        expected = f"fewer rounds than rounds.count = {rounds.count}"
        yield Fault("rounds.warmup", expected, str(rounds.warmup), "leave a round at the full rate")
    if rounds.schedule == "constant" and rounds.final_rate != Schedule.final_rate:
        expected, hint = "nothing with rounds.schedule = 'constant'", "set rounds.schedule to linear or cosine"
        yield Fault("rounds.final_rate", expected, f"{rounds.final_rate:g}", hint)


METRICS: Mapping[str, Sequence[str]] = {
    "causal": ("loss", "perplexity", "bits_per_character", "rouge_l", "exact_match"),
    "classification": ("loss", "accuracy", "macro_f1"),
    "dpo": ("loss", "reward_accuracy", "reward_margin", "preferred", "rouge_l", "exact_match"),
}
"""Scores of `rounds.metric`, by task; of the objective dpo its own."""


def selection_faults(recipe: Recipe) -> Iterator[Fault]:
    """Refuse to look for the best round by a score that is not taken."""
    kind = "dpo" if recipe.client.objective == "dpo" else recipe.model.task
    rounds, evaluate, known = recipe.rounds, recipe.evaluate, METRICS[kind]
    asking = {"keep": rounds.keep == "best", "patience": rounds.patience is not None}
    if rounds.metric not in known:
        yield Fault("rounds.metric", f"one of {join_words(known)} for {kind} models", repr(rounds.metric))
    elif rounds.metric in ("rouge_l", "exact_match") and not evaluate.generate:
        hint = "set evaluate.generate to the number of test examples that are answered"
        yield Fault("rounds.metric", "a score that is taken", f"{rounds.metric!r} with evaluate.generate = 0", hint)
    if any(asking.values()) and evaluate.every == 0:
        key = next(key for key, asked in asking.items() if asked)
        got = f"evaluate.every = 0, by which none is scored before the last round, and rounds.{key}"
        yield Fault("evaluate.every", "at least 1, to compare rounds", got, "set evaluate.every = 1")


def split_faults(recipe: Recipe) -> Iterable[Fault]:
    # The package data knows its own rules. They take a whole table, so what is not asked for is filled in.
    data = recipe.data
    return data_faults(DataSettings(source="-", split=data.split, test=data.test, limit=data.limit))


def template_faults(recipe: Recipe) -> Iterator[Fault]:
    meant = nearest(recipe.data.template, TEMPLATES)
    for fault in data_faults(DataSettings(source="-", split=Split("files"), template=recipe.data.template)):
        yield replace(fault, hint=f"did you mean {quote(meant)}?") if meant else fault


def selected_client_faults(recipe: Recipe) -> Iterator[Fault]:
    if recipe.data.split.only is not None and not recipe.data.split.only:
        yield Fault("data.split.only", "at least one client's name", "an empty list", "leave it out to keep all")


def cohort_faults(recipe: Recipe) -> Iterator[Fault]:
    cohort, least = recipe.rounds.cohort, recipe.rounds.min_clients
    if isinstance(cohort, float) and cohort > 1:
        expected = "a whole number of clients or a share of at most 1"
        yield Fault("rounds.cohort", expected, str(cohort), "1.0 takes all clients")
    if isinstance(cohort, int) and least > cohort:
        yield Fault("rounds.min_clients", f"at most rounds.cohort = {cohort}", str(least))


def fleet_size_faults(recipe: Recipe) -> Iterator[Fault]:
    cohort, least = recipe.rounds.cohort, recipe.rounds.min_clients
    fleet = fleet_bound(recipe.data.split)
    if fleet is None:
        return  # known only when the data are read
    if isinstance(cohort, int) and cohort > fleet:
        yield Fault("rounds.cohort", f"at most the {fleet} clients of data.split", str(cohort))
    elif least > fleet:
        yield Fault("rounds.min_clients", f"at most the {fleet} clients of data.split", str(least))
    elif isinstance(cohort, float) and least > (number := cohort_size(fleet, cohort)):
        expected = f"at most {number}, the share rounds.cohort = {cohort} of {fleet} clients"
        yield Fault("rounds.min_clients", expected, str(least))


def rank_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield a fault if clients get different ranks with a method that needs one rank for all."""
    method, ranks = method_type_of(recipe), {recipe.adapter.rank}
    for override in recipe.override:
        if override.rank is not None:
            ranks = {override.rank} if "*" in override.clients else ranks | {override.rank}
    if method.ranks == "equal" and len(ranks) > 1:
        mixed = [name for name, other in METHODS.items() if other.ranks != "equal" and other.task is TrainLora]
        got = f"{join_words(sorted(ranks))} from adapter.rank and the overrides"
        hint = f"use {join_words(mixed, joint='or')}, or one rank"
        yield Fault("method", f"one rank, as {method.name!r} needs", got, hint)


def start_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield a fault if a method is to start from an adapter that it has no state for."""
    method = method_type_of(recipe)
    if recipe.adapter.start is not None and method.start is None:
        able = [name for name, other in METHODS.items() if other.start is not None]
        expected = f"none with method = {method.name!r}, whose state is no exact adapter"
        yield Fault("adapter.start", expected, display(recipe.adapter.start), f"use {join_words(able, joint='or')}")


def causal_only_faults(recipe: Recipe) -> Iterator[Fault]:
    task, packing = recipe.model.task, recipe.data.packing
    generate, prompt = recipe.evaluate.generate, recipe.evaluate.prompt
    questions, references = recipe.evaluate.prompts, recipe.evaluate.references
    if references and len(references) != len(questions):
        expected = f"one answer for each of the {len(questions)} evaluate.prompts, or none"
        yield Fault("evaluate.references", expected, str(len(references)), "leave out what has no question")
    if task == "causal":
        return
    for path, packs in {"data.packing": packing, "client.packing": recipe.client.packing}.items():
        if packs:
            yield Fault(path, f"false with model.task = {task!r}", "true", "only causal models read packed rows")
    if generate:
        yield Fault("evaluate.generate", f"0 with model.task = {task!r}", str(generate), "only causal models write")
    if prompt is not None:
        yield Fault("evaluate.prompt", f"none with model.task = {task!r}", display(prompt), "only causal models write")
    if questions:
        got = display(list(questions))
        yield Fault("evaluate.prompts", f"none with model.task = {task!r}", got, "only causal models write")


def column_faults(recipe: Recipe) -> Iterator[Fault]:
    task, columns = recipe.model.task, recipe.data.fields
    if task == "classification" and "output" in columns and "label" not in columns:
        expected = "the column of the class, with model.task = 'classification'"
        yield Fault("data.fields.label", expected, "nothing", f"write label = {columns['output']!r} in place of output")
    if task == "causal" and "label" in columns:
        hint = 'map output, or set model.task = "classification"'
        yield Fault("data.fields.label", "no entry with model.task = 'causal'", display(columns["label"]), hint)


def source_faults(recipe: Recipe) -> Iterator[Fault]:
    source = recipe.data.source
    if not names_files(source):
        yield Fault("data.source", "at least one file, folder or hub name, none of them empty", display(source))


def test_data_faults(recipe: Recipe) -> Iterator[Fault]:
    test = recipe.data.test
    if test is not None and not names_files(test):
        hint = "leave it out for held-out rows"
        yield Fault("data.test", "at least one file, none of them empty", display(test), hint)


def names_files(files: str | Sequence[str]) -> bool:
    return bool(files) and "" not in ((files,) if isinstance(files, str) else files)


def base_faults(recipe: Recipe) -> Iterator[Fault]:
    if not recipe.model.base:
        yield Fault("model.base", "a folder, a hub name or embedded", "an empty text")
    if recipe.model.digest is not None and not re.fullmatch("[0-9a-f]{64}", recipe.model.digest):
        expected, hint = "64 digits of a SHA-256 (0-9, a-f)", "fedtune plan RECIPE --pin writes it"
        yield Fault("model.digest", expected, display(recipe.model.digest), hint)


def torch_device_faults(recipe: Recipe) -> Iterator[Fault]:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", recipe.model.device):
        yield Fault("model.device", "auto, cpu, cuda, cuda:<number> or mps", display(recipe.model.device))


def quantised_base_faults(recipe: Recipe) -> Iterator[Fault]:
    """Refuse what a base in 4 or 8 bits cannot do: be pruned, or rewritten; and a key that only such a base reads."""
    model, dtype = recipe.model, display(recipe.model.dtype)
    if quantised_format(model.dtype) is None:
        if model.unquantised != "float32":
            hint = f"write dtype = {quote(model.unquantised)} for a base that is all in that format"
            yield Fault("model.unquantised", f"nothing with model.dtype = {dtype}", display(model.unquantised), hint)
        return
    if recipe.pruning is not None:
        expected = "a base that is not quantised, beside [pruning]: columns taken out of codes leave blocks of others"
        yield Fault("model.dtype", expected, dtype, 'set dtype = "bfloat16", or leave [pruning] out')
    others = sorted({*getattr(recipe.planner, "base_dtypes", ())} - {model.dtype})
    if others:
        expected = f"no other format with model.dtype = {dtype}, whose codes are all that a client holds"
        yield Fault("planner.base_dtypes", expected, display(others[0]), 'set model.dtype = "bfloat16"')
    # Every other bank rewrites weights by steps far below those between codes.
    if method_type_of(recipe).task is ProbeSeeds and (bank := getattr(recipe.method, "bank", "kron")) != "kron":
        expected = f"'kron' with model.dtype = {dtype}, whose changes stand beside the codes"
        yield Fault("method.bank", expected, display(bank), 'or set model.dtype = "bfloat16"')


def target_faults(recipe: Recipe) -> Iterator[Fault]:
    targets, in_full = recipe.adapter.targets, recipe.adapter.modules_to_save
    if not targets:
        yield Fault("adapter.targets", "at least one module", "an empty list", 'targets = ["all-linear"] takes all')
    yield from layers_faults(recipe.adapter.layers)
    for module in sorted(set(targets) & set(in_full)):
        expected, hint = "modules that are not targets as well", "keep it in one list"
        yield Fault("adapter.modules_to_save", expected, display(module), hint)


def pooling_faults(recipe: Recipe) -> Iterator[Fault]:
    if recipe.model.pooling != "auto" and recipe.model.task != "classification":
        hint = 'set model.task = "classification", or leave it out'
        yield Fault("model.pooling", "auto without classes", display(recipe.model.pooling), hint)


def head_faults(recipe: Recipe) -> Iterator[Fault]:
    """Refuse a head from class sums where there are no classes, another head already, or no round after it."""
    adapter = recipe.adapter
    if adapter.head == "drawn":
        return
    got = display(adapter.head)
    if recipe.model.task != "classification":
        yield Fault("adapter.head", "drawn without classes", got, 'set model.task = "classification", or leave it out')
    if adapter.start is not None:
        expected = "drawn with adapter.start, which brings the head that the run trains on"
        yield Fault("adapter.head", expected, got, "leave one of them out")
    if recipe.rounds.count < 2:
        expected = f"at least 2 with adapter.head = {got}, whose first round trains nothing"
        yield Fault("rounds.count", expected, str(recipe.rounds.count))


READ_BY_SEED_METHODS = ("steps", "epochs", "batch", "learning_rate")
"""Keys of the table `client` that steps along seeds have as well."""
IDLE: Mapping[str, Any] = {
    field.name: field.default for field in fields(Training) if field.name not in READ_BY_SEED_METHODS
}
"""The others, with their defaults."""


def seed_method_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield what a recipe asks for that steps along seeds do not have."""
    method = method_type_of(recipe)
    if method.task is not ProbeSeeds:
        return
    hint = f"{method.name!r} only measures losses, and trains nothing that this key acts on; leave it out"
    if recipe.descend is not None:
        hint = "clients that descend read the table descend: steps, learning_rate, batch and accumulation; leave it out"
    for key, default in IDLE.items():
        value = getattr(recipe.client, key)
        if value != default and (key, value) != ("autocast", "off"):
            yield Fault(f"client.{key}", display(default), display(value), hint)
    for place, override in enumerate(recipe.override):
        for key in sorted(override.training.keys() - {*READ_BY_SEED_METHODS}):
            expected = "batch, learning_rate, steps or epochs"
            yield Fault(f"override.{place}.{key}", expected, key, f"with {method.name!r}")
        if override.rank is not None:
            yield Fault(f"override.{place}.rank", "nothing", str(override.rank), f"{method.name!r} trains no adapter")


def measured_rate_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield where a learning rate is left to a first round that this method has not."""
    if (method := method_type_of(recipe)).task is ProbeSeeds:
        return
    rates: dict[str, Any] = {"client": recipe.client.learning_rate}
    rates |= {f"override.{n}": one.training.get("learning_rate") for n, one in enumerate(recipe.override)}
    for place, rate in rates.items():
        if rate == "auto":
            hint = "only FedKSeed's first round measures it; leave it out, or give a number"
            yield Fault(f"{place}.learning_rate", f"a number with {quote(method.name)}", '"auto"', hint)


def method_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield what the method itself says of its settings, given the steps of a round of each kind of client."""
    method, overrides = method_type_of(recipe), [override.training for override in recipe.override]
    steps = [recipe.client.steps, *(o.get("steps") for o in overrides if o.keys() & {"steps", "epochs"})]
    # Where all descend, no steps of probing limit what the method may be set to.
    yield from method.faults(recipe.method, [] if requested_verbs(recipe) == {"descend"} else steps)
    counts = [count for count in steps if count is not None]
    if method.task is ProbeSeeds and any(count > MAX_STEPS for count in counts):
        yield Fault("client.steps", f"at most {MAX_STEPS} scalars a round", str(max(counts)))


OPTIMIZER_READERS: Mapping[str, Sequence[str]] = {
    "momentum": ("fedavgm",),
    "beta1": ("fedadam", "fedyogi"),
    "beta2": ("fedadam", "fedyogi"),
    "tau": ("fedadam", "fedyogi"),
}
"""The server optimisers that read a key."""


def server_optimizer_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield the keys of a server optimiser that the rule it names does not read."""
    if not isinstance(recipe.method, LinearSettings):
        return
    optimizer, usual = recipe.method.server_optimizer, ServerOptimizer()
    for key, readers in OPTIMIZER_READERS.items():
        value = getattr(optimizer, key)
        if optimizer.name not in readers and value != getattr(usual, key):
            expected = f"nothing with {optimizer.name!r}, which does not read it"
            yield Fault(f"method.server_optimizer.{key}", expected, display(value), f"it is of {join_words(readers)}")


ROBUST_READERS: Mapping[str, Sequence[str]] = {"bound": ("clip",), "attackers": ("trimmed", "multikrum")}
"""The robust rules that read a key."""


def robust_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield the keys of a robust rule that it does not read, and too few clients for it."""
    if not isinstance(recipe.method, LinearSettings) or recipe.method.robust == RobustRule():
        return
    rule, usual = recipe.method.robust, RobustRule()
    if not isinstance(method := method_type_of(recipe), LinearMethod):
        expected = "a LinearMethod, of which the rule can take the mean's place"
        yield Fault("method.robust", expected, f"{quote(method.name)}, which aggregates by itself", "leave it out")
    for key, readers in ROBUST_READERS.items():
        value = getattr(rule, key)
        if rule.name not in readers and value != getattr(usual, key):
            expected = f"nothing with {rule.name!r}, which does not read it"
            yield Fault(f"method.robust.{key}", expected, display(value), f"it is of {join_words(readers)}")
    if recipe.rounds.min_clients < (least := least_clients(rule)):
        # Checked here: a round with fewer would stop the run after its clients have trained.
        share = f" and attackers = {rule.attackers:g}" if rule.name in ROBUST_READERS["attackers"] else ""
        expected = f"at least {least} with method.robust = {rule.name!r}{share}"
        hint = f"set rounds.min_clients = {least}, or use the rule 'clip', which needs no number"
        yield Fault("rounds.min_clients", expected, str(recipe.rounds.min_clients), hint)


def object_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield the Python objects that an engine's worker processes would need and cannot be given."""
    names = [name for name, value in vars(recipe.objects).items() if value is not None]
    alone = {"processes": [name for name in names if name in ("model", "trainer")], "ray": names}.get(
        recipe.engine.name, []
    )
    if alone:
        got = f"{quote(recipe.engine.name)} with {join_words(f'{name}=' for name in alone)}"
        hint = "worker processes load by name what a Python object gives to this process alone"
        yield Fault("engine.name", '"inprocess" with Python objects', got, hint)


def batched_clients_faults(recipe: Recipe) -> Iterator[Fault]:
    """Refuse to train several clients in one forward pass where their training is more than that."""
    if recipe.engine.batch_clients in ("auto", 1):
        return
    engine = {
        "engine.name": (recipe.engine.name != "inprocess", quote(recipe.engine.name)),
        "model.processes": (recipe.model.processes > 1, str(recipe.model.processes)),
        "method.name": (method_type_of(recipe).task is not TrainLora, quote(recipe.method.name)),
    }
    reasons = {path: got for path, (there, got) in engine.items() if there} | dict(training_apart(recipe))
    for path, got in reasons.items():
        expected = "clients one after the other (1, or auto) beside " + path
        hint = "leave engine.batch_clients at auto, or train plain adapters in process"
        yield Fault("engine.batch_clients", expected, f"{recipe.engine.batch_clients} with {got}", hint)


def training_apart(recipe: Recipe) -> Mapping[str, str]:
    """Return the settings, with their values, because of which each client's training needs a forward pass of its own.

    As `client.batched.why_alone` has it for an assignment.
    """
    reasons = {
        "client.dropout": (recipe.client.dropout > 0, f"{recipe.client.dropout:g}"),
        "client.gradient_checkpointing": (recipe.client.gradient_checkpointing, "true"),
        "client.packing": (recipe.client.packing, "true"),
        "client.proximal": (recipe.client.proximal > 0, f"{recipe.client.proximal:g}"),
        "client.objective": (recipe.client.objective != "likelihood", quote(recipe.client.objective)),
        "client.trainer": (names_trainer(recipe), "one"),
        "pruning": (recipe.pruning is not None, "that table"),
        "personal": (recipe.personal is not None and recipe.personal.has_state, "that table"),
    }
    return {path: got for path, (there, got) in reasons.items() if there}


def shared_work_faults(recipe: Recipe) -> Iterator[Fault]:
    """Refuse several processes per client where something else divides the devices, or no step could be divided."""
    if recipe.model.processes == 1:
        return
    reasons = {
        "engine.name": (recipe.engine.name != "inprocess", quote(recipe.engine.name)),
        "method.name": (method_type_of(recipe).task is not TrainLora, quote(recipe.method.name)),
        "pruning": (recipe.pruning is not None, "that table"),
        "client.trainer": (names_trainer(recipe), "one"),
        "a model given as a Python object": (recipe.objects.model is not None, "one"),
    }
    for path, (there, got) in reasons.items():
        if there:
            hint = "leave it out, or train plain adapters in process on a base that every process can load by name"
            yield Fault("model.processes", f"1 beside {path}", f"{recipe.model.processes} with {got}", hint)


RULES: Sequence[Rule] = (
    base_faults,
    torch_device_faults,
    quantised_base_faults,
    target_faults,
    trainer_faults,
    adapter_kind_faults,
    pooling_faults,
    head_faults,
    rank_faults,
    training_length_faults,
    momentum_faults,
    seed_method_faults,
    measured_rate_faults,
    override_verb_faults,
    descend_table_faults,
    client_steps_faults,
    probing_key_faults,
    scalar_bits_faults,
    accumulator_faults,
    method_faults,
    pruning_faults,
    personal_faults,
    server_optimizer_faults,
    robust_faults,
    planner_key_faults,
    arm_faults,
    planner_method_faults,
    expgrad_faults,
    fedpipe_faults,
    fleet_table_faults,
    cohort_faults,
    early_end_faults,
    trigger_faults,
    buffer_faults,
    overlap_faults,
    schedule_faults,
    selection_faults,
    fleet_size_faults,
    split_faults,
    match_faults,
    selected_client_faults,
    source_faults,
    test_data_faults,
    template_faults,
    column_faults,
    causal_only_faults,
    preference_faults,
    start_faults,
    object_faults,
    batched_clients_faults,
    shared_work_faults,
    search_faults,
)
