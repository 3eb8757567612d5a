"""What a run will ask of its clients before it begins: memory by part, seconds, bytes, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

from fedtune.config import Recipe, planned_training
from fedtune.config.checks import check
from fedtune.config.recipe import method_of, requested_arm, verb_request
from fedtune.devices.cost import Body, round_flops
from fedtune.devices.memory import Footprint, Memory, memory
from fedtune.errors import FedtuneError
from fedtune.messages import Blueprint, Client, Plan, PlannedClient, ProbeSeeds, Training, Verb
from fedtune.methods.fedkseed_state import FedKSeedSettings
from fedtune.planning.fixed import FixedSettings
from fedtune.planning.planner import with_verb
from fedtune.planning.policy import Arm
from fedtune.pruning.depth import module_ranks
from fedtune.rounds.context import RoundContext
from fedtune.rounds.loop import RoundResult
from fedtune.rounds.schedule import cohort_size
from fedtune.runs.fleet import Fleet
from fedtune.runs.rehearsal import LARGEST, Rehearsal, grows, rehearse
from fedtune.runs.seed_bytes import measuring_bytes_up, seed_bytes

NETWORK_MBPS = 10.0
"""Bandwidth both ways where no device is simulated; assumed."""
REHEARSED = 5
"""Rounds that are rehearsed, unless they soon repeat; those after them are taken to be like the last one."""
GROWING = 40
"""Rounds that are rehearsed at most, where the global change still grows from one to the next."""
HALVINGS = 6


@dataclass(frozen=True)
class ClientBill:
    """What a round asks of one client."""

    client: str
    device: str
    """The kind of device that it is simulated on; empty for this machine, or one that is not known."""
    examples: int
    rank: int | None
    """None of virtual tokens."""
    ratio: float
    batch: int
    longest: int
    """Tokens of its longest example, or `data.max_tokens` where its texts are not here."""
    memory: Memory
    has_gb: float | None
    """None where its machine is not known."""
    compute_s: float | None
    """None without a device or a calibration."""
    down_s: float
    up_s: float
    bytes_down: int
    """In the last round that was rehearsed."""
    bytes_up: int
    nearest: str = ""
    """Where it does not fit, the settings nearest to the recipe's that do."""
    verb: Verb | None = None
    """What it does, where clients of the method may differ in it: with `auto` as its memory allows."""

    @property
    def fits(self) -> bool:
        return self.has_gb is None or self.memory.total <= self.has_gb * 1e9

    @property
    def group(self) -> tuple[Any, ...]:
        """What clients that are like it have in common."""
        return self.device, self.rank, self.ratio, self.batch, self.verb


