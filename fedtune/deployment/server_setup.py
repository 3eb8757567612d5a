"""A run on a server that holds no model: shapes and digests come from the profiles of the clients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import date
from functools import partial

from fedtune.config import Recipe, bind_for_sites
from fedtune.config.personal_requests import personal_request
from fedtune.config.recipe import largest_rank, method_of, possible_verbs
from fedtune.devices.measured_clock import MeasuredClock
from fedtune.errors import ConfigError, Fault
from fedtune.flower.grid_transport import GridTransport
from fedtune.lora.adapter import pack
from fedtune.messages import Blueprint, ProbeSeeds, ScoreRequest, Traffic
from fedtune.methods.method import GlobalModel
from fedtune.model.settings import same_everywhere
from fedtune.pruning.structure import ModelStructure
from fedtune.rounds.probe import CheckIns, Prober
from fedtune.rounds.scores import pooled_scores
from fedtune.rounds.site_scores import ask_scores
from fedtune.runs.base_checks import check_kept, check_kind, check_layers, check_pruning, check_ranks
from fedtune.runs.context import Door, ModelScores, RunContext
from fedtune.runs.fleet import fleet_of
from fedtune.runs.start import check_start_base, first_round, start_adapter, start_state
from fedtune.store import peft
from fedtune.store.pruning import read_moments, read_ranking
from fedtune.store.run_journal import RunJournal


def data_at_sites(source: str, *, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a TOML text or a path; its table `data` needs no source, since the data stay at the sites.

    Raises:
        ConfigError: with every fault.
    """
    # Every site has data of its own; a table in the recipe could only be wrong for some of them.
    bound = bind_for_sites(source, overrides=overrides)
    return replace(bound, model=same_everywhere(bound.model))


def with_day(recipe: Recipe) -> Recipe:
    """Return a recipe that names the day of its run, today's if it names none: chat templates at the sites write it."""
    if recipe.model.task != "causal" or recipe.data.date:  # whether a template does is known at the sites alone
        return recipe
    return replace(recipe, data=replace(recipe.data, date=date.today().isoformat()))


def expected_clients(recipe: Recipe) -> int:
    """Return how many clients the first round waits for: its cohort where that is a number."""
    cohort = recipe.rounds.cohort
    return max(recipe.rounds.min_clients, cohort if isinstance(cohort, int) else 0)


def server_context(
    recipe: Recipe,
    transport: GridTransport,
    *,
    door: Door,
    note: Callable[[str], None] = lambda text: None,
    on_journal: Callable[[RunJournal], None] = lambda journal: None,
) -> RunContext:
    """Return the context of a run whose model is described by what the clients have in common."""
    common, profiles = transport.foundation, transport.profiles
    # In the run's own recipe from now on: a resumed run takes no other base.
    recipe = with_day(replace(recipe, model=replace(recipe.model, digest=common.base)))
    check_ranks(recipe, common.modules)
    check_kind(recipe, common.saved)
    check_layers(recipe, common.modules)
    if method_of(recipe).task is ProbeSeeds and not common.manifest:
        expected = f"clients whose base {recipe.method.name!r} can move: finite, in float32, float16 or bfloat16"
        raise ConfigError(Fault("model.base", expected, "another, by what most of them say"))
    blueprint = Blueprint(
        common.modules,
        common.saved,
        max_rank=largest_rank(recipe),
        seed=recipe.seed,
        manifest=common.manifest if method_of(recipe).task is ProbeSeeds else b"",
        anatomy=common.anatomy,
        pruning=recipe.pruning,
        verbs=possible_verbs(recipe),
        classes=len(common.labels) if recipe.adapter.head == "lda" else 0,
    )
    if recipe.pruning is not None and common.anatomy is None:
        raise ConfigError(
            Fault("pruning", "a base that surgery knows", "another, by what most clients say", "leave it out")
        )
    if recipe.pruning is not None and recipe.pruning.ranking and common.anatomy is not None:
        file = recipe.pruning.ranking
        blueprint = replace(
            blueprint,
            ranking=read_ranking(file, recipe.root, common.anatomy, common.base),
            moments=read_moments(file, recipe.root, recipe.pruning, common.anatomy, common.base),
        )
    if recipe.personal is not None and recipe.personal.has_state and door == "flower":
        expected = "kind = 'finetune', or `fedtune serve`: a SuperNode has no folder of a run for a client's own model"
        raise ConfigError(Fault("personal.kind", expected, repr(recipe.personal.kind)))
    if recipe.planner.name == "oracle":
        hint = "it needs the times of a simulated clock, which no deployment has; take planner = 'deadline'"
        raise ConfigError(Fault("planner", "another in a deployment", "'oracle'", hint))
    # A recipe's fleet is of simulated devices, and these clients are real ones.
    devices = fleet_of(replace(recipe, fleet=None), list(profiles), blueprint, parameters=common.parameters)
    check_pruning(blueprint)
    check_kept(recipe, blueprint)
    # A base that the method cannot use is refused now, and not in the first round.
    start = start_adapter(recipe)
    check_start_base(start, common.base)
    start_state(recipe, blueprint)
    first_round(recipe, blueprint, common.labels)
    return RunContext(
        expected=devices.planned_costs,
        recipe=recipe,
        blueprint=blueprint,
        planner=devices.planner(blueprint),
        clock=MeasuredClock(),
        prober=Prober(CheckIns()) if getattr(recipe.planner, "probe", False) else None,
        base={"name": recipe.model.base, "digest": common.base, "parameters": common.parameters},
        target=peft.Target(
            base=recipe.model.base,
            revision=recipe.model.revision,
            task=recipe.model.task,
            fan_in_fan_out=common.transposed,
            saved_modules=common.saved_modules,
        ),
        fleet={name: profile.num_examples for name, profile in profiles.items()},
        machine={"engine": door},
        start=start.digest if start else "",
        notes=[start.remark] if start and start.remark else [],
        labels=common.labels,
        sent_labels=transport.labels,
        sent_date=recipe.data.date or "",
        score=partial(score_at_sites, recipe, transport, base=common.base, note=once(note)),
        door=door,
        on_journal=on_journal,
    )


