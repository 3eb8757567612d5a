"""What an accepted recipe permits a coordinator to ask of a site, and where an order asks for something else.

The permitted order is made by the functions that servers use: the recipe's planner says what it may choose,
and the recipe's method assigns from a state of zeros. An order adds only what follows from the server's state; these
fields are in `order_rules.FREE`, with their bounds. Every other one must be equal, also one that a later release adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

from fedtune.config.order_rules import FREE, Comparison, Difference, Rule, numbers_text, short_text
from fedtune.config.personal_requests import personal_request
from fedtune.config.plugins import BROKEN
from fedtune.config.recipe import (
    Recipe,
    largest_rank,
    method_of,
    method_type_of,
    planned_training,
    planner_type_of,
    possible_verbs,
    probing_training,
    requested_arm,
    verb_request,
)
from fedtune.errors import FedtuneError, ShapeError
from fedtune.messages import (
    Assignment,
    Blueprint,
    Personal,
    Plan,
    PlannedClient,
    ProbeSeeds,
    ScoreRequest,
    TailRank,
    Task,
    Training,
    TrainLora,
)
from fedtune.methods import class_head
from fedtune.methods.fedkseed_state import FedKSeedState
from fedtune.methods.personal import with_personal
from fedtune.model.settings import AdapterSettings
from fedtune.planning.expgrad import with_arm
from fedtune.planning.planner import PlanChoices, lora_scale, optimizer_steps, steps_of_share
from fedtune.planning.verbs import DESCENDING
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import BlockLayout
from fedtune.rounds.schedule import Schedule, rate_text, scheduled_training
from fedtune.wire.codec import decode_outline, encode_assignment
from fedtune.wire.profile import ClientProfile, ModelSpec

RESULTS: Mapping[type[Any], str] = {TrainLora: "adapter", ProbeSeeds: "seeds"}
"""Folder of a run's result, by what its clients do."""
WIDEST = 4096
"""Largest rank where a site's layers are not known yet, as before it has loaded its base."""


@dataclass(frozen=True)
class Permitted:
    """What a recipe permits to be asked of one client in a round."""

    rounds: int
    training: Training
    """With `steps` set."""
    choices: PlanChoices
    largest_rank: int
    pruned: bool
    """Whether the recipe has the table `pruning`."""

    def rank(self, rank: int) -> bool:
        return rank in self.choices.ranks if self.choices.ranks is not None else 1 <= rank <= self.largest_rank

    def ratio(self, ratio: float) -> bool:
        if ratio == 0 or not self.pruned:
            return ratio == 0
        return self.choices.ratios is None or ratio in self.choices.ratios

    def steps(self, steps: int) -> bool:
        most = self.training.steps or 0
        if self.choices.fewer_steps:
            return 1 <= steps <= most
        return steps in {most, *(steps_of_share(most, share) for share in self.choices.shares)}

    def splits(self, training: Training) -> bool:
        """Return whether a step may see the same number of examples in such batches."""
        same = training.batch * training.accumulation == self.training.batch * self.training.accumulation
        return self.choices.splits_batches and same and training.batch <= self.training.batch

    @property
    def rank_text(self) -> str:
        """The ranks in words."""
        if self.choices.ranks is None:
            return f"1 to {self.largest_rank}"
        return ", ".join(map(str, sorted(set(self.choices.ranks))))

    @property
    def ratio_text(self) -> str:
        """The pruning ratios in words."""
        if not self.pruned:
            return "0"
        if self.choices.ratios is None:
            return "0 to 0.875"
        return ", ".join(f"{ratio:g}" for ratio in sorted({0.0, *self.choices.ratios}))


def with_target(choices: PlanChoices, pruning: PruningSettings | None) -> PlanChoices:
    """Return a planner's choices with the ratio that is deployed, which clients are trained at in the end."""
    if pruning is None or choices.ratios is None:
        return choices
    return replace(choices, ratios=(*choices.ratios, pruning.target))