@dataclass(frozen=True)
class Bill:
    """What a run will take, before it begins."""

    clients: Sequence[ClientBill]
    rounds: int
    cohort: int
    by_round: Sequence[tuple[int, int]]
    """Bytes (down, up) of all clients together, by rehearsed round."""
    exact: bool
    """Whether the bytes are those of the messages that a run encodes: not where a planner learns what it asks for, and
    where the global change still grows after the last round that was rehearsed."""
    at_most: bool
    """Whether exact bytes are an upper bound: codes go up deflated, and some ranks follow from what is learned."""
    round_s: float | None
    """Seconds of a round, on average: of its slowest client; None where they are not known."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """What this machine was calibrated with; see `calibration`."""
    buffer: int | None = None
    """Updates that end an asynchronous round at least, where `cohort` clients work; None: it waits for its cohort."""

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes (down, up) of the whole run: rounds after the rehearsed ones are like the last."""
        last = [self.by_round[-1]] * (self.rounds - len(self.by_round)) if self.by_round else []
        every = [*self.by_round[: self.rounds], *last]
        return sum(down for down, _ in every), sum(up for _, up in every)

    @property
    def seconds(self) -> float | None:
        return None if self.round_s is None else self.round_s * self.rounds

    @property
    def too_large(self) -> Sequence[ClientBill]:
        """The clients whose work does not fit."""
        return [client for client in self.clients if not client.fits]

    @property
    def kind_of_bytes(self) -> Literal["exact", "at most", "estimated"]:
        """Return what the bytes are of a run's."""
        return "estimated" if not self.exact else "at most" if self.at_most else "exact"

    def as_json(self) -> Mapping[str, Any]:
        """Return everything as numbers under names."""
        return {
            "clients": {
                bill.client: {
                    "device": bill.device,
                    "examples": bill.examples,
                    "rank": bill.rank,
                    "ratio": bill.ratio,
                    "batch": bill.batch,
                    "longest_tokens": bill.longest,
                    "memory_bytes": {**bill.memory.by_part(), "total": bill.memory.total},
                    "has_bytes": None if bill.has_gb is None else bill.has_gb * 1e9,
                    "fits": bill.fits,
                    "nearest": bill.nearest,
                    "compute_s": bill.compute_s,
                    "down_s": bill.down_s,
                    "up_s": bill.up_s,
                    "bytes_down": bill.bytes_down,
                    "bytes_up": bill.bytes_up,
                    **({"verb": bill.verb} if bill.verb else {}),
                }
                for bill in self.clients
            },
            "rounds": self.rounds,
            "cohort": self.cohort,
            "bytes_by_round": [{"down": down, "up": up} for down, up in self.by_round],
            "bytes": dict(zip(("down", "up"), self.traffic, strict=True)),
            "bytes_are": self.kind_of_bytes,
            "round_s": self.round_s,
            "seconds": self.seconds,
            **({"measured": dict(self.measured)} if self.measured else {}),
            **({"buffer": self.buffer} if self.buffer is not None else {}),
        }


def bill_of(
    fleet: Fleet,
    blueprint: Blueprint,
    examples: Mapping[str, int],
    *,
    labels: Sequence[str] = (),
    memory_gb: float | None = None,
    calibration: tuple[float, float] | None = None,
) -> Bill:
    """Return what a run will take.

    Args:
        fleet: the devices of the clients, and their costs; of a base with a cost model.
        blueprint: of the base.
        examples: by client.
        labels: class names that are sent to the clients.
        memory_gb: of the machines of clients that are not simulated; None: not known.
        calibration: of them, where it was measured: seconds of a step beside its operations, and for 1e12 of these.
    """
    recipe = fleet.recipe
    cohort, buffer = cohort_size(len(examples), recipe.rounds.cohort), None
    if recipe.asynchronous is not None:
        cohort = recipe.asynchronous.working(len(examples), recipe.rounds)
        buffer = min(recipe.asynchronous.goal(recipe.rounds.min_clients), len(examples))
    results, last = rehearsal_of(fleet, blueprint, examples, labels=labels)
    if results:
        by_round = [(sum(t.down for t in r.traffic.values()), sum(t.up for t in r.traffic.values())) for r in results]
    else:
        both = [estimated_bytes(fleet, blueprint, name, count, memory_gb) for name, count in examples.items()]
        # As many orders leave in an asynchronous round as updates come in.
        answers = cohort if buffer is None else buffer
        down, up = (round(sum(part) * answers / len(both)) for part in zip(*both, strict=True))
        first = first_bytes_up(recipe, examples)
        by_round = [(down, up)] if first is None else [(down, round(first * answers / len(both))), (down, up)]
        by_round = by_round[: recipe.rounds.count]
    clients = [
        client_bill(
            fleet, name, count, usual_bytes(fleet, blueprint, name, count, last, memory_gb), memory_gb, calibration
        )
        for name, count in examples.items()
    ]
    simulated = [r.clock_s for r in results if r.clock_s]
    slowest = [bill.compute_s + bill.down_s + bill.up_s for bill in clients if bill.compute_s is not None]
    round_s = simulated[-1] / len(results) if simulated else max(slowest, default=None)
    wire = method_of(recipe).wire_dtype(recipe.method)
    return Bill(
        clients=clients,
        rounds=recipe.rounds.count,
        cohort=cohort,
        by_round=by_round,
        exact=method_of(recipe).task is ProbeSeeds
        or (
            bool(results)
            and isinstance(recipe.planner, FixedSettings)
            # Which clients fill a buffer changes from round to round.
            and (len(results) >= recipe.rounds.count or (buffer is None and not grows(results)))
        ),
        # The residual of fedex has the rank that the clients' data give it, and a random one the largest.
        at_most=wire in ("int8", "int4") or recipe.method.name in ("fedkseed", "fedex", "hetlora"),
        round_s=round_s,
        buffer=buffer,
    )


