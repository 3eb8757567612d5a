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
from fedtune.directions.seed_ledger import Manifest, SeedLedger
from fedtune.errors import ConfigError, Fault
from fedtune.messages import BankName, Estimator, Sampling, SeedState, Weighting
from fedtune.methods.serialization import NOT_PERSISTED
from fedtune.seeds import derive
from fedtune.tensors import Array, Tensors

PROVISIONAL = 26
"""e of the first round where `scalar_step` is measured: nothing is added up in it."""
FINE = 16
"""Units that a perturbation has at least."""


@dataclass(frozen=True)
class FedKSeedSettings:
    """Settings of `fedkseed`."""

    name: Literal["fedkseed"] = "fedkseed"
    """Name of the method."""
    bank: BankName = "hadamard"
    """Where directions come from: `hadamard` is exact and fast, `gaussian` nearest to the paper and slow, `kron` is
    added in the forward pass, never rewrites a weight and makes an adapter."""
    seeds: Annotated[int, Interval(ge=1, le=4096)] = 4096
    """K, a power of two (of four for `kron`); 1024 is enough for `gaussian`, whose rebuilds cost K draws a weight."""
    perturbation: Annotated[float, Interval(ge=1e-6, le=1)] = 5e-4
    """Distance along a direction, in every weight, at which losses are compared (the paper's epsilon)."""
    estimator: Estimator = "two-sided"
    """`two-sided`: the loss on both sides of the weights; `one-sided`: one loss at them and one per query."""
    queries: Annotated[int, Interval(ge=2, le=64)] = 8
    """Directions per optimizer step, for `one-sided`; `client.steps` counts directions and must be a multiple."""
    normalise: bool = True
    """`one-sided`: divide by the standard deviation of the step's losses instead of by the perturbation (FZOO)."""
    scalar_step: Literal["auto"] | Annotated[float, Interval(gt=0, le=1e-3)] = "auto"
    """Change of every weight that a scalar of one stands for; auto: the first round measures it and moves nothing."""
    fraction_bits: Annotated[int, Interval(ge=0, le=8)] = 4
    """Bits of the server's sums below a scalar of one: what a mean over clients is rounded to."""
    sampling: Sampling = "uniform"
    """How clients draw seeds: `uniform`, `distinct` (each at most once a round), `pro` (by what they did before)."""
    pro: Literal["repaired", "paper"] = "repaired"
    """Rule of `pro`; the paper's starves seeds that were never drawn."""
    clip: Literal["quantile", "none"] | Annotated[float, Gt(0)] = "quantile"
    """Bound on |g|: twice the client's running 0.9-quantile, none, or a number."""
    weights: Weighting = "examples"
    """`examples`: 1 to 127, in proportion to the largest of the cohort; `uniform`: all alike."""
    sync: Literal["auto", "whole"] = "auto"
    """`auto`: a client is sent the shortest form of what it has missed; `whole`: always all K integers."""
    public_log: bool = False
    """Let `auto` send every client's scalars to every client, the shortest form; nothing of a client is hidden then."""
    trainable: Sequence[str] = ()
    """Globs over the names of tensors to move; none takes all, for `kron` the weights of `adapter.targets`."""
    vectors: bool = False
    """`kron`: move biases and norms as well."""
    embeddings: bool = False
    """`kron`: move embeddings and all other matrices as well."""


def faults(settings: FedKSeedSettings, steps: Sequence[int | None]) -> Iterator[Fault]:
    """Yield what does not fit together in the table `method`, and with the steps of a round; None: epochs decide."""
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
    """Whether e is the run's own, and not that of a first round that measures it."""
    coarseness: int
    """j: a scalar of one stands for 2^j times the step that the run began with."""
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

    @property
    def saved(self) -> Tensors:
        """Nothing is averaged in full beside the seeds."""
        return {}

    @property
    def sums(self) -> Array:
        """A, int32 (K,)."""
        return self.accumulators["a"]

    @cached_property
    def bank(self) -> DirectionBank:
        return BANKS[self.settings.bank](self.settings.seeds, derive(self.seed, "fedkseed.bank"))

    @cached_property
    def ledger(self) -> SeedLedger:
        return SeedLedger(self.bank, self.exponent, self.round, bytes.fromhex(self.base), self.sums)

    @cached_property
    def digest(self) -> bytes:
        return self.ledger.digest

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
        """What a client's blocks must be, made here without the base."""
        return block_checks(self.ledger, self.manifest, self.trainable, fastest_displacement(self.bank))

    @cached_property
    def forms(self) -> Mapping[int, SeedState]:
        """The shortest message by the round that a client has last worked on; 0 serves clients that hold nothing."""
        return {since: self.sent(since) for since in {0, *map(int, self.past)}}

    def sent(self, since: int) -> SeedState:
        forms = {"whole": downlink.encode_whole(self.sums)}
        if self.settings.sync == "auto":
            known = self.past[str(since)] if since else np.zeros_like(self.sums)
            forms["changed"] = downlink.encode_changed(self.sums, known)
            missed = [str(number) for number in range(since + 1, self.round + 1)]
            if set(missed) <= self.log.keys():
                forms["log"] = b"".join(self.log[number].tobytes() for number in missed)
        form, data = downlink.shortest_form(forms)
        return SeedState(form, 0 if form == "whole" else since, data, self.round, self.digest)  # type: ignore[arg-type]


def units(settings: FedKSeedSettings, step: float | Literal["auto"]) -> tuple[int, int]:
    """Return (e, j) such that a scalar of one changes weights by about `step` and the perturbation is a whole number.

    e is at least so large that the perturbation is rounded by no more than a 32nd of itself, and at most so large that
    it fits; where that makes units too fine for the step, j makes it up.
    """
    wanted = PROVISIONAL if step == "auto" else settings.fraction_bits - round(log2(step))
    least, most = ceil(log2(FINE / settings.perturbation)), int(log2(2**27 / settings.perturbation))
    exponent = max(EXPONENTS.start, least, min(wanted, most, EXPONENTS.stop - 1))
    return exponent, max(0, min(exponent - wanted, MAX_SHIFT - settings.fraction_bits))
