"""The interface of a planner, which chooses what each client of a round does, and what it is created from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, sqrt
from typing import Any, Literal, Protocol, TypeAlias

from fedtune.messages import BaseDtype, Client, Failure, ImportanceName, Plan, PlannedClient, Training, View
from fedtune.planning.policy import Arm, Candidate
from fedtune.planning.verbs import Misfit, VerbRequest, fits_everywhere, no_request
from fedtune.pruning.depth import module_ranks
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import BlockLayout


@dataclass(frozen=True)
class ClientObservation:
    """What a planner learns of one client's round; all of it is in the round's line of rounds.jsonl."""

    client: str
    num_examples: int
    ratio: float
    rank: int
    status: str = "ok"
    """`ok`, or the kind of failure."""
    out_of_memory: bool = False
    """Whether it failed because memory ran out."""
    compute_s: float | None = None
    transfer_s: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    importance: float | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    module_importance: tuple[float, ...] = ()
    """Of the modules that it trained, in sorted order; () where it was not asked for."""
    batch: int | None = None
    """Examples per forward pass, where the planner chose others than the recipe's."""
    arm: int | None = None
    """Index of the arm that the planner drew, where it draws settings of training."""
    arm_probability: float = 1.0
    """With which it drew that."""
    steps: int | None = None
    """Optimizer steps that were asked for."""
    top: float = 1.0
    """This and the next two as the planner chose them; see `messages.PlannedClient`."""
    share: float = 1.0
    down_rank: int | None = None
    ranks: tuple[int, ...] = ()
    """By module; left out where `top` says it."""
    back: float = 0.0
    base_dtype: BaseDtype = ""
    view: View = "whole"
    whole_loss_before: float | None = None
    whole_loss_after: float | None = None
    probed_s_per_tflop: float | None = None
    """Its own measurement of its speed before the round; None where it was not asked, or did not say."""
    probed_s_per_mb: float | None = None
    peak_bytes: int | None = None
    """Most memory that the work took, as the client says; None of one whose update is not used."""


class Planner(Protocol):
    """Chooses pruning ratio, rank, batch and steps of each client of a round, and learns from the outcome.

    What it has learned is a value that follows from the rounds so far: after a crash it is computed again from the
    lines of these rounds.
    """

    def start(self) -> Any:
        """Return what is known before the first round."""
        ...

    def plan(self, learned: Any, round: int, cohort: Sequence[Client]) -> Mapping[str, PlannedClient | Failure]:
        """Return one plan per client of the cohort, by name, or a failure of the kind `unfit` if none is feasible."""
        ...

    def observe(self, learned: Any, seen: Sequence[ClientObservation]) -> Any:
        """Return what is known after a round."""
        ...


@dataclass(frozen=True)
class Cost:
    """What one arm costs one client in one round."""

    tflop: float
    megabytes: float
    memory_gb: float
    memory_parts: Mapping[str, float] = field(default_factory=dict)
    """GB by what takes them, where it is asked for."""


Costs: TypeAlias = Callable[[str, Arm, Training], Cost]
"""(client, arm, how it trains) -> its cost, from the sizes of the base and of the client's texts."""


@dataclass(frozen=True)
class Speed:
    """What is known of a client's device before its first round."""

    memory_gb: float | None = None
    """Usable; None where it is not known."""
    s_per_tflop: float | None = None
    s_per_mb: float | None = None
    overhead_s: float = 0.0
    kind: str = ""
    """Name of the device's profile."""


def fits(client: Client, arm: Arm, training: Training) -> str:
    """Return no objection, as where no device's memory is known."""
    return ""


def counted_megabytes(seen: ClientObservation) -> float:
    return (seen.bytes_down + seen.bytes_up) / 1e6