def rehearsal_of(
    fleet: Fleet, blueprint: Blueprint, examples: Mapping[str, int], *, labels: Sequence[str]
) -> tuple[Sequence[RoundResult], Mapping[str, tuple[int, int]]]:
    """Return the rehearsed rounds and each client's bytes (down, up) in its last one; none where that is too much.

    Not of seeds, whose checks are over every number of the base, and of masks that clients choose by their data.
    """
    recipe = fleet.recipe
    numbers = sum(m + n for m, n in blueprint.modules.values()) * blueprint.max_rank
    cohort = cohort_size(len(examples), recipe.rounds.cohort)
    chosen = recipe.pruning is not None and recipe.pruning.policy != "nested"
    if method_of(recipe).task is ProbeSeeds or chosen or numbers * (cohort + 4) > LARGEST or recipe.adapter.start:
        return (), {}

    def tokens(client: str, training: Training, rank: int) -> tuple[float, float]:
        work = fleet.work(client, training, rank)
        return work.trained_tokens, work.side_tokens

    transport = Rehearsal(blueprint, [Client(name, count) for name, count in examples.items()], tokens)
    context = RoundContext(
        method=method_of(recipe),
        settings=recipe.method,
        planner=fleet.planner(blueprint),
        transport=transport,
        schedule=recipe.rounds,
        blueprint=blueprint,
        base="0" * 64,
        labels=tuple(labels),
        date=recipe.data.date or "" if labels else "",
        clock=fleet.clock(),
        asynchronous=recipe.asynchronous,
    )
    most = REHEARSED if recipe.asynchronous is None else GROWING
    try:
        results = rehearse(context, most=min(recipe.rounds.count, most), growing=min(recipe.rounds.count, GROWING))
    except FedtuneError:  # such as a cohort of which no client fits: what follows says so with numbers
        return (), {}
    last = {name: (t.down, t.up) for result in results for name, t in result.traffic.items() if t.up}
    return results, last


def usual_bytes(
    fleet: Fleet,
    blueprint: Blueprint,
    client: str,
    examples: int,
    last: Mapping[str, tuple[int, int]],
    memory_gb: float | None,
) -> tuple[int, int]:
    """Return a client's bytes (down, up) of a round: its own, or those of another that the recipe asks the same."""
    own, asked = last.get(client), requested_arm(fleet.recipe, client)
    for name, traffic in last.items() if own is None else ():
        if requested_arm(fleet.recipe, name) == asked:
            own = traffic
    if own is None:
        return estimated_bytes(fleet, blueprint, client, examples, memory_gb)
    factor = fleet.traffic_factor(asked.ratio, asked.rank, asked.down_rank)
    return round(own[0] * factor), round(own[1] * factor)


def estimated_bytes(
    fleet: Fleet, blueprint: Blueprint, client: str, examples: int, memory_gb: float | None
) -> tuple[int, int]:
    """Return about the bytes (down, up) of a client's round, from the numbers that travel; of seeds at most those."""
    recipe = fleet.recipe
    if isinstance(recipe.method, FedKSeedSettings):
        profile = fleet.profiles.get(client)
        verb, training = fleet.verb(client, examples, profile.memory_gb if profile else memory_gb)
        plan = Plan(client, 1, 1.0, training)
        request = replace(verb_request(recipe, client), verb=verb)
        planned = with_verb(PlannedClient(plan), request, Client(client, examples))
        return seed_bytes(recipe.method, blueprint, planned, rounds=recipe.rounds.count, examples=examples)
    down, up = fleet.traffic(requested_arm(recipe, client))
    return round(down), round(up)


