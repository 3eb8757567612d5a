"""The recipe: everything that one experiment is, bound and frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Protocol

from fedtune.config.plugins import find_method, find_planner
from fedtune.data.settings import DataSettings
from fedtune.errors import ConfigError, Fault
from fedtune.messages import OMIT_DEFAULT, Personal, ProbeSeeds, Training, Verb, VerbChoice
from fedtune.methods import with_settings
from fedtune.methods.method import Method
from fedtune.methods.personal import with_personal
from fedtune.model.settings import AdapterSettings, EvaluationSettings, ModelSettings
from fedtune.planning.fixed import FixedSettings
from fedtune.planning.planner import Planner, PlannerInputs, PlannerType
from fedtune.planning.policy import Arm
from fedtune.planning.verbs import DESCENDING, DescendSettings, VerbRequest
from fedtune.pruning.ranking import PruningSettings
from fedtune.rounds.asynchronous import AsyncSettings
from fedtune.rounds.schedule import Schedule
from fedtune.search.settings import SearchSettings
from fedtune.simulation.resources import Resources
from fedtune.simulation.settings import DeviceOverride, EngineSettings, FleetSettings
from fedtune.tracking.tracker import TrackerName


@dataclass(frozen=True)
class Override:
    """Settings that differ for some clients; one table `override` of the recipe."""

    clients: Sequence[str]
    """Names or globs (`*`, `?`, `[..]`); a client matches if one of them does."""
    rank: int | None = None
    """LoRA rank of these clients; none keeps `adapter.rank`."""
    ratio: float | None = None
    """Pruning ratio that the planner `fixed` gives these clients; none keeps `planner.ratio`."""
    top: float | None = field(default=None, metadata=OMIT_DEFAULT)
    """Share of the blocks, from the top, that these clients train, with `fixed`; none keeps `planner.top`."""
    back: float | None = field(default=None, metadata=OMIT_DEFAULT)
    """Share that the backward passes of these clients leave out, with `fixed`; none keeps `planner.back`."""
    down_rank: int | None = field(default=None, metadata=OMIT_DEFAULT)
    """Largest rank that these clients are sent, with `fixed`; none keeps `planner.down_rank`."""
    verb: VerbChoice | None = None
    """What these clients do: `probe`, `descend` or `auto`, as `method.verb` of fedkseed has it; none keeps that.
    `adapt`, to train a LoRA adapter, is what all clients of the other methods do."""
    descend: Mapping[str, Any] | None = field(default=None, metadata=OMIT_DEFAULT)
    """The keys of the table `descend` that change, by name; none keeps that table."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """The fields of `Training` that change, by name; `steps` replaces `epochs` and the other way round. With fedkseed
    they are those of probing, but for `batch`."""
    resources: Mapping[str, Any] = field(default_factory=dict)
    """The fields of `Resources` that change, by name."""

    def covers(self, client: str) -> bool:
        return any(fnmatchcase(client, glob) for glob in self.clients)


@dataclass(frozen=True)
class ReportSettings:
    """What is written beside the run's records, when the run ends; the recipe's table `report`."""

    plots: bool = True
    """Draw the page `report.html` and its figures at the end of `fedtune simulate` and `fedtune demo`. Without it,
    and in Python, the page is drawn when it is asked for, by `fedtune report` or `run.report`."""
    tensorboard: bool = False
    """Also write event files for TensorBoard (needs the extra `tensorboard`)."""
    trackers: tuple[TrackerName, ...] = field(default=(), metadata=OMIT_DEFAULT)
    """Send each round's numbers to these trackers as it ends: `tensorboard` (event files in the run directory),
    `mlflow`, `trackio`, `wandb`. Each needs its own package. Where they store is said by their own environment, such as
    `MLFLOW_TRACKING_URI`; without it, on this machine."""
    track_clients: bool = field(default=False, metadata=OMIT_DEFAULT)
    """Also send names and losses of single clients; without it the trackers learn numbers of whole rounds alone."""
    track_result: bool = field(default=False, metadata=OMIT_DEFAULT)
    """Also send the folder of the result, such as the adapter, when the run has finished."""


AT_SITES = "at the sites"
"""In a recipe's text, the source of data that never leave the clients of a federation."""
PYTHON: Literal["<python>"] = "<python>"
"""In a recipe's text, the name of what was given as a Python object; as `data.settings.PYTHON`."""