def permission(recipe: Recipe, client: str, num_examples: int, task: type[Task] | None = None) -> Permitted:
    """Return what a recipe permits to be asked of a client that holds so many training examples.

    Where the client may be asked to descend or to probe, the training is that of the task; None: as its plan says.
    """
    rank, training = planned_training(recipe, client)
    if task is ProbeSeeds:
        training = probing_training(recipe, client) or training
    kind, arm = planner_type_of(recipe), requested_arm(recipe, client)
    choices = kind.choices(recipe.planner, rank, arm.ratio)
    # What the recipe itself asks of the client, by `planner` or an override.
    choices = replace(
        choices,
        tops=(*choices.tops, arm.top) if arm.top < 1.0 else choices.tops,
        backs=(*choices.backs, arm.back) if arm.back > 0.0 else choices.backs,
    )
    return Permitted(
        rounds=recipe.rounds.count,
        training=replace(training, steps=optimizer_steps(training, num_examples), epochs=None),
        choices=with_target(choices, recipe.pruning),
        largest_rank=largest_rank(recipe),
        pruned=recipe.pruning is not None,
    )


def order_differences(recipe: Recipe, profile: ClientProfile, order: Assignment) -> Sequence[Difference]:
    """Return what of an order is not as the recipe says: all fields, each held against the order that it permits.

    Args:
        recipe: that the site has accepted.
        profile: of the site, as it says hello.
        order: its tensors may be outlines.
    """
    allowed = permission(recipe, profile.client, profile.num_examples, type(order.task))
    if not 1 <= order.round <= allowed.rounds:
        return [Difference("round", f"1 to {allowed.rounds}", order.round)]
    try:
        expected = permitted_order(recipe, allowed, profile, order)
    except (FedtuneError, *BROKEN) as error:  # a method of another package may fail with anything
        return [Difference("method", f"an order of {recipe.method.name!r} that can be made here", error)]
    return [*differences(Comparison(recipe, profile, allowed, expected, order), expected, order, "")]


def permitted_order(recipe: Recipe, allowed: Permitted, profile: ClientProfile, order: Assignment) -> Assignment:
    """Return the permitted order that is nearest to one that came: of its round, with its rank and steps if it may.

    Raises:
        FedtuneError: if the method makes none, or a rank is larger than every layer.
    """
    # Without the server's optimiser, which changes no order.
    method = with_personal(method_type_of(recipe), recipe.personal)
    widest = max((max(shape) for shape in profile.foundation.modules.values()), default=WIDEST)
    if (rank := allowed.largest_rank) > max(64, widest):
        # Before a layer of that size is made: a recipe must not decide how much memory a site takes to refuse it.
        raise ShapeError(f"adapter.rank: expected at most {widest}, as a layer here is wide; got {rank}")
    # Small, and of no base: what the method takes from the blueprint's layers is in the blobs, which have bounds.
    size = max(8, allowed.largest_rank)
    blueprint = Blueprint(
        modules={"layer": (size, size)},
        saved={},
        max_rank=allowed.largest_rank,
        seed=recipe.seed,
        anatomy=BlockLayout("llama", (), size) if recipe.pruning else None,
        pruning=recipe.pruning,
        verbs=possible_verbs(recipe),
    )
    if method.task is ProbeSeeds:
        # How many numbers there are follows from the tensors that are moved.
        model = profile.foundation
        blueprint = replace(blueprint, modules=model.modules, saved=model.saved, manifest=model.manifest)
    state = replace(method.init(blueprint, recipe.method), round=order.round - 1)
    if isinstance(state, FedKSeedState) and recipe.adapter.head == "lda" and order.round > 1:
        # Of any values: that there is one says that the round before has trained nothing.
        state = replace(state, head=profile.foundation.saved)
    planned = with_permitted_verb(recipe, PlannedClient(permitted_plan(recipe, allowed, profile.client, order)), order)
    planned = with_probing_steps(planned, profile.num_examples, recipe, order)
    assign = method.assign
    if recipe.adapter.head == "lda" and order.round == 1:
        assign = partial(class_head.assign, method.name)
    assignment = assign(state, recipe.seed, planned)
    assignment = replace(assignment, base=recipe.model.digest or profile.foundation.base)
    # Through the codec, as the order came: not all of a setting travels, and some of it rounded.
    return decode_outline(encode_assignment(assignment).header)