@dataclass(frozen=True)
class PlannerInputs:
    """What a planner is created from, beside its settings."""

    seed: int
    rounds: int
    """Rounds of the run."""
    training: Callable[[str], tuple[int, Training]]
    """client -> its LoRA rank and how it trains, as the recipe and its overrides say"""
    alpha: float | Literal["2r"] = "2r"
    """Numerator of the LoRA scale, `adapter.alpha`."""
    rslora: bool = False
    """Whether the scale is alpha / sqrt(rank)."""
    ratio: Callable[[str], float] = lambda client: 0.0
    """client -> its pruning ratio, as the recipe and its overrides say"""
    arm: Callable[[str], Arm] = lambda client: Arm(0.0, 1)
    """client -> its arm, as the recipe and its overrides say; of steps they say the number and no share"""
    pruning: PruningSettings | None = None
    ranking: bool = False
    """Whether heads and channels are ranked from the start: else no client can be pruned in the first round."""
    base: str = ""
    """The base, as the recipe names it."""
    layout: BlockLayout | None = None
    """Of the base's blocks, where its family is known."""
    modules: Collection[str] = ()
    """Names of the modules that are adapted."""
    partial: bool = False
    """Whether the method takes updates that leave modules out."""
    selective: bool = False
    """Whether backward passes can leave out a part of the base's blocks."""
    costs: Costs | None = None
    """None where the base is of a family for which there is no cost model."""
    traffic: Callable[[ClientObservation], float] = counted_megabytes
    """Megabytes of a client's round, down and up; where a larger model stands in, what that would have taken."""
    speeds: Mapping[str, Speed] = field(default_factory=dict)
    """By client, where a device's profile is known."""
    misfit: Callable[[Client, Arm, Training], str] = fits
    """(client, arm, how it trains) -> why that does not fit its device; empty if it does, or is not known"""
    server_s: float = 0.0
    """Seconds of a round in which the server works, in a simulation."""
    true_seconds: Callable[[int, Candidate, Sequence[Arm]], Sequence[float]] | None = None
    """(round, client, arms) -> seconds of every arm, as simulated: for the oracle."""
    module_shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """(out, in) of every module that gets an adapter."""
    costs_by_format: Callable[[str, Arm, Training, BaseDtype], Cost] | None = None
    """As `costs`, over a frozen base of a number format, with the parts of its memory."""
    kind: Callable[[str], object] = lambda client: client
    """client -> what its costs depend on: those of equal kind cost the same"""
    memory_gb: Callable[[Client], float | None] = lambda client: None
    """client -> GB that a model may use on its device; None where it is not known"""
    verb: Callable[[str], VerbRequest] = no_request
    """client -> what it does, where clients of the method may differ in it"""
    misfit_descending: Misfit = fits_everywhere
    """(client, how it descends) -> why that does not fit its device; empty if it does, or is not known"""

    def plan(
        self, client: Client, *, rank: int | None = None, steps: int | None = None, ratio: float = 0.0
    ) -> PlannedClient:
        """Return a plan for a client as the recipe trains it, with another rank or other steps where they are given."""
        recipe_rank, training = self.training(client.name)
        chosen = recipe_rank if rank is None else rank
        steps = optimizer_steps(training, client.num_examples) if steps is None else steps
        plan = Plan(
            client=client.name,
            rank=chosen,
            scale=lora_scale(chosen, self.alpha, rslora=self.rslora),
            training=replace(training, steps=steps, epochs=None),
            ratio=ratio,
        )
        return with_verb(PlannedClient(plan), self.verb(client.name), client)


def with_verb(planned: PlannedClient, request: VerbRequest, client: Client) -> PlannedClient:
    """Return the plan of a client with what it does, and how it would probe."""
    probing = request.probing
    if probing is not None:
        probing = replace(probing, steps=optimizer_steps(probing, client.num_examples), epochs=None)
    return replace(planned, verb=request.verb, probing=probing)


