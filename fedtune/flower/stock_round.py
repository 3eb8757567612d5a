"""A round with clients that know nothing of fedtune: what each is sent as a PEFT state, and what its reply changes.

Everything that decides is elsewhere: what is sent and how updates are combined in `methods`, whose update is used in
`rounds`. Here stand only the two translations between their messages and a PEFT state of one scale alpha / rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedtune.errors import RoundError, WireError
from fedtune.flower.frozen_change import DIGEST
from fedtune.flower.peft_records import PeftState, from_record, only_array_record
from fedtune.flower.reply_metrics import examples_of, metrics_of
from fedtune.lora import dense, lowrank
from fedtune.lora.adapter import Adapter, Factors, draw_a, pack
from fedtune.lora.dense import Summed
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    Client,
    ClientUpdate,
    Failure,
    LoraResult,
    Plan,
    PlannedClient,
    Training,
)
from fedtune.methods.change import start_of
from fedtune.methods.method import Method
from fedtune.number_formats import from_wire
from fedtune.rounds.admission import admit
from fedtune.rounds.aggregation import aggregate
from fedtune.rounds.influence import Bounds, refuse_outliers
from fedtune.rounds.weights import public_weights
from fedtune.seeds import derive
from fedtune.tensors import DTYPES, Array, Tensors

ONE_STEP = Training(steps=1)
"""In plans, which name a training that stock clients do not read."""


@dataclass(frozen=True)
class Federation:
    """What all rounds of a strategy have in common."""

    method: Method[Any]
    blueprint: Blueprint
    prefix: str
    """Of names in the clients' records."""
    rank: int
    """Of the arrays that the run began with, in which the global model is returned."""
    alpha: Callable[[int], float]
    """A client's rank -> the lora_alpha of its LoraConfig."""
    use_rslora: bool = False
    """Whether PEFT divides it by the root of the rank, and not by the rank."""
    exact_changes: Callable[[Any], Mapping[str, Summed]] | None = None
    """state -> the global change by module, exact; None: it is no more than the factors of `method.adapter`."""
    sends_frozen: bool = False
    """Whether clients are sent a frozen change beside what they train."""
    norm_cap: float | None = None
    max_norm: float | None = None
    weight_cap: float | None = None

    def scale(self, rank: int) -> float:
        """Return what PEFT multiplies b a with."""
        return self.alpha(rank) / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class Order:
    """What one client is asked in a round."""

    planned: PlannedClient
    assignment: Assignment
    start: Tensors
    """Flat factors that it starts from, b times the scale; empty where it starts from its own."""
    frozen: Tensors = field(default_factory=dict)
    """The change beside them, by module; empty where there is none."""
    frozen_digest: int = 0
    """That a client's metrics must name if it has added that change."""

    @property
    def client(self) -> str:
        return self.planned.plan.client

    @property
    def rank(self) -> int:
        """As assigned: HetLoRA lets a client have fewer ranks than planned."""
        return self.assignment.plan.rank


@dataclass(frozen=True)
class Combined:
    """The outcome of a round."""

    state: Any
    used: Sequence[AdmittedUpdate]
    failures: Sequence[Failure]


def order(federation: Federation, state: Any, client: str, rank: int, *, starts_alone: bool = False) -> Order:
    """Return what a client of a rank is asked in the coming round.

    Args:
        federation: that it belongs to.
        state: of the method, before the round.
        client: its name.
        rank: of all its modules.
        starts_alone: it was sent no factors, because its rank was not known; all that it replies is its change.
    """
    plan = Plan(client=client, rank=rank, scale=federation.scale(rank), training=ONE_STEP)
    # Without room for a frozen change a client is sent the leading components alone.
    planned = PlannedClient(plan, down_rank=None if federation.sends_frozen else rank)
    assignment = federation.method.assign(state, federation.blueprint.seed, planned)
    if starts_alone:
        return Order(planned, replace(assignment, task=replace(assignment.lora, upload="factors")), {})
    frozen = from_wire(assignment.lora.blobs.get("global", {})) if federation.sends_frozen else {}
    return Order(planned, assignment, start_factors(federation, assignment), frozen)