def with_permitted_verb(recipe: Recipe, planned: PlannedClient, order: Assignment) -> PlannedClient:
    """Return a planned client with what it may be asked to do: with `auto` also to probe alone."""
    request = verb_request(recipe, planned.plan.client)
    # A client whose memory does not allow more is planned to probe before it is asked.
    verb = "probe" if request.verb == "auto" and isinstance(order.task, ProbeSeeds) else request.verb
    return replace(planned, verb=verb, probing=request.probing)


def with_probing_steps(planned: PlannedClient, num_examples: int, recipe: Recipe, order: Assignment) -> PlannedClient:
    """Return a planned client with the steps, and the rate of its round, by which it would probe."""
    if planned.probing is None:
        return planned
    steps = optimizer_steps(planned.probing, num_examples)
    probing = scheduled_training(replace(planned.probing, steps=steps, epochs=None), recipe.rounds, order)
    return replace(planned, probing=probing)


def permitted_plan(recipe: Recipe, allowed: Permitted, client: str, order: Assignment) -> Plan:
    """Return the permitted plan that is nearest to an order's; of ratio 0, since the first state has no ranking."""
    asked, ranks = order.plan, sorted(allowed.choices.ranks or range(1, allowed.largest_rank + 1))
    # A client that cuts its rank is asked for what it has left, at the scale of the rank that was planned.
    cuts = isinstance(order.task, TrainLora) and any(isinstance(term, TailRank) for term in order.task.terms)
    wider = [rank for rank in ranks if rank == asked.rank or (cuts and rank > asked.rank)]
    scales = {rank: lora_scale(rank, recipe.adapter.alpha, rslora=recipe.adapter.rslora) for rank in ranks}
    rank = next((one for one in wider if scales[one] == asked.scale), wider[0] if wider else ranks[-1])
    steps = asked.training.steps or 0
    training = replace(allowed.training, steps=steps) if allowed.steps(steps) else allowed.training
    training = nearest_arm(recipe, training, allowed.choices, order)
    if allowed.splits(asked.training):
        training = replace(training, batch=asked.training.batch, accumulation=asked.training.accumulation)
    return Plan(
        client=client,
        rank=rank,
        scale=scales[rank],
        training=scheduled_training(training, recipe.rounds, order),
    )


def nearest_arm(recipe: Recipe, training: Training, choices: PlanChoices, order: Assignment) -> Training:
    """Return how a client trains with the values of the arm that an order has; with those of the first if it has none.

    Without arms the training stays as it is.
    """
    arms = [with_arm(training, arm) for arm in choices.trainings]
    asked = order.plan.training
    return next((arm for arm in arms if scheduled_training(arm, recipe.rounds, order) == asked), [*arms, training][0])


def first_order(recipe: Recipe, client: str, num_examples: int) -> Assignment:
    """Return the first order at the full learning rate that a recipe permits, for a client of so many examples.

    Raises:
        FedtuneError: if the recipe's method makes none.
    """
    allowed = permission(recipe, client, num_examples)
    plan = Plan(client, min(allowed.choices.ranks or (1,)), 1.0, allowed.training)
    trains = 2 if recipe.adapter.head == "lda" else 1  # the first round in which a client does
    asked = Assignment(recipe.method.name, max(trains, recipe.rounds.warmup + 1), 0, plan, TrainLora(a_key=0))
    return permitted_order(recipe, allowed, ClientProfile(client, num_examples, ModelSpec("", {})), asked)