def first_bytes_up(recipe: Recipe, examples: Mapping[str, int]) -> int | None:
    """Return the bytes up of all clients in a first round that measures their learning rate; None in other runs."""
    requests = [verb_request(recipe, name).probing for name in examples]
    if isinstance(recipe.method, FedKSeedSettings) and any(r and r.learning_rate == "auto" for r in requests):
        return sum(measuring_bytes_up(recipe.method, name, count) for name, count in examples.items())
    return None


def client_bill(
    fleet: Fleet,
    client: str,
    examples: int,
    traffic: tuple[int, int],
    memory_gb: float | None,
    calibration: tuple[float, float] | None,
) -> ClientBill:
    """Return what a round asks of a client whose planner leaves its work as the recipe has it."""
    recipe, profile = fleet.recipe, fleet.profiles.get(client)
    rank, training = with_steps(recipe, client, examples)
    arm = requested_arm(recipe, client) if isinstance(recipe.planner, FixedSettings) else Arm(0.0, rank)
    has, verb = profile.memory_gb if profile else memory_gb, None
    if isinstance(recipe.method, FedKSeedSettings):
        verb, training = fleet.verb(client, examples, has)
    footprint = fleet.footprint(client, arm, training, verb)
    need = memory(fleet.charged, recipe.pruning, footprint)
    work = fleet.work(client, training, rank, arm.down_rank)
    flops = round_flops(fleet.charged, recipe.pruning, arm.ratio, rank, work, fleet.training_of(arm))
    if isinstance(recipe.method, FedKSeedSettings):
        flops = fleet.seed_flops(recipe.method, client, verb, training)
    down, up = traffic
    latency, compute_s = profile.latency_s if profile else 0.05, None
    if profile:
        compute_s = flops / 1e12 / (profile.tflops * profile.mean_mode) + profile.overhead_s
    elif calibration:
        step_s, s_per_tflop = calibration
        compute_s = step_s * work.steps * work.passes + flops / 1e12 * s_per_tflop
    bill = ClientBill(
        client=client,
        device=profile.name if profile else "",
        examples=examples,
        rank=rank if recipe.adapter.kind == "lora" else None,
        ratio=arm.ratio,
        batch=training.batch,
        longest=round(footprint.longest),
        memory=need,
        has_gb=has,
        compute_s=compute_s,
        down_s=down * 8e-6 / (profile.down_mbps if profile else NETWORK_MBPS) + latency,
        up_s=up * 8e-6 / (profile.up_mbps if profile else NETWORK_MBPS) + latency,
        bytes_down=down,
        bytes_up=up,
        verb=verb,
    )
    return bill if bill.fits else replace(bill, nearest=nearest(fleet, recipe, footprint, has or 0.0, training))


def with_steps(recipe: Recipe, client: str, examples: int) -> tuple[int, Training]:
    """Return a client's rank and training, with epochs turned into steps."""
    rank, training = planned_training(recipe, client)
    if training.steps is None:
        seen = training.batch * training.accumulation
        training = replace(training, steps=max(1, round((training.epochs or 0) * examples / seen)), epochs=None)
    return rank, training


def nearest(fleet: Fleet, recipe: Recipe, footprint: Footprint, has_gb: float, training: Training) -> str:
    """Return the settings nearest to a recipe's with which a client's work fits, in the words of a recipe.

    Of all combinations the least painful: batches that are divided change no result, checkpointing costs a third of the
    time, quantised bases little quality, fewer blocks and ranks some, shorter texts data, pruning the most.
    """
    fitting = []
    for pain, changed, words in alternatives(recipe, footprint, training, fleet.charged):
        need = memory(fleet.charged, recipe.pruning, changed).total
        if words and need <= has_gb * 1e9:
            fitting.append((pain, need, f"{', '.join(words)} ({need / 1e9:.3g} GB)"))
    return min(fitting, default=(0.0, 0.0, "nothing that fedtune offers fits"))[2]