def start_factors(federation: Federation, assignment: Assignment) -> Tensors:
    """Return flat factors that a client starts from, of its rank in every module, as float32 lets PEFT hold them."""
    task, rank, flat = assignment.lora, assignment.plan.rank, dict[str, Array]()
    task = replace(task, blobs={"local": from_wire(task.blobs.get("local", {}))})
    scale = np.float32(federation.scale(rank))
    for name, (m, n) in federation.blueprint.modules.items():
        a, b = start_of(task, name, update_b=np.empty((m, 0), np.float32), rank=rank, in_features=n)
        whole_b = np.concatenate([b, np.zeros((m, rank - b.shape[1]), np.float32)], axis=1)
        # Divided and multiplied again, as the client's numbers will be: of one that trained nothing the change is 0.
        flat |= {f"{name}.a": a, f"{name}.b": (whole_b / scale) * scale}
    return flat


def sent_state(federation: Federation, order: Order) -> PeftState:
    """Return the PEFT state that a client is sent: its start, and modules_to_save."""
    scale = np.float32(federation.scale(order.rank))
    factors = {key: array / scale if key.endswith(".b") else array for key, array in order.start.items()}
    return PeftState(factors, dict(order.assignment.lora.blobs.get("saved", {})), federation.prefix)


def read_reply(
    federation: Federation, order: Order, content: RecordDict, *, arrays_key: str, examples_key: str
) -> ClientUpdate | Failure:
    """Return the update in a client's reply, or why there is none.

    Args:
        federation: that it belongs to.
        order: that it answers.
        content: of the reply.
        arrays_key: name of its ArrayRecord.
        examples_key: metric that says on how many examples it has trained.
    """
    try:
        metrics = metrics_of(content)
        num_examples = examples_of(metrics, examples_key)
        check_frozen(order, metrics)
        reply = from_record(only_array_record(content, arrays_key))
        check_rank(federation, order, reply)
        tensors = as_update(federation, order, reply)
    except WireError as error:
        return Failure.from_text(order.client, str(error), kind="refused", code="MALFORMED")
    result = LoraResult(tensors, reply.saved, base=order.assignment.base)
    return ClientUpdate(order.client, order.assignment.round, num_examples, result)


def shown_rank(federation: Federation, content: RecordDict, arrays_key: str) -> int:
    """Return the rank of a reply's factors; that of the run where it cannot be seen, and the reply will be refused."""
    try:
        ranks = from_record(only_array_record(content, arrays_key)).ranks
    except WireError:
        ranks = {}
    return max(ranks.values(), default=0) or federation.rank


def check_frozen(order: Order, metrics: Mapping[str, float]) -> None:
    """Refuse a client that has not added the frozen change: it would have trained another model than is summed.

    Raises:
        WireError: if its metrics do not name that change.
    """
    stated = metrics.get(DIGEST)
    if order.frozen and stated != order.frozen_digest:
        hint = "call fedtune.flower.add_frozen(model, msg.content) before training, and add what it returns to them"
        raise WireError(f"expected {DIGEST!r} = {order.frozen_digest} in its metrics; got {stated}; {hint}")


def check_rank(federation: Federation, order: Order, reply: PeftState) -> None:
    """Refuse a reply of another rank than was sent, in words that say where ranks are set.

    Raises:
        WireError: if all its modules have one other rank, or one of the client's own that no layer has room for; what
            else does not fit is left to admission.
    """
    most = max(min(shape) for shape in federation.blueprint.modules.values())
    # Else a client that chooses its rank would say how much the server sends and keeps.
    if not order.start and order.rank > most:
        raise WireError(f"expected a rank of at most {most}, the smaller side of the widest layer; got {order.rank}")
    ranks = set(reply.ranks.values())
    if len(ranks) == 1 and ranks != {order.rank}:
        hint = "name its rank in ranks, or let the client read config['lora-rank']"
        raise WireError(f"expected rank {order.rank}, as it was sent; got rank {ranks.pop()}; {hint}")


def as_update(federation: Federation, order: Order, reply: PeftState) -> Tensors:
    """Return a client's factors as its task asks for them: the scale in b, and minus their start.

    Raises:
        WireError: if it has trained a factor A that is frozen.
    """
    task, scale, tensors = order.assignment.lora, np.float32(federation.scale(order.rank)), dict[str, Array]()
    if reply.prefix != federation.prefix and reply.factors:
        raise WireError(f"expected names that begin with {federation.prefix!r}; got {sorted(reply.ranks)[0][:80]!r}")
    with np.errstate(over="ignore", invalid="ignore"):  # numbers that are not finite are found by admission
        for key, array in reply.factors.items():
            start = order.start.get(key)
            if key.endswith(".a") and task.train == "b":
                check_untrained(key, array, start)
                continue
            end = array * scale if key.endswith(".b") else array
            # Of another shape, or another name: admission says so.
            if task.upload == "difference" and start is not None and start.shape == end.shape:
                end = end - start
            tensors[key] = end
    return tensors


