"""A strategy for Flower's Message API over a method of fedtune: what the classes of `strategies` have in common.

What is sent and summed is that of `fedtune.methods`, and what is taken from a client that of `fedtune.rounds`; here are
Flower's six functions around them. No torch is loaded.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedtune.errors import ConfigError, Fault, RoundError, WireError
from fedtune.flower.peft_records import PeftState, from_record, to_record
from fedtune.flower.replies import one_line
from fedtune.flower.reply_metrics import means, metrics_of
from fedtune.flower.stock_messages import Asked, Keys, arrays_bytes, ask, read_answers
from fedtune.flower.stock_nodes import LOG, NodeNames, draw, wait_for_nodes
from fedtune.flower.stock_round import (
    Federation,
    Order,
    combine,
    global_change,
    global_state,
    order,
    read_reply,
    shown_rank,
)
from fedtune.flower.strategy_arguments import Alpha, Ranks, alpha_at, alpha_faults, bound_faults, rank_faults
from fedtune.lora.adapter import Adapter, unpack
from fedtune.lora.dense import Summed
from fedtune.messages import Blueprint, ClientUpdate, Failure
from fedtune.methods import METHODS, with_settings
from fedtune.store import peft

MeanOf: TypeAlias = Callable[[list[RecordDict], str], MetricRecord]


@dataclass(kw_only=True, eq=False)
class LoraStrategy(Strategy):
    """What the strategies have in common; its arguments beside FedAvg's own are those that LoRA has.

    After `start`, `save(path)` writes the exact global change as a PEFT directory, while the `Result` that `start`
    returns holds it in the rank of `initial_arrays`, which the model that made these can load.
    """

    alpha: Alpha
    """lora_alpha of the clients' LoraConfig, or a function of a client's rank that gives it."""
    ranks: Ranks = None
    """Ranks of the clients: one number; numbers by node name (a SuperNode's registered name, in a simulation `node-0`,
    `node-1`, ...), where a node without one has the rank of `initial_arrays`; "own": each client's own, seen in its
    first reply, before which it is sent no factors (FLoRA and FlexLoRA); none: the rank of `initial_arrays`."""
    use_rslora: bool = False
    """As in the clients' LoraConfig: the scale is alpha / sqrt(rank), and not alpha / rank."""
    base: str = ""
    """Folder or hub name of the base, for the adapter_config.json of what is saved."""
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM"
    """As in the clients' LoraConfig, for what is saved."""
    fan_in_fan_out: bool = False
    """As in the clients' LoraConfig, for what is saved; true of GPT-2."""
    save_to: str | Path | None = None
    """Folder in which every round's global change is saved, as `round-0001`; none: nothing is."""
    seed: int = 0
    """From which cohorts and fresh factors are drawn."""
    server_learning_rate: float = 1.0
    """Size of the server's step towards what the clients have sent; 1 takes that itself."""
    norm_cap: float | None = 1e6
    """Largest norm of the change of one update; none: all that is finite."""
    max_norm: float | None = 10.0
    """Of three or more updates, one whose change is more than this many times the median is left out; none: none is."""
    weight_cap: float | None = 10.0
    """Largest weight of a client, in medians of the round's clients; none: clients count as they say."""
    min_updates: int = 1
    """Usable updates that a round needs; with fewer the model stays as it was."""
    patience_s: float = 600.0
    """How long nodes are waited for."""
    fraction_train: float = 1.0
    """Share of the nodes that train in a round, as in FedAvg; so are all that follow."""
    fraction_evaluate: float = 1.0
    """Share of the nodes that evaluate in a round."""
    min_train_nodes: int = 2
    """Nodes that train in a round at least."""
    min_evaluate_nodes: int = 2
    """Nodes that evaluate in a round at least."""
    min_available_nodes: int = 2
    """Nodes that must be connected before a round begins."""
    weighted_by_key: str = "num-examples"
    """Metric that says how many examples a client has."""
    arrayrecord_key: str = "arrays"
    """Name of the ArrayRecord in messages."""
    configrecord_key: str = "config"
    """Name of the ConfigRecord in messages."""
    train_metrics_aggr_fn: MeanOf | None = None
    """(contents of the used replies, weighted_by_key) -> metrics of the round; none: means over the clients."""
    evaluate_metrics_aggr_fn: MeanOf | None = None
    """The same for evaluation."""

    method: ClassVar[str] = ""
    """Its name in `fedtune.methods`."""
    own_ranks: ClassVar[bool] = False
    """Whether clients may start from factors of their own."""

    _names: NodeNames = field(default_factory=NodeNames, init=False, repr=False)
    _federation: Federation | None = field(default=None, init=False, repr=False)
    _state: Any = field(default=None, init=False, repr=False)
    _exact: Any = field(default=None, init=False, repr=False)
    """The method's state whose global change is the result; `_state` is that which the next round starts from."""
    _own: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    """Ranks that clients have shown, with ranks = "own"."""
    _asked: Mapping[str, Asked] = field(default_factory=dict, init=False, repr=False)
    """By client, what it was sent; the ids of messages are known once they are sent."""
    _began: float = field(default=0.0, init=False, repr=False)

    @abstractmethod
    def settings(self) -> Any:
        """Return the settings of the method."""

    @property
    def sends_frozen(self) -> bool:
        """Whether clients must add a frozen change, by `fedtune.flower.add_frozen`."""
        return False

    def exact_changes(self) -> Callable[[Any], Mapping[str, Summed]] | None:
        """Return what gives the exact change of a state, where `Method.adapter` does not."""
        return None

    def next_start(self, state: Any) -> Any:
        """Return the state that the next round starts from."""
        return state

    def with_room(self, state: Any, ranks: Sequence[int]) -> Any:
        """Return a state that has room for the exact sum of what clients of these ranks send; 0: not known."""
        return state

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return a message for each client of the round; in round 1 the run begins with `arrays`.

        Raises:
            ConfigError: if an argument of the strategy, or `arrays`, is of no use.
            RoundError: if too few nodes connect.
        """
        if server_round == 1 or self._federation is None:
            self._begin(arrays)
        self._began = time.perf_counter()
        names = self._cohort("train", server_round, self.fraction_train, self.min_train_nodes, grid)
        return self._messages(names, MessageType.TRAIN, server_round, config)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return a message for each client that evaluates: what it would start its next training from."""
        names = self._cohort("evaluate", server_round, self.fraction_evaluate, self.min_evaluate_nodes, grid)
        known = {name: node for name, node in names.items() if self._rank_of(name)}
        return self._messages(known, MessageType.EVALUATE, server_round, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the global model in the rank that the run began with, and metrics; (None, None) if nothing changed.

        Every client that is left out is named in the log with its reason.
        """
        federation = self._running()
        answers, silent = read_answers(self._asked, replies)
        updates, orders, failures = dict[str, ClientUpdate](), dict[str, Order](), list(silent)
        for name, content in answers.items():
            outcome = self._update(name, content)
            if isinstance(outcome, Failure):
                failures.append(outcome)
            else:
                updates[name], orders[name] = outcome
        try:
            combined = combine(federation, self._state, orders, list(updates.values()))
            failures += combined.failures
            if len(combined.used) < self.min_updates:
                raise RoundError(f"expected at least {self.min_updates} usable updates; got {len(combined.used)}")
        except RoundError as error:
            self._report(server_round, failures)
            # The method's own count leaves out the rounds that changed nothing.
            reason = str(error).removeprefix(f"round {self._state.round + 1}: ").replace("client.learning", "learning")
            LOG.warning("fedtune: round %d: %s; the model stays as it was", server_round, reason)
            return None, None
        self._report(server_round, failures)
        self._own |= {update.client: orders[update.client].rank for update in combined.used if self.ranks == "own"}
        self._exact, self._state = combined.state, self.next_start(combined.state)
        if self.save_to is not None:
            self.save(Path(self.save_to) / f"round-{server_round:04d}")
        state, share = global_state(federation, self._exact)
        used = [answers[update.client] for update in combined.used]
        metrics = (self.train_metrics_aggr_fn or means)(used, self.weighted_by_key)
        metrics["clients-used"], metrics["clients-left-out"] = len(used), len(failures)
        metrics["bytes-down"] = sum(asked.num_bytes for asked in self._asked.values())
        metrics["bytes-up"] = sum(arrays_bytes(content) for content in answers.values())
        metrics["seconds"], metrics["energy-kept"] = time.perf_counter() - self._began, share
        return to_record(state), metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the means of the clients' metrics; a client without an answer is named in the log."""
        answers, silent = read_answers(self._asked, replies)
        usable, failures = dict[str, RecordDict](), list(silent)
        for name, content in answers.items():
            try:
                metrics_of(content)
                usable[name] = content
            except WireError as error:
                failures.append(Failure.from_text(name, str(error)))
        self._report(server_round, failures)
        contents = [usable[name] for name in sorted(usable)]
        return (self.evaluate_metrics_aggr_fn or means)(contents, self.weighted_by_key) if contents else None

    def summary(self) -> None:
        """Log how clients are drawn, and what they are sent."""
        alpha = "by rank" if callable(self.alpha) else self.alpha
        ranks = "of the initial arrays" if self.ranks is None else self.ranks
        LOG.info("\t├──> fedtune's method %r, alpha %s, ranks %s", self.method, alpha, ranks)
        LOG.info("\t├──> Fraction: train (%.2f) | evaluate (%.2f)", self.fraction_train, self.fraction_evaluate)
        LOG.info("\t└──> Minimum nodes: train (%d) | evaluate (%d)", self.min_train_nodes, self.min_evaluate_nodes)

    @property
    def adapter(self) -> Adapter:
        """The exact global change so far, of scale 1."""
        return global_change(self._running(), self._exact)

    def save(self, path: str | Path) -> Path:
        """Write the exact global change as a PEFT directory, which `PeftModel.from_pretrained` loads; return it.

        Raises:
            ConfigError: if no round has begun yet.
            StoreError: if the folder cannot be written.
        """
        target = peft.Target(
            base=self.base,
            revision=None,
            task="classification" if self.task_type == "SEQ_CLS" else "causal",
            fan_in_fan_out=self.fan_in_fan_out,
            saved_modules=sorted({name.rpartition(".")[0] for name in self._saved}),
        )
        origin = {"method": self.method, "rounds": self._exact.round if self._exact is not None else 0}
        return peft.write(Path(path), self.adapter, self._saved, target, origin)

    @property
    def _saved(self) -> Mapping[str, Any]:
        return self._exact.saved if self._exact is not None else {}

    def _running(self) -> Federation:
        if self._federation is None:
            raise ConfigError(Fault("", "a run that has begun", "none", "call strategy.start(...) first"))
        return self._federation

    def _begin(self, arrays: ArrayRecord) -> None:
        """Begin a run with the clients' first arrays."""
        try:
            first = from_record(arrays)
        except WireError as error:
            raise ConfigError(Fault("initial_arrays", "", str(error))) from error
        if faults := list(self._faults(first)):
            raise ConfigError(faults)
        rank = max(first.ranks.values())
        planned = [rank, *self.ranks.values()] if isinstance(self.ranks, Mapping) else [rank]
        largest = self.ranks if isinstance(self.ranks, int) else max(planned)
        modules = dict(sorted(first.modules.items()))
        blueprint = Blueprint(modules, first.saved, largest, self.seed)
        settings = self.settings()
        method = with_settings(METHODS[self.method], settings)
        self._federation = Federation(
            method=method,
            blueprint=blueprint,
            prefix=first.prefix,
            rank=rank,
            alpha=self._alpha,
            use_rslora=self.use_rslora,
            exact_changes=self.exact_changes(),
            sends_frozen=self.sends_frozen,
            norm_cap=self.norm_cap,
            max_norm=self.max_norm,
            weight_cap=self.weight_cap,
        )
        state = method.init(blueprint, settings)
        if any(array.any() for key, array in first.factors.items() if key.endswith(".b")) and method.start:
            scale = np.float32(self._federation.scale(rank))
            flat = {key: array * scale if key.endswith(".b") else array for key, array in first.factors.items()}
            state = method.start(state, unpack(flat), first.saved)
        self._exact = self._state = state
        self._names, self._own, self._asked = NodeNames(), {}, {}

    def _faults(self, first: PeftState) -> Iterable[Fault]:
        """Yield what of the strategy's arguments, or of the first arrays, is of no use."""
        ranks = set(first.ranks.values())
        if len(ranks) != 1:
            hint = "build them with get_peft_model_state_dict of a model without rank_pattern"
            got = f"ranks {sorted(ranks)[:5]}" if ranks else "no factors"
            yield Fault("initial_arrays", "factors lora_A and lora_B of one rank", got, hint)
            return
        (rank,) = ranks
        wrong = list(rank_faults(type(self).__name__, self.method, self.ranks, rank, own=self.own_ranks))
        # Without sound ranks there is nothing to ask alpha for.
        yield from wrong or alpha_faults(self.alpha, self.ranks, rank)
        bounds = {"norm_cap": self.norm_cap, "max_norm": self.max_norm, "weight_cap": self.weight_cap}
        yield from bound_faults(self.server_learning_rate, **bounds)

    def _alpha(self, rank: int) -> float:
        return alpha_at(self.alpha, rank)

    @property
    def _keys(self) -> Keys:
        return Keys(self.arrayrecord_key, self.configrecord_key, self.weighted_by_key)

    def _rank_of(self, name: str) -> int:
        """Return the rank of a client; 0 where only its first reply will show it."""
        if self.ranks == "own":
            return self._own.get(name, 0)
        if isinstance(self.ranks, int):
            return self.ranks
        return (self.ranks or {}).get(name, self._running().rank)

    def _cohort(self, purpose: str, server_round: int, fraction: float, least: int, grid: Grid) -> dict[str, int]:
        if fraction == 0.0:
            return {}
        needed = max(self.min_available_nodes, least)
        nodes = wait_for_nodes(self._names, grid, needed, patience_s=self.patience_s)
        if server_round == 1 and purpose == "train" and isinstance(self.ranks, Mapping):
            for name in sorted(self.ranks.keys() - nodes.keys()):
                LOG.warning("fedtune: ranks names the node %r, which is not here (%s)", name, ", ".join([*nodes][:8]))
        seed, purpose = self.seed, f"flower.{purpose}"
        names = draw(list(nodes), fraction, least, seed=seed, purpose=purpose, round=server_round)
        LOG.info("fedtune: %d of %d nodes are asked to %s", len(names), len(nodes), purpose.removeprefix("flower."))
        return {name: nodes[name] for name in names}

    def _messages(
        self, names: Mapping[str, int], kind: str, server_round: int, config: ConfigRecord
    ) -> Sequence[Message]:
        clients = {name: (node, self._rank_of(name)) for name, node in names.items()}
        if kind == MessageType.TRAIN:
            self._state = self.with_room(self._state, [rank for _, rank in clients.values()])
        own = {**config, "server-round": server_round}
        self._asked = ask(self._running(), self._state, clients, kind, own, self._keys)
        # A list: a SuperLink's grid walks it twice.
        return [asked.message for asked in self._asked.values()]

    def _update(self, name: str, content: RecordDict) -> tuple[ClientUpdate, Order] | Failure:
        """Return the update in a client's reply, or why there is none, and the order that it answers."""
        federation, asked = self._running(), self._asked[name].order
        if asked is None:
            # It started from its own factors, whose rank the reply shows.
            rank = shown_rank(federation, content, self.arrayrecord_key)
            try:
                asked = order(federation, self._state, name, rank, starts_alone=True)
            except ConfigError as error:  # the client has chosen a rank that alpha has no number for
                return Failure.from_text(name, str(error), kind="refused")
        keys = self._keys
        outcome = read_reply(federation, asked, content, arrays_key=keys.arrays, examples_key=keys.examples)
        return outcome if isinstance(outcome, Failure) else (outcome, asked)

    def _report(self, server_round: int, failures: Sequence[Failure]) -> None:
        for failure in sorted(failures, key=lambda one: one.client):
            # These keys are arguments here, and not of a recipe; names of arrays are the client's own words.
            reason = one_line(failure.reason.replace("rounds.", ""))
            LOG.warning("fedtune: round %d: %s is left out: %s", server_round, failure.client, reason)