@dataclass(frozen=True)
class PythonPlanner:
    """The table `planner` of a run whose planner was given as a Python object."""

    name: Literal["<python>"] = PYTHON
    type: str = ""
    """Its class, by module and name: a resumed run must be given the same."""


@dataclass(frozen=True)
class Objects:
    """What Python code gives in place of names; see `fedtune.simulate`."""

    method: Method[Any] | None = None
    planner: Any | None = None
    """A `Planner`, or a function from `PlannerInputs` to one."""
    model: Any | None = None
    """A `Base`, or a transformers model and its tokenizer."""
    data: Any | None = None
    """Rows by client, a data set to divide, or a partitioner: what `data.given.given_rows` reads."""
    trainer: Any | None = None
    """A function that trains in place of fedtune, or by client such functions; see `client.own_trainer.Function`."""


class NamedSettings(Protocol):
    """The settings of a method or a planner: a frozen dataclass whose field `name` says of which."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Recipe:
    """One experiment; local files that existed when it was bound are absolute paths here."""

    name: str
    """Letters, digits, `.`, `_` and `-`: the run's folder is named after it."""
    model: ModelSettings
    adapter: AdapterSettings
    method: NamedSettings
    """An instance of the method's own settings dataclass."""
    client: Training
    rounds: Schedule
    data: DataSettings
    seed: int = 0
    """Seed of all randomness: the same recipe and seed give the same result, bit for bit, on one machine."""
    planner: NamedSettings = field(default_factory=FixedSettings)
    """An instance of the planner's own settings dataclass."""
    pruning: PruningSettings | None = None
    """None: every client trains the whole model."""
    asynchronous: AsyncSettings | None = field(default=None, metadata=OMIT_DEFAULT)
    """None: every round waits for its own cohort."""
    fleet: FleetSettings | None = None
    """None: no devices are simulated."""
    device: Sequence[DeviceOverride] = ()
    """What is different for some clients' devices, applied in order."""
    evaluate: EvaluationSettings = field(default_factory=EvaluationSettings)
    override: Sequence[Override] = ()
    """Applied in order: where two name the same client and key, the later one holds."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    descend: DescendSettings | None = field(default=None, metadata=OMIT_DEFAULT)
    """None: no client descends."""
    personal: Personal | None = field(default=None, metadata=OMIT_DEFAULT)
    """None: no client has a model of its own."""
    search: SearchSettings | None = field(default=None, metadata=OMIT_DEFAULT)
    """None: there is nothing to search for. `fedtune search` reads it, and nothing else does."""
    root: Path = field(default=Path(), compare=False)
    """Folder of the recipe's file; relative paths in it are relative to this."""
    objects: Objects = field(default=Objects(), compare=False)
    """Never part of the recipe's text."""


ARM_KEYS = ("top", "back", "down_rank")
"""Keys of `Override` and of the planner `fixed` that say what of the model a client trains, and what it is sent."""

SECTIONS: Mapping[str, type[Any]] = {
    "model": ModelSettings,
    "adapter": AdapterSettings,
    "client": Training,
    "descend": DescendSettings,
    "rounds": Schedule,
    "asynchronous": AsyncSettings,
    "data": DataSettings,
    "evaluate": EvaluationSettings,
    "pruning": PruningSettings,
    "personal": Personal,
    "fleet": FleetSettings,
    "engine": EngineSettings,
    "report": ReportSettings,
    "search": SearchSettings,
}
"""The tables of a recipe whose settings do not depend on a name in them."""