def check_untrained(key: str, array: Array, start: Array | None) -> None:
    """Refuse a frozen factor that has moved: a mean of the others is exact only while all clients share it.

    Raises:
        WireError: if it is not the one that was sent, or that in a format of 16 bits.
    """
    formats = [start.astype(dtype).astype(np.float32) for dtype in DTYPES.values()] if start is not None else []
    if not any(np.array_equal(array, sent) for sent in formats):
        hint = "set requires_grad_(False) on every lora_A before training"
        raise WireError(f"{key[:-2]}: expected lora_A as it was sent, which this strategy freezes; got another; {hint}")


def combine(
    federation: Federation, state: Any, orders: Mapping[str, Order], updates: Sequence[ClientUpdate]
) -> Combined:
    """Return the state after the updates that can be used, in the order of the clients' names, and who was left out.

    Raises:
        RoundError: if no update can be used.
    """
    outcomes = [take(federation, state, orders[update.client], update) for update in updates]
    used = sorted((one for one in outcomes if isinstance(one, AdmittedUpdate)), key=lambda update: update.client)
    failures = [one for one in outcomes if isinstance(one, Failure)]
    norms, outliers = refuse_outliers(used, federation.max_norm)
    used, failures = [update for update in used if update.client in norms], [*failures, *outliers]
    if not used:
        raise RoundError("expected at least one usable update; got none")
    weights = public_weights([Client(one.client, one.num_examples) for one in used], federation.weight_cap)
    used = [replace(update, weight=weights[update.client]) for update in used]
    asked = Asked(state.round + 1, {name: order.planned for name, order in orders.items()})
    aggregated = aggregate(federation, asked, state, used, norms)
    left_out = {failure.client for failure in aggregated.refused}
    used = [update for update in used if update.client not in left_out]
    return Combined(aggregated.state, used, [*failures, *aggregated.refused])


@dataclass(frozen=True)
class Asked:
    """What aggregation reads of a round's request."""

    round: int
    planned: Mapping[str, PlannedClient]


def take(federation: Federation, state: Any, order: Order, update: ClientUpdate) -> AdmittedUpdate | Failure:
    """Return an update with the sizes of its change, or why it cannot be used."""
    outcome = admit(update, order.assignment, federation.blueprint, num_examples=update.num_examples)
    if isinstance(outcome, Failure):
        return outcome
    outcome = replace(outcome, down_rank=order.planned.down_rank)
    if reason := federation.method.refuse(state, outcome):
        return Failure.from_text(order.client, reason, kind="refused")
    return Bounds(federation.method, state, federation.blueprint, federation.norm_cap).bound(outcome, order.assignment)


def global_change(federation: Federation, state: Any) -> Adapter:
    """Return the global model's change of the base, exact, as one adapter of scale 1."""
    if federation.exact_changes is None:
        return federation.method.adapter(state)
    return lowrank.adapter(federation.exact_changes(state))


def global_state(federation: Federation, state: Any) -> tuple[PeftState, float]:
    """Return the global model in the rank that the run began with, and the share of it that this rank holds.

    The share is of the squared singular values; 1 where nothing is left out.
    """
    adapter, share = federation.method.adapter(state), 1.0
    if federation.exact_changes or any(factors.rank != federation.rank for factors in adapter.values()):
        changes = federation.exact_changes(state) if federation.exact_changes else lowrank.compress(adapter)
        parts = {name: change.components(0, federation.rank) for name, change in changes.items()}
        whole = sum(dense.energy(change) for change in changes.values())
        share = sum(dense.energy(part) for part in parts.values()) / whole if whole else 1.0
        adapter = {name: fill_rank(federation, name, part.factors) for name, part in parts.items()}
    flat, scale = pack(adapter), np.float32(federation.scale(federation.rank))
    factors = {key: array / scale if key.endswith(".b") else array for key, array in flat.items()}
    return PeftState(factors, dict(state.saved), federation.prefix), min(1.0, share)


def fill_rank(federation: Federation, name: str, factors: Factors) -> Factors:
    """Return factors of the rank that the run began with: rows of A that are missing are drawn, their b is zero."""
    missing = federation.rank - factors.rank
    if not missing:
        return factors
    # Rows of zero in both factors would never get a gradient.
    a = draw_a(derive(federation.blueprint.seed, "lora.shared_a"), name, federation.rank, factors.shape[1])
    b = np.zeros((factors.shape[0], missing), np.float32)
    return Factors(a=np.concatenate([factors.a, a[factors.rank :]]), b=np.concatenate([factors.b, b], axis=1))
