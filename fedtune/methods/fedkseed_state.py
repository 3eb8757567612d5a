"""The settings and the state of FedKSeed: K integers, and what must be known to send them in few bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, log2
from typing import Annotated, Literal

import numpy as np
from annotated_types import Gt, Interval

from fedtune.directions import downlink
from fedtune.directions import sampling as sampling_module
from fedtune.directions.bank import BANKS, DirectionBank
from fedtune.directions.consistency import block_checks, fastest_displacement
from fedtune.directions.downlink import MAX_SHIFT
from fedtune.directions.rebuild_numpy import EXPONENTS
from fedtune.directions.sampling import paper_probabilities, repaired_probabilities
from fedtune.directions.seed_ledger import Manifest, SeedLedger, replace_tensors
from fedtune.directions.space import directions, group_faults, plain_banks
from fedtune.errors import ConfigError, Fault
from fedtune.messages import OMIT_DEFAULT, BankName, Estimator, Sampling, SeedState, Verb, Weighting
from fedtune.methods.serialization import NOT_PERSISTED, OMIT_EMPTY
from fedtune.seeds import derive
from fedtune.tensors import Array, Tensors

PROVISIONAL = 26
"""e of a first round that measures `scalar_step`: nothing is added up in it."""
DESCENDING = range(24, 29)
"""e where clients descend: with K = 4096 a number of one moves weights by 4e-6 at most (root mean square), and the sums
have room for a move of 0.1 at least, as large as the weights themselves."""
MOST_HALVINGS = 4
"""How often the learning rate of a run is halved before it ends."""
FINE = 16
"""Least units of a perturbation: it is then rounded by at most 1/32 of itself."""


@dataclass(frozen=True)
class FedKSeedSettings:
    """Settings of `fedkseed`."""

    name: Literal["fedkseed"] = "fedkseed"
    """Name of the method."""
    verb: Literal["probe", "descend", "auto"] = field(default="probe", metadata=OMIT_DEFAULT)
    """How clients compute their update, where no `[[override]]` says it for some. probe: measure losses along single
    directions by forward passes alone; descend: take first-order steps inside all numbers at once, which needs the
    memory of a backward pass; auto: descend where that fits, else probe."""
    bank: BankName = "hadamard"
    """What the random directions are. hadamard: signs, exact and fast; gaussian: nearest to the paper, slow; kron:
    added in the forward pass, so no weight is rewritten, and the result is also an adapter."""
    seeds: Annotated[int, Interval(ge=1, le=4096)] = 4096
    """K, the number of directions: a power of two, with kron a power of four. With gaussian 1024 is enough, since
    rebuilding a weight takes K random numbers."""
    perturbation: Annotated[float, Interval(ge=1e-6, le=1)] = 5e-4
    """How far every weight is moved along a direction to measure the loss (the paper's epsilon)."""
    estimator: Estimator = "two-sided"
    """two-sided: a step measures the loss on both sides of the weights; one-sided: once at the weights and once for
    each of `queries` directions."""
    queries: Annotated[int, Interval(ge=2, le=64)] = 8
    """With one-sided: directions that are measured for one optimizer step; `client.steps` counts directions and must be
    a multiple of it."""
    normalise: bool = True
    """With one-sided: divide by the standard deviation of the step's losses instead of by `perturbation` (FZOO)."""
    scalar_step: Literal["auto"] | Annotated[float, Interval(gt=0, le=1e-3)] = "auto"
    """How far a weight moves for a byte of value 1; auto: the first round measures it and changes nothing else."""
    largest_rate: Annotated[float, Gt(0)] = field(default=0.1, metadata=OMIT_DEFAULT)
    """Bound on the rate that `client.learning_rate = "auto"` measures; a site refuses an order with a larger one."""
    fraction_bits: Annotated[int, Interval(ge=0, le=8)] = 4
    """Bits below the value 1 that the server keeps of a mean over clients, which is rounded to them."""
    sampling: Sampling = "uniform"
    """How clients draw directions. uniform: all alike; distinct: each at most once a round; pro: more often those that
    changed the loss most before."""
    pro: Literal["repaired", "paper"] = "repaired"
    """Rule of the sampling pro. paper: as published, where directions that were not drawn yet are the least likely;
    repaired: ours, where they are as likely as the mean."""
    clip: Literal["quantile", "none"] | Annotated[float, Gt(0)] = "quantile"
    """Bound on the size of a measured slope. quantile: twice the client's running 0.9-quantile; none: no bound; or a
    number."""
    weights: Weighting = "examples"
    """examples: clients count in proportion to their examples, in whole numbers up to 127; uniform: all count the same.
    """
    sync: Literal["auto", "whole"] = "auto"
    """auto: a client gets the shortest form of what it has missed; whole: always all K integers, 16 kB at most."""
    public_log: bool = False
    """Let auto send what each client measured to every client, which is shortest. Clients then see each other's
    updates."""
    trainable: Sequence[str] = ()
    """Names or globs of the tensors that are tuned; empty: all, with kron the weights of `adapter.targets`."""
    vectors: bool = False
    """With kron: also tune biases and norms."""
    embeddings: bool = False
    """With kron: also tune embeddings and all other matrices."""
    groups: Annotated[int, Interval(ge=1, le=64)] | Literal["tensor"] = field(default=1, metadata=OMIT_DEFAULT)
    """Sets of `seeds` numbers, each of which moves its own part of the weights: with descending clients more learn
    more, and send more. A power of two, 1 with kron; tensor: a set for each tensor that is tuned."""
    redraw: Literal[0] | Annotated[int, Interval(ge=4, le=1_000_000)] = field(default=0, metadata=OMIT_DEFAULT)
    """Rounds after which new directions are drawn beside the earlier ones, which stay; 0: never. Rebuilding the weights
    takes a pass for each drawing."""
    scalar_bits: Literal[2, 4, 8] = field(default=8, metadata=OMIT_DEFAULT)
    """Bits of each number that a descending client sends."""


def faults(settings: FedKSeedSettings, steps: Sequence[int | None]) -> Iterator[Fault]:
    """Yield what does not fit together in the table `method`, and with the steps of a round; None: epochs decide."""
    yield from descent_faults(settings)
    known = [count for count in steps if count is not None]
    if None in steps and (settings.sampling == "distinct" or settings.estimator == "one-sided"):
        hint = "distinct seeds and groups of queries need a known number of scalars"
        yield Fault("client.epochs", "none, but client.steps", "epochs", hint)
    try:
        BANKS[settings.bank](settings.seeds, 0)
    except ConfigError as error:
        yield from (replace(fault, path=f"method.{fault.path}") for fault in error.faults)
    if settings.sampling == "distinct" and any(count > settings.seeds for count in known):
        expected = f"at most method.seeds = {settings.seeds} with distinct seeds"
        yield Fault("client.steps", expected, str(max(known)), "take fewer steps, or sampling = 'uniform'")
    if settings.estimator == "one-sided" and any(count % settings.queries for count in known):
        odd = next(count for count in known if count % settings.queries)
        expected = f"a multiple of method.queries = {settings.queries}, since steps counts directions"
        yield Fault("client.steps", expected, str(odd), f"e.g. {-(-odd // settings.queries) * settings.queries}")
    if settings.public_log and settings.sampling == "pro":
        hint = "clients would have to be sent what the draws follow from"
        yield Fault("method.public_log", "false with sampling = 'pro'", "true", hint)
    if settings.public_log and settings.sync != "auto":
        yield Fault("method.public_log", "false with sync = 'whole'", "true", 'set sync = "auto"')
    for key, value in (("vectors", settings.vectors), ("embeddings", settings.embeddings)):
        if value and settings.bank != "kron":
            hint = "the other banks move every tensor; choose with method.trainable"
            yield Fault(f"method.{key}", f"false with bank = {settings.bank!r}", "true", hint)


def descent_faults(settings: FedKSeedSettings) -> Iterator[Fault]:
    """Yield what does not fit together where clients descend, or there are several groups or banks."""
    moved = (0,) if settings.groups == "tensor" else ()
    for fault in group_faults(settings.bank, settings.groups, moved):
        yield replace(fault, path=f"method.{fault.path}")
    if settings.redraw and settings.sampling == "pro":
        hint = "what was measured along old directions says nothing of new ones"
        yield Fault("method.redraw", "0 with sampling = 'pro'", str(settings.redraw), hint)
    if settings.verb == "descend":
        if settings.sampling == "pro":
            hint = "it counts what clients measure that probe; a client that descends moves every direction"
            yield Fault("method.sampling", "uniform with verb = 'descend'", repr(settings.sampling), hint)
        if settings.public_log:
            hint = "a log holds what clients measure that probe; a client that descends sends all numbers"
            yield Fault("method.public_log", "false with verb = 'descend'", "true", hint)


@dataclass(frozen=True)
class FedKSeedState:
    settings: FedKSeedSettings = field(metadata=NOT_PERSISTED)
    manifest: Manifest = field(metadata=NOT_PERSISTED)
    """Of the base."""
    round: int
    """Rounds completed."""
    seed: int
    """The run's; keys of the clients' draws follow from it."""
    base: str
    """Digest (hex) of the base's manifest."""
    trainable: Sequence[int]
    """Ordinals of the tensors that are moved."""
    exponent: int
    """e of the displacement unit 2^-e."""
    calibrated: bool
    """Whether e is settled; not so in a first round that measures it."""
    coarseness: int
    """j: a scalar of one changes weights by 2^j times the step that the run began with."""
    longest: int
    """Scalars of the longest update so far."""
    accumulators: Tensors
    """`a`, int32 (K,)."""
    drawn: Tensors
    """`pro`: `sizes`, the sum of |scalar|, and `visits` of each seed, int64 (K,); empty for other samplings."""
    acknowledged: Mapping[str, int]
    """By client, the last round whose result it has worked on."""
    past: Tensors
    """Accumulators after rounds that some client may have kept, by round, int32 (K,)."""
    log: Tensors
    """`public_log`: what each of the last rounds added, by round, as `downlink.encode_log` makes it."""
    verbs: Sequence[Verb] = field(default=(), metadata=NOT_PERSISTED)
    """What clients of the run may be asked to do; empty: to probe."""
    widest: int = field(default=0, metadata=OMIT_EMPTY)
    """Of clients that descend: the largest shift that half of a round's have stated, so far."""
    head: Tensors = field(default_factory=dict, metadata=OMIT_EMPTY)
    """The head that takes the place of the base's, by parameter name, float32; empty: the base's own."""
    grown: int = field(default=0, metadata=OMIT_EMPTY)
    """By how much a round in which clients descended has let sum |A| at a position grow at most, and at least 1."""
    guarded: bool = field(default=False, metadata=OMIT_EMPTY)
    """Whether rounds that diverge are undone; not so in runs of releases before 0.3, which go on as they began."""
    halvings: int = field(default=0, metadata=OMIT_EMPTY)
    """How often learning rates were halved, since the clients' losses rose."""
    rose: Mapping[str, float] = field(default_factory=dict, metadata=OMIT_EMPTY)
    """The last round that was undone for it, and by which share they rose in it."""
    watched: Mapping[str, float] = field(default_factory=dict, metadata=OMIT_EMPTY)
    """Losses of clients at `best`, by name; empty while losses fall."""
    best: Tensors = field(default_factory=dict, metadata=OMIT_EMPTY)
    """`a`, the sums to go back to if the losses rise above these."""
    chosen: Mapping[str, float] = field(default_factory=dict, metadata=OMIT_EMPTY)
    """The learning rate of `client.learning_rate = "auto"`, and what it follows from; empty until it is measured."""

    @property
    def saved(self) -> Tensors:
        """Nothing is averaged in full beside the seeds."""
        return {}

    @cached_property
    def moved_base(self) -> Manifest:
        """The manifest of the weights that seeds move: of the base, with the head that the run has made."""
        return replace_tensors(self.manifest, self.head) if self.head else self.manifest

    @property
    def trained(self) -> int:
        """Rounds completed but for one that has made the head."""
        return self.round - bool(self.head)

    @cached_property
    def sums(self) -> Array:
        """A, int32 (banks x groups x K,); zeros of a bank that is new in the coming round."""
        return downlink.pad_zeros(self.accumulators["a"], self.bank.size)

    @cached_property
    def bank(self) -> DirectionBank:
        """The directions of the coming round, those of earlier banks with them."""
        return self.bank_of(self.round)

    def bank_of(self, completed: int) -> DirectionBank:
        """Return the directions of the round after so many."""
        settings = self.settings
        drawn = 1 + (completed // settings.redraw if settings.redraw else 0)
        keys = [bank_key(self.seed, number) for number in range(drawn)]
        # Without a base, as where a site looks at a recipe alone, every tensor is one.
        tensors = tuple(self.trainable) or (0,)
        return directions(settings.bank, settings.seeds, keys, settings.groups, tensors)

    @cached_property
    def ledger(self) -> SeedLedger:
        return SeedLedger(self.bank, self.exponent, self.round, bytes.fromhex(self.base), self.sums)

    @cached_property
    def settled(self) -> SeedLedger:
        """The ledger without a bank along which no round has moved yet."""
        bank = self.bank_of(max(0, self.round - 1))
        return SeedLedger(bank, self.exponent, self.round, bytes.fromhex(self.base), self.sums[: bank.size])

    @cached_property
    def digest(self) -> bytes:
        return self.ledger.digest

    @property
    def probes(self) -> bool:
        """Whether some client may be asked to probe."""
        return not self.verbs or "probe" in self.verbs

    @property
    def descends(self) -> bool:
        """Whether some client may be asked to descend."""
        return "descend" in self.verbs

    @property
    def shift(self) -> int:
        """A scalar of one moves an accumulator by 2^shift."""
        return self.settings.fraction_bits + self.coarseness

    @property
    def perturbation(self) -> int:
        """E, in displacement units."""
        return max(1, round(self.settings.perturbation * 2.0**self.exponent))

    @cached_property
    def levels(self) -> bytes:
        """A byte per seed for `pro`, which decides how often it is drawn; empty for other samplings."""
        if self.settings.sampling != "pro":
            return b""
        rule = paper_probabilities if self.settings.pro == "paper" else repaired_probabilities
        return sampling_module.quantise_levels(rule(self.drawn["sizes"], self.drawn["visits"])).tobytes()

    @cached_property
    def checks(self) -> bytes:
        """Digests of the blocks of displacements, which a client's must equal; no base is needed for them."""
        return block_checks(self.ledger, self.manifest, self.trainable, fastest_displacement(self.bank))

    @cached_property
    def forms(self) -> Mapping[int, SeedState]:
        """The shortest message by the round that a client has last worked on; 0 serves clients that hold nothing."""
        return {since: self.message_since(since) for since in {0, *map(int, self.past)}}

    def message_since(self, since: int) -> SeedState:
        forms = {"whole": downlink.encode_whole(self.sums)}
        if self.settings.sync == "auto":
            # A client that holds nothing starts from zeros, so that a young run sends it only what has moved.
            known = self.past[str(since)] if since else np.zeros_like(self.sums)
            forms["changed"] = downlink.encode_changed(self.sums, known, banks=len(plain_banks(self.bank)))
            missed = [str(number) for number in range(since + 1, self.round + 1)]
            # Every missed round or none: with a gap, a client would end at other sums.
            if set(missed) <= self.log.keys() and len(self.sums) == self.settings.seeds:
                forms["log"] = b"".join(self.log[number].tobytes() for number in missed)
        form, data = downlink.shortest_form(forms)
        return SeedState(form, 0 if form == "whole" else since, data, self.round, self.digest)  # type: ignore[arg-type]


def with_new_head(state: FedKSeedState, head: Tensors) -> FedKSeedState:
    """Return the state after a round that has made a head: seeds then move the base with that head."""
    after = replace(state, head=head, round=state.round + 1)
    return replace(after, base=after.moved_base.digest.hex())


def bank_key(seed: int, number: int) -> int:
    """Return the key of a run's n-th bank, the first being 0."""
    return derive(seed, "fedkseed.bank", number) if number else derive(seed, "fedkseed.bank")


def units(settings: FedKSeedSettings, step: float | Literal["auto"], *, descends: bool = False) -> tuple[int, int]:
    """Return (e, j) such that a scalar of one changes weights by about `step` and the perturbation is a whole number.

    e is at least so large that the perturbation is rounded by no more than a 32nd of itself, and at most so large that
    it fits; where that makes units too fine for the step, j makes it up. Where clients `descend` as well e is within
    `DESCENDING`.
    """
    wanted = PROVISIONAL if step == "auto" else settings.fraction_bits - round(log2(step))
    # E stays below 2^27, to leave room for the sums: with gaussian, 8 (sum |A| + E) must stay below 2^31.
    least, most = ceil(log2(FINE / settings.perturbation)), int(log2(2**27 / settings.perturbation))
    if descends:
        least, most = max(least, DESCENDING.start), min(most, DESCENDING.stop - 1)
    exponent = max(EXPONENTS.start, least, min(wanted, most, EXPONENTS.stop - 1))
    # Below zero for steps that are too small for the units that clients need that descend.
    coarsest = 0 if not descends else -settings.fraction_bits
    return exponent, max(coarsest, min(exponent - wanted, MAX_SHIFT - settings.fraction_bits))