def requested_ratio(recipe: Recipe, client: str) -> float:
    """Return the pruning ratio that the planner `fixed` asks of one client, after all overrides that cover it."""
    ratio = recipe.planner.ratio if isinstance(recipe.planner, FixedSettings) else 0.0
    for override in recipe.override:
        if override.ratio is not None and override.covers(client):
            ratio = override.ratio
    return ratio


def requested_arm(recipe: Recipe, client: str) -> Arm:
    """Return the arm that the planner `fixed` gives one client, after all overrides that cover it."""
    planner, rank = recipe.planner, planned_training(recipe, client)[0]
    arm = Arm(requested_ratio(recipe, client), rank)
    if isinstance(planner, FixedSettings):
        arm = replace(arm, top=planner.top, back=planner.back, down_rank=planner.down_rank)
    for override in recipe.override:
        if override.covers(client):
            own = {key: getattr(override, key) for key in ARM_KEYS}
            arm = replace(arm, **{key: value for key, value in own.items() if value is not None})
    return arm


def planned_training(recipe: Recipe, client: str) -> tuple[int, Training]:
    """Return one client's rank and training after all overrides that cover it: of one that is to descend, that of it.

    See `probing_training` for how it would probe.
    """
    rank, training = recipe.adapter.rank, recipe.client
    for override in recipe.override:
        if override.covers(client):
            rank = rank if override.rank is None else override.rank
            training = with_changes(training, override.training)
    if requested_verb(recipe, client) in DESCENDING:
        return rank, descending_training(recipe, client, training)
    return rank, training


def descending_training(recipe: Recipe, client: str, probing: Training) -> Training:
    """Return how a client descends, which sees as many examples in a forward pass as where it probes."""
    settings = recipe.descend or DescendSettings()
    for override in recipe.override:
        if override.descend and override.covers(client):
            settings = replace(settings, **override.descend)
    return Training(
        batch=settings.batch or probing.batch,
        learning_rate=settings.learning_rate,
        steps=settings.steps,
        accumulation=settings.accumulation,
        autocast=probing.autocast,
    )


def probing_training(recipe: Recipe, client: str) -> Training | None:
    """Return how a client probes after all overrides that cover it; None where none of the run's clients does."""
    if not requested_verbs(recipe) & {"probe", "auto"}:
        return None
    training = recipe.client
    for override in recipe.override:
        if override.covers(client):
            training = with_changes(training, override.training)
    return training


def requested_verb(recipe: Recipe, client: str) -> VerbChoice:
    """Return what one client is asked to do, after all overrides that cover it."""
    verb = usual_verb(recipe)
    for override in recipe.override:
        if override.verb is not None and override.covers(client):
            verb = override.verb
    return verb


def requested_verbs(recipe: Recipe) -> set[VerbChoice]:
    """Return what clients may be asked to do, whichever clients there are."""
    verbs = {usual_verb(recipe)}
    for override in recipe.override:
        if override.verb is not None:
            verbs = {override.verb} if "*" in override.clients else verbs | {override.verb}
    return verbs


def possible_verbs(recipe: Recipe) -> tuple[Verb, ...]:
    """Return what clients may do in the end, sorted: with `auto` either."""
    asked = requested_verbs(recipe)
    either: set[Verb] = {"probe", "descend"} if "auto" in asked else set()
    return tuple(sorted(either.union(verb for verb in asked if verb != "auto")))


def usual_verb(recipe: Recipe) -> VerbChoice:
    """Return what the method asks of clients that no override names."""
    if method_type_of(recipe).task is not ProbeSeeds:
        return "adapt"
    # A method of another package that measures seeds need not have the key.
    verb: VerbChoice = getattr(recipe.method, "verb", "probe")
    return verb


def verb_request(recipe: Recipe, client: str) -> VerbRequest:
    """Return what a recipe asks of one client, for the planner."""
    if method_type_of(recipe).task is not ProbeSeeds:
        return VerbRequest()
    return VerbRequest(requested_verb(recipe, client), probing_training(recipe, client))