def once(note: Callable[[str], None]) -> Callable[[str], None]:
    """Return a `note` that says each sentence once: that a site keeps its scores is no news after the next round."""
    said = set[str]()

    def say(text: str) -> None:
        if text not in said:
            said.add(text)
            note(text)

    return say


def score_at_sites(
    recipe: Recipe,
    transport: GridTransport,
    tuned: GlobalModel,
    *,
    base: str,
    note: Callable[[str], None],
    test: bool,
    clients: bool,
    round: int = 0,
    structure: ModelStructure | None = None,
) -> ModelScores:
    """Have every connected client score a global model on the rows that it holds out, and pool what they say.

    The server has no test data: what all clients hold out stands in for them, as in a simulation without any. A model
    that is pruned for some clients is scored whole.
    """
    settings, held_out = recipe.evaluate, transport.held_out()
    if not (test or clients) or not settings.clients or not held_out:
        return ModelScores()
    blobs = {"global": pack(tuned.adapter)} if tuned.adapter else {}
    blobs |= {"saved": tuned.saved} if tuned.saved else {}
    seeds = tuned.seeds
    blobs |= {"saved": seeds.head} if seeds and seeds.head else {}
    requests = {
        name: ScoreRequest(
            client=name,
            method=recipe.method.name,
            round=round,
            base=base,
            batch=settings.batch,
            examples=settings.client_examples or 0,
            blobs=blobs,
            ledger=seeds.ledger.encode() if seeds else b"",
            trainable=tuple(seeds.trainable) if seeds else (),
            labels=tuple(transport.labels),
            date=recipe.data.date or "",
            preference=recipe.client.preference,
            personal=personal_request(recipe, name, transport.profiles[name].num_examples, round),
        )
        for name in held_out
    }
    said = ask_scores(transport, requests, held_out=held_out, rule=recipe.rounds.rule, note=note)
    travelled = said.traffic.values()
    traffic = Traffic(down=sum(one.down for one in travelled), up=sum(one.up for one in travelled))
    return ModelScores(
        test=pooled_scores(said.scores) or None,
        held_out=said.scores,
        personal=said.personal,
        traffic=traffic,
        unsolicited=said.unsolicited,
    )


def check_overrides(recipe: Recipe, clients: Collection[str], note: Callable[[str], None]) -> None:
    """Note which overrides cover no client that is here: it may still come, or the name is mistyped."""
    known = f"{', '.join(sorted(clients)[:8])}{', ...' * (len(clients) > 8)}"
    for override in recipe.override:
        if not any(override.covers(name) for name in clients):
            note(f"override.clients: {list(override.clients)} match none of the clients that are here ({known})")