def permission_texts(recipe: Recipe, client: str) -> Mapping[str, str]:
    """Return in plain words what a recipe permits to be asked of a client; anything else is vetoed."""
    allowed = permission(recipe, client, 1)
    asked, (_, stated) = verb_request(recipe, client), planned_training(recipe, client)
    descends = asked.verb in DESCENDING
    work = f"{work_text(stated, allowed.choices, recipe.rounds)}{' of the size of its weights' * descends}"
    if asked.verb == "auto" and asked.probing is not None:
        work += f"; or, where its memory is too small, {work_text(asked.probing, allowed.choices, recipe.rounds)}"
    settings, probe = recipe.evaluate, method_of(recipe).task is ProbeSeeds
    rows = "all of its" if settings.client_examples is None else f"at most {settings.client_examples}"
    whole = ", ".join(recipe.adapter.modules_to_save) or "nothing"
    if recipe.adapter.kind != "lora":
        whole = virtual_text(recipe.adapter)
    texts = {
        "rounds": f"1 to {allowed.rounds}",
        "work": work,
        "ranks": "none" if probe or recipe.adapter.kind != "lora" else allowed.rank_text,
        "pruning": allowed.ratio_text,
        "whole": "none" if probe else whole,
        "scores": f"of {rows} held-out rows, after each evaluation" if settings.clients else "never",
    }
    if recipe.personal is not None:
        texts["own model"] = own_text(recipe.personal.in_full())
    if recipe.adapter.head == "lda":
        texts["head"] = "in round 1, how many examples of each class it has, and the sums of their features"
    texts |= {} if probe else arm_texts(allowed.choices)
    if probe:
        return {**texts, "bytes": numbers_sent(recipe)} if descends else texts
    if recipe.adapter.kind != "lora":
        return {**texts, "bytes": "the virtual tokens in fp32, and nothing else of the model"}
    return {**texts, "bytes": f"the factors in {number_format(recipe)}; those in full in fp32"}


def virtual_text(adapter: AdapterSettings) -> str:
    """Return in plain words what of virtual tokens trains and is sent."""
    what = {
        "prefix": "their keys and values in every layer",
        "prompt": "their embeddings",
        "p-tuning": "their embeddings" if adapter.send == "embeddings" else "the encoder of their embeddings",
    }
    return f"{adapter.tokens} virtual tokens ({adapter.kind}): {what[adapter.kind]}"


def own_text(personal: Personal) -> str:
    """Return in plain words what of a client's own model stays, and what leaves it."""
    if not personal.has_state:
        return "trained from the global model before a score, and then dropped; only its scores leave"
    stays = f"what {', '.join(personal.keep)} name" if personal.keep else "all of it"
    return f"{personal.kind}: {stays} stays in this site's folder of the run; its scores and 8 bytes of a digest leave"


def work_text(training: Training, choices: PlanChoices, schedule: Schedule) -> str:
    """Return in plain words how much a client may be asked to do in a round."""
    size, limit = training.batch * training.accumulation, "at most " * choices.fewer_steps
    if choices.shares:
        limit = f"{', '.join(f'{share:g}' for share in sorted(choices.shares))} or all of "
    steps = f"{training.steps} steps of {size} examples"
    if training.steps is None:
        steps = f"{training.epochs:g} passes over its examples, {size} in a step"
    return f"{limit}{steps}, at the rate {rate_text(training.learning_rate, schedule)}"


def numbers_sent(recipe: Recipe) -> str:
    """Return in plain words what leaves a client that descends in each round."""
    seeds, groups, bits = (getattr(recipe.method, name) for name in ("seeds", "groups", "scalar_bits"))
    many = f"{seeds:,} for each tensor that is tuned" if groups == "tensor" else f"{seeds * groups:,}"
    return f"numbers of {bits} bits, {many}: its whole change of the weights, projected on as many directions"