@dataclass(frozen=True)
class Step:
    """One setting that takes less memory, or none."""

    pain: float = 0.0
    words: str = ""
    """As in a recipe; empty: nothing changes."""
    parts: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the footprint that change."""


def alternatives(
    recipe: Recipe, footprint: Footprint, training: Training, body: Body
) -> Iterator[tuple[float, Footprint, Sequence[str]]]:
    """Yield (how painful it is, what memory then depends on, the settings in words) of every combination.

    Only of settings that the recipe may have: what its rules refuse beside the rest of it is no advice.
    """
    kinds = (
        batches(recipe, footprint, training),
        checkpoints(recipe, footprint),
        formats(recipe, footprint),
        tops(recipe, footprint, body),
        lengths(recipe, footprint),
        ratios(recipe, footprint),
    )
    for steps in product(*([Step(), *kind] for kind in kinds)):
        changes = {name: value for step in steps for name, value in step.parts.items()}
        yield sum(step.pain for step in steps), replace(footprint, **changes), [s.words for s in steps if s.words]


def allows(recipe: Recipe, table: str, **values: Any) -> bool:
    """Return whether the rules of recipes allow other values in a table, as far as they allow the recipe itself."""
    own = getattr(recipe, table)
    changed = replace(recipe, **{table: replace(own, **values)})
    return set(check(changed)) <= set(check(recipe))


def batches(recipe: Recipe, footprint: Footprint, training: Training) -> Iterator[Step]:
    """Yield smaller batches, with more of them for each step of the optimizer."""
    rows = footprint.rows
    halved = [(0.5 * k, rows >> k) for k in range(1, HALVINGS) if rows >> k and rows % 2**k == 0]
    for pain, batch in [*halved, *([(2.5, 1)] if rows % 2 and rows > 1 else [])]:
        times = training.accumulation * rows // batch
        table = "descend" if footprint.descends and recipe.descend is not None else "client"
        if allows(recipe, table, batch=batch, accumulation=times):
            yield Step(pain, f"{table}.batch = {batch} with {table}.accumulation = {times}", {"rows": batch})


def checkpoints(recipe: Recipe, footprint: Footprint) -> Iterator[Step]:
    able = not (footprint.forward_only or footprint.descends or footprint.checkpointing)
    if able and allows(recipe, "client", gradient_checkpointing=True):
        yield Step(1.5, "client.gradient_checkpointing = true", {"checkpointing": True})


def formats(recipe: Recipe, footprint: Footprint) -> Iterator[Step]:
    """Yield number formats of the base with fewer bits."""
    for pain, dtype in ((2.2, "int8"), (3.0, "nf4")):
        if not footprint.base_dtype and allows(recipe, "model", dtype=dtype):
            yield Step(pain, f'model.dtype = "{dtype}"', {"base_dtype": dtype})


def tops(recipe: Recipe, footprint: Footprint, body: Body) -> Iterator[Step]:
    """Yield fewer blocks, from the top, whose modules are trained."""
    names = sorted(body.modules)
    if footprint.forward_only or footprint.descends or not isinstance(recipe.planner, FixedSettings):
        return
    for pain, top in ((3.0, 0.5), (4.0, 0.25)):
        wanted = dict(zip(names, module_ranks(names, body.layout, 1, top) or [1] * len(names), strict=True))
        ranks = {name: rank for name, rank in footprint.ranks.items() if wanted.get(name)}
        if len(ranks) < len(footprint.ranks) and allows(recipe, "planner", top=top):
            yield Step(pain, f"planner.top = {top:g}", {"ranks": ranks})


def lengths(recipe: Recipe, footprint: Footprint) -> Iterator[Step]:
    """Yield shorter texts."""
    for k in range(1, 4):
        longest = int(footprint.longest) >> k
        if longest >= 16 and allows(recipe, "data", max_tokens=longest):
            parts = {"longest": float(longest), "mean": min(footprint.mean, float(longest))}
            yield Step(4.0 * k, f"data.max_tokens = {longest}", parts)


def ratios(recipe: Recipe, footprint: Footprint) -> Iterator[Step]:
    """Yield pruning ratios of a device that holds only what is left of the base."""
    if recipe.pruning is None or footprint.whole or not isinstance(recipe.planner, FixedSettings):
        return
    for ratio in (0.25, 0.5, 0.75):
        if ratio > footprint.ratio and allows(recipe, "planner", ratio=ratio):
            yield Step(5.0 + 4 * ratio, f"planner.ratio = {ratio:g}", {"ratio": ratio})