def resources(recipe: Recipe, client: str) -> Resources:
    """Return what one client takes of the machine after all overrides that cover it."""
    own = Resources(threads=recipe.model.threads)
    for override in recipe.override:
        if override.covers(client):
            own = replace(own, **override.resources)
    return own


def largest_rank(recipe: Recipe) -> int:
    """Return the largest rank that any client may be asked for, whichever clients take part."""
    if (largest := planner_type_of(recipe).largest_rank(recipe.planner)) is not None:
        return largest
    ranks = [recipe.adapter.rank]
    for override in recipe.override:
        if override.rank is not None:
            ranks = [override.rank] if "*" in override.clients else [*ranks, override.rank]
    return max(ranks)


def sized_adapter(recipe: Recipe) -> AdapterSettings:
    """Return the table `adapter` for all clients together: with the largest rank that any may be asked for.

    `all-linear` leaves out the layers that are too small for it, and must leave out the same ones for every client.
    """
    return replace(recipe.adapter, rank=largest_rank(recipe))


def trainer_of(recipe: Recipe, client: str) -> Any | None:
    """Return what trains a client's adapter in place of fedtune: a function, or the name of one; None: fedtune does."""
    given = recipe.objects.trainer
    if given is None:
        return planned_training(recipe, client)[1].trainer
    return given.get(client) if isinstance(given, Mapping) else given


def method_of(recipe: Recipe) -> Method[Any]:
    """Return the method of a recipe, with the server optimiser that it names.

    Raises:
        ConfigError: if no method of that name is installed.
    """
    # Within the optimiser: that moves nothing which stays with clients.
    return with_settings(with_personal(method_type_of(recipe), recipe.personal), recipe.method)


def method_type_of(recipe: Recipe) -> Method[Any]:
    """Return the method of a recipe's name, without regard to its settings.

    Raises:
        ConfigError: if no method of that name is installed.
    """
    return recipe.objects.method or find_method(recipe.method.name)


def planner_type_of(recipe: Recipe) -> PlannerType:
    """Return the kind of planner that a recipe names, which creates it.

    Raises:
        ConfigError: if no planner of that name is installed, or it was a Python object that is not given.
    """
    if recipe.planner.name != PYTHON:
        return find_planner(recipe.planner.name)
    planner = recipe.objects.planner
    if planner is None:
        return PYTHON_PLANNER
    return replace(PYTHON_PLANNER, create=lambda _, inputs: planner(inputs) if callable(planner) else planner)


def no_planner(settings: PythonPlanner, inputs: PlannerInputs) -> Planner:
    raise ConfigError(missing_object("planner", settings.type))


PYTHON_PLANNER = PlannerType(PYTHON, PythonPlanner, create=no_planner)
"""The kind of a planner that is not given again."""


def missing_object(argument: str, got: str = PYTHON) -> Fault:
    """Return the fault of a run that was started with a Python object and is loaded without it."""
    expected = "the Python object that the run was started with"
    return Fault(argument, expected, f"only its name, {got}", pass_again(argument))


def missing_plugin(table: str, name: str) -> Fault:
    """Return the fault of a run whose method or planner is loaded by its name, and is not installed."""
    hint = f"install the package that brings it; or, if it was a Python object, {pass_again(table)}"
    return Fault(table, f"the {table} that the run was started with", f"only its name, {name}", hint)


def pass_again(argument: str) -> str:
    return f"pass it again with fedtune.simulate(resume=..., {argument}=...), which alone takes Python objects"


def with_changes(training: Training, changes: Mapping[str, Any]) -> Training:
    """Return the training with some fields replaced; `steps` and `epochs` replace each other."""
    if "steps" in changes:
        training = replace(training, epochs=None)
    if "epochs" in changes:
        training = replace(training, steps=None)
    return replace(training, **changes)