def plan_arm(
    client: str, arm: Arm, training: Training, *, scale: float, modules: Collection[str], layout: BlockLayout | None
) -> PlannedClient:
    """Return the plan of an arm.

    Args:
        client: its name.
        arm: what it is to do.
        training: as the recipe has it, with `steps` set, of which the arm may take a share.
        scale: of the arm's rank; see `lora_scale`.
        modules: names of those that get an adapter.
        layout: of the base's blocks; needed by an arm that trains the upper blocks alone.
    """
    assert training.steps is not None
    steps = training.steps if arm.share == 1.0 else steps_of_share(training.steps, arm.share)
    ranks: tuple[int, ...] = ()
    if arm.top < 1.0:
        assert layout is not None  # checked where the planner is created
        ranks = module_ranks(modules, layout, arm.rank, arm.top)
    plan = Plan(
        client=client,
        rank=arm.rank,
        scale=scale,
        training=replace(training, steps=steps),
        ratio=arm.ratio,
        ranks=ranks,
        back=arm.back,
    )
    return PlannedClient(plan, down_rank=arm.down_rank, top=arm.top, share=arm.share)


def lora_scale(rank: int, alpha: float | Literal["2r"], *, rslora: bool) -> float:
    """Return the LoRA scale of a rank: alpha / rank, or alpha / sqrt(rank)."""
    # One alpha for ranks from 4 to 64 would spread the scale sixteenfold; rsLoRA (arXiv 2312.03732) takes the root.
    numerator = 2.0 * rank if alpha == "2r" else alpha
    return numerator / (sqrt(rank) if rslora else rank)


def optimizer_steps(training: Training, num_examples: int) -> int:
    """Return the optimizer steps of one round: as given, or epochs over the client's examples, rounded up."""
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None  # config binds exactly one of the two
    # Never 0: a client with less than one batch trains as well.
    return max(1, ceil(training.epochs * num_examples / (training.batch * training.accumulation)))


def steps_of_share(steps: int, share: float) -> int:
    """Return a share of a round's steps: at least one."""
    return max(1, int(share * steps + 0.5))


def largest_of_recipe(settings: Any) -> int | None:
    return None


@dataclass(frozen=True)
class PlanChoices:
    """What a planner may choose for a client, whatever it learns: a site does nothing else under the recipe."""

    ranks: Collection[int] | None = None
    """None: up to the largest rank of the recipe."""
    ratios: Collection[float] | None = None
    """Beside 0, where the recipe has the table `pruning`; None: any."""
    fewer_steps: bool = False
    """Whether it may ask for any number of steps below the recipe's."""
    shares: Collection[float] = ()
    """Shares of the recipe's steps that it may ask for, beside 1."""
    splits_batches: bool = False
    """Whether it may ask for smaller batches than the recipe, and more of them for each step."""
    importance: Collection[ImportanceName] = ()
    """Scores of modules that it may ask for."""
    tops: Collection[float] = ()
    """Shares of the blocks, from the top, whose modules alone may be trained, beside 1."""
    module_ranks: bool = False
    """Whether the rank may be another for every module, none of them above the plan's."""
    backs: Collection[float] = ()
    """Shares that backward passes may leave out, beside 0."""
    base_dtypes: Collection[BaseDtype] = ()
    """Number formats of the frozen base, beside the recipe's own."""
    views: Collection[View] = ()
    """Models that an adapter may be trained for, beside the whole one."""
    trainings: Sequence[Mapping[str, Any]] = ()
    """Values of `client` that it may ask to train with, each by its keys; none: those of the recipe alone."""


def any_choice(settings: Any, rank: int, ratio: float) -> PlanChoices:
    """Return the choices of a planner that does not name its own: nothing above what the recipe says."""
    return PlanChoices(fewer_steps=True)


@dataclass(frozen=True)
class PlannerType:
    """A kind of planner, by the name that a recipe's table `planner` gives."""

    name: str
    settings: type[Any]
    """The frozen dataclass that the recipe's table `planner` is bound to."""
    create: Callable[[Any, PlannerInputs], Planner]
    """(settings, inputs) -> the planner"""
    # Needed before the first round: methods that pad factors keep this rank for the whole run.
    largest_rank: Callable[[Any], int | None] = largest_of_recipe
    """settings -> the largest rank it may plan; None: the largest of adapter.rank and the overrides"""
    choices: Callable[[Any, int, float], PlanChoices] = any_choice
    """(settings, a client's rank and ratio, as the recipe and its overrides say) -> what it may choose for it"""