def arm_texts(choices: PlanChoices) -> Mapping[str, str]:
    """Return in plain words what a planner may choose beside ranks and ratios; nothing where it trains all alike."""
    modules = "any of these ranks for each module, or none" if choices.module_ranks else ""
    if choices.tops and not modules:
        modules = f"all, or those of a share of the blocks, from the top: {numbers_text(choices.tops)}"
    texts = {
        "modules": modules,
        "backward": f"all, or without a share of {numbers_text(choices.backs)}" if choices.backs else "",
        "batches": "as the recipe says, or smaller ones for the same step" if choices.splits_batches else "",
        "measures": f"of modules, by {', '.join(sorted(choices.importance))}" if choices.importance else "",
        "base": f"as model.dtype, or {', '.join(sorted(choices.base_dtypes))}" if choices.base_dtypes else "",
        "view": " or ".join(["whole", *sorted(set(choices.views) - {"whole"})]) if choices.views else "",
        "training": training_text(choices.trainings),
    }
    return {name: text for name, text in texts.items() if text}


def training_text(arms: Sequence[Mapping[str, Any]]) -> str:
    """Return in plain words with which values a planner may ask a client to train in place of those of `client`."""
    values: dict[str, list[float]] = {}
    for arm in arms:
        for key, value in arm.items():
            values.setdefault(key, []).append(value)
    return "; ".join(f"client.{key} {numbers_text(numbers)}" for key, numbers in values.items())


def number_format(recipe: Recipe) -> str:
    """Return in which number format a recipe's factors leave a client."""
    return str(getattr(recipe.method, "wire_dtype", "fp32"))


def score_differences(recipe: Recipe, profile: ClientProfile, request: ScoreRequest) -> Sequence[Difference]:
    """Return what of a request for scores is not as the recipe says; arguments as of `order_differences`."""
    allowed, settings = permission(recipe, profile.client, profile.num_examples), recipe.evaluate
    if not settings.clients:
        return [Difference("evaluate.clients", "no request for scores", "one")]
    if request.round > allowed.rounds:
        return [Difference("round", f"0 to {allowed.rounds}", request.round)]
    expected = ScoreRequest(
        client=profile.client,
        method=recipe.method.name,
        round=request.round,
        base=recipe.model.digest or profile.foundation.base,
        batch=settings.batch,
        examples=settings.client_examples or 0,
        preference=recipe.client.preference,
        personal=personal_request(recipe, profile.client, profile.num_examples, request.round),
    )
    return [*differences(Comparison(recipe, profile, allowed, expected, request), expected, request, "")]


def result_differences(recipe: Recipe, round: int, names: Sequence[str]) -> Sequence[Difference]:
    """Return what of the order that brings the run's result is not as the recipe says."""
    folder, folders = RESULTS[method_of(recipe).task], {name.partition("/")[0] for name in names}
    differing = [] if folders == {folder} else [Difference("result", f"files of {folder}/", ", ".join(sorted(folders)))]
    # A run may end before its last round, by rounds.patience.
    if not 1 <= round <= recipe.rounds.count:
        differing.append(Difference("round", f"1 to {recipe.rounds.count}", round))
    return differing


def differences(comparison: Comparison, expected: Any, got: Any, path: str) -> Iterator[Difference]:
    """Yield the fields of a message that differ from the permitted one and are not free within their bounds."""
    for field in fields(expected):
        name, rule = f"{type(expected).__name__}.{field.name}", f"{path}{field.name}"
        wanted, came = getattr(expected, field.name), getattr(got, field.name)
        if name in FREE:
            yield from free_difference(FREE[name], comparison, rule, came)
        elif is_dataclass(wanted) and type(wanted) is type(came):
            yield from differences(comparison, wanted, came, f"{rule}.")
        elif wanted != came:
            yield Difference(rule, *two_texts(wanted, came))


def free_difference(rule: Rule, comparison: Comparison, key: str, came: object) -> Iterator[Difference]:
    """Yield the difference of a free field that is out of its bounds."""
    if expected := rule(comparison):
        yield Difference(key, expected, came)


def two_texts(wanted: object, came: object) -> tuple[str, object]:
    """Return two values in words that fit a line; of two tasks of different kinds only which they are."""
    if is_dataclass(wanted) or is_dataclass(came):
        return type(wanted).__name__, type(came).__name__
    return short_text(wanted), came
