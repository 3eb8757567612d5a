"""What a client is asked in one round as values: how it trains, by which plan, and which of the tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval

from fedtune.directions.blocks import Groups
from fedtune.errors import ShapeError
from fedtune.pruning.ranking import PruningSettings
from fedtune.tensors import Tensors

WireDtype: TypeAlias = Literal["fp32", "bf16", "fp16", "int8", "int4"]
Upload: TypeAlias = Literal["factors", "difference"]
BankName: TypeAlias = Literal["hadamard", "gaussian", "kron"]
Sampling: TypeAlias = Literal["uniform", "distinct", "pro"]
Estimator: TypeAlias = Literal["two-sided", "one-sided"]
Verb: TypeAlias = Literal["adapt", "probe", "descend"]
ScalarBits: TypeAlias = Literal[8, 4, 2]
VerbChoice: TypeAlias = Literal["adapt", "probe", "descend", "auto"]
"""What is asked of a client; auto: descend where its memory allows that, else probe."""
BaseDtype: TypeAlias = Literal["", "int8", "nf4"]
View: TypeAlias = Literal["whole", "deployed"]
ImportanceName: TypeAlias = Literal["", "gain", "gradient", "svd", "adalora"]


OMIT_DEFAULT: Mapping[str, bool] = {"omit_default": True}
"""Metadata of a recipe's key that a release added: at its default it is left out of a recipe's text and of its digest,
so that digests which sites have pinned in their policies still hold."""
ON_SERVER: Mapping[str, bool] = {"travels": False}
"""Metadata of a settings field that is no part of the settings on the wire."""


@dataclass(frozen=True)
class Training:
    """How a client trains in one round; the recipe's table `client`.

    With `fedkseed` there are only batch, learning_rate, steps and epochs; the other keys are refused.
    """

    batch: Annotated[int, Ge(1)] = 4
    """Examples per forward pass."""
    learning_rate: Literal["auto"] | Annotated[float, Gt(0)] = 2e-4
    """Step size of the optimizer; with `fedkseed`, of each step along a direction. auto: the first round measures it,
    with `fedkseed` alone, whose default it is; orders always state a number."""
    steps: Annotated[int, Ge(1)] | None = None
    """Optimizer steps per round; with `fedkseed`, directions measured per round. Give either `steps` or `epochs`; a
    recipe with neither gets 10 steps."""
    epochs: Annotated[float, Gt(0)] | None = None
    """Passes over the client's examples per round, turned into steps for each client. Give either `steps` or `epochs`.
    """
    accumulation: Annotated[int, Ge(1)] = 1
    """Forward passes per optimizer step: one step sees batch * accumulation examples."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw: Adam with decoupled weight decay; sgd: stochastic gradient descent. Its memory starts empty in every
    round."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls after the warm-up, within the steps of one round: not at all, in a line or a half
    cosine to zero."""
    warmup: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Share of the steps over which the learning rate rises linearly from zero."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay of the adapter's parameters; 0 is off."""
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Momentum of sgd: share of the last step that is repeated; 0 is off. Not with adamw."""
    clip_norm: Annotated[float, Gt(0)] | None = 1.0
    """Gradients with a larger norm than this are scaled down to it; none never scales."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Dropout on the input of the trained adapter; nothing else of the model is dropped."""
    autocast: Literal["auto", "bf16", "off"] = "auto"
    """Arithmetic of forward passes. bf16: in bfloat16; off: in `model.dtype`; auto: bf16 where the device computes it
    fast (CUDA from Ampere on)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of storing them: less memory, about a third more time."""
    packing: bool = field(default=False, metadata=OMIT_DEFAULT)
    """Put short examples of a batch behind each other into one row, as long as its longest, in place of padding; unlike
    with `data.packing` none sees another, and steps and losses stay as they are, up to rounding. For causal models
    whose attention goes by positions; others are refused."""
    proximal: Annotated[float, Ge(0)] = field(default=0.0, metadata={**ON_SERVER, **OMIT_DEFAULT})
    """FedProx's mu: adds mu / 2 times the squared distance from the received values to the loss, for all that is
    trained; 0 is off."""
    objective: Literal["likelihood", "dpo"] = field(default="likelihood", metadata={**ON_SERVER, **OMIT_DEFAULT})
    """What training makes better. likelihood: the probability of each row's answer; dpo: that of the preferred answer
    over the rejected one, of rows that have both (`chosen` and `rejected`), as compared with the base."""
    dpo_beta: Annotated[float, Gt(0)] = field(default=0.1, metadata={**ON_SERVER, **OMIT_DEFAULT})
    """DPO's beta, with the objective dpo: how strongly a client is held to the base; the smaller, the further a pair of
    answers is moved apart before it counts as learned."""
    trainer: str | None = field(default=None, metadata={**ON_SERVER, **OMIT_DEFAULT})
    """In a simulation, a function that trains the adapter in place of fedtune: `package.module:function`, which Python
    can import. none: fedtune trains. A site names its own in its own file; no server can."""

    @property
    def rate(self) -> float:
        """The learning rate, where it is known to be a number, as in every order."""
        assert self.learning_rate != "auto"
        return self.learning_rate

    @property
    def preference(self) -> Preference | None:
        """The term that replaces the likelihood, where the objective compares answers."""
        return Preference(self.dpo_beta) if self.objective == "dpo" else None

    @property
    def rows(self) -> int:
        """Texts per forward pass: of a row with two answers both."""
        return self.batch * (2 if self.objective == "dpo" else 1)


@dataclass(frozen=True)
class Plan:
    """What one client is asked to train with in one round."""

    client: str
    rank: int
    """LoRA rank of every target module; the largest of `ranks` where these are given."""
    scale: float
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA: the factor between B as trained and b as sent."""
    training: Training
    """With `steps` set."""
    ratio: float = 0.0
    """Share of the blocks' weights to be pruned away, in [0, 0.875]; 0 leaves the model whole."""
    ranks: tuple[int, ...] = ()
    """LoRA rank by target module, in sorted order of their names; none: `rank` for all. A module of rank 0 is not
    trained, and no part of the update."""
    back: float = 0.0
    """Share of each block's heads and channels that the backward pass leaves out, in [0, 0.875]; the forward pass is
    whole."""
    base_dtype: BaseDtype = ""
    """Number format of the frozen base; empty: as the recipe's `model.dtype`."""
    view: View = "whole"
    """Which model the trained adapter is of. deployed: the pruned one alone; it never enters the whole model."""
    importance: ImportanceName = ""
    """How the client scores each module that it trains; empty: not at all. See `model.module_importance`."""

    def rank_of(self, modules: Iterable[str]) -> Mapping[str, int]:
        """Return the rank of each trained module, by name; modules of rank 0 are left out.

        Raises:
            ShapeError: if there are other than one rank a module, or none is trained.
        """
        names = sorted(modules)
        if not self.ranks:
            return dict.fromkeys(names, self.rank)
        if len(self.ranks) != len(names) or max(self.ranks) != self.rank:
            expected = f"one for each of {len(names)} modules, the largest {self.rank}"
            raise ShapeError(f"ranks: expected {expected}; got {len(self.ranks)}, the largest {max(self.ranks)}")
        return {name: rank for name, rank in zip(names, self.ranks, strict=True) if rank > 0}


@dataclass(frozen=True)
class PlannedClient:
    """A planner's choice for one client in one round, with what stays on the server."""

    plan: Plan
    first_ratio: float = 0.0
    """Smallest ratio that fits the device: a client that takes part for the first time measures its loss before
    training in a model pruned by this ratio."""
    deadline_s: float | None = None
    """When the planner expects the round to end."""
    why: str = ""
    """Reason for the choice, for the records."""
    down_rank: int | None = None
    """Largest rank of the global change that the client is sent; None: as the method's settings say."""
    top: float = 1.0
    """The share of the blocks, from the top, whose modules `Plan.ranks` trains, as the planner chose it; 1 where the
    ranks are of another choice."""
    share: float = 1.0
    """The share of the recipe's steps that the plan takes, as the planner chose it."""
    batch: int | None = None
    """Examples per forward pass, where the planner chose others than the recipe's."""
    arm: int | None = None
    """Index of the arm that the planner `expgrad` drew."""
    arm_probability: float = 1.0
    """With which it drew that."""
    whole_requested: bool = False
    """Whether the client is to measure its change in the whole model where it trains a smaller one; it holds both."""
    verb: VerbChoice | None = None
    """What the client does, where clients of one method may differ in it; None: as the method does. The plan's training
    is that of descending with `descend` and `auto`."""
    probing: Training | None = None
    """How the client measures seeds, with `steps` set: with `auto` where its memory allows no backward pass, and in a
    round in which all clients measure; None where no client of the run probes."""


@dataclass(frozen=True)
class TailRank:
    """Term of a client's objective: weight * sum over modules of ||B[:, g:]|| ||A[g:, :]||, g = decay * rank.

    HetLoRA's regulariser, Cho et al., EMNLP 2024, arXiv 2401.06432, section 3.2. Where the sum ends below its value at
    the start, the client cuts its factors to rank g.
    """

    weight: float
    """Lambda, at least 0; 0 leaves loss and rank as they are."""
    decay: float
    """Gamma, in (0, 1]."""


@dataclass(frozen=True)
class Proximal:
    """Term of a client's objective: mu / 2 * squared distance of all that is trained from its start.

    FedProx, Li et al., MLSys 2020, arXiv 1812.06127, equation 2.
    """

    mu: float
    """At least 0."""


@dataclass(frozen=True)
class Preference:
    """Term of a client's objective, in place of the likelihood: the preferred answer of each row over the rejected one.

    -log sigmoid(beta (log p(preferred)/p0(preferred) - log p(rejected)/p0(rejected))), p0 by the base without any
    change; DPO, Rafailov et al., NeurIPS 2023, arXiv 2305.18290, equation 7.
    """

    beta: float
    """Above 0."""


Term: TypeAlias = TailRank | Proximal | Preference


PersonalKind: TypeAlias = Literal["ditto", "pfedme", "fedrep", "share-a", "fedbn", "finetune"]
KEEP: Mapping[PersonalKind, tuple[str, ...]] = {"fedrep": (), "share-a": ("*.b",), "fedbn": ("*norm*",)}
"""Kinds by which some tensors stay with their client, and which these are where a recipe does not say."""
STRENGTH: Mapping[PersonalKind, float] = {"ditto": 0.1, "pfedme": 15.0}
"""Kinds whose personal model is pulled towards the global one, and how strongly: lambda of the papers."""
INNER_STEPS = 5
"""Of pFedMe on one mini-batch: K of the paper."""


@dataclass(frozen=True)
class Personal:
    """A model of its own for each client, which stays there; the recipe's table `personal`."""

    kind: PersonalKind = "ditto"
    """ditto: a second model, pulled towards the global one, which is trained as without it; pfedme: the client's part
    of the global model follows its personal one; fedrep: the tensors of `keep` are trained first, and stay, then the
    others; share-a: A of every layer is averaged, B stays; fedbn: the norms stay; finetune: nothing stays, the global
    model is trained for a few steps before it is scored."""
    keep: Sequence[str] = ()
    """With fedrep, share-a and fedbn: tensors that stay with their client, by globs over their names: `<module>.a`,
    `<module>.b`, and the parameters of `adapter.modules_to_save`. Small and capital letters count alike. Empty: `*.b`
    with share-a, `*norm*` with fedbn."""
    strength: Annotated[float, Ge(0)] | None = None
    """With ditto and pfedme: lambda, by which the personal model is pulled towards the global one; 0 is none. none: 0.1
    with ditto, 15 with pfedme."""
    rate: Annotated[float, Gt(0)] | None = None
    """Step size of the personal steps; none: that of the client in the round."""
    steps: Annotated[int, Ge(1)] | None = None
    """Personal steps in a round; with pfedme, those on one mini-batch; with finetune, before a score. none: as many as
    the client's other steps, with pfedme 5."""

    @property
    def pull(self) -> float:
        """Lambda of ditto and pfedme; 0 of all others."""
        return STRENGTH.get(self.kind, 0.0) if self.strength is None else self.strength

    @property
    def has_state(self) -> bool:
        """Whether a client stores tensors from round to round."""
        return self.kind != "finetune"

    def keeps(self, name: str) -> bool:
        """Return whether a tensor stays with its client."""
        return any(fnmatchcase(name.lower(), glob.lower()) for glob in self.keep)

    def in_full(self) -> Personal:
        """Return the same with the defaults of its kind written out, as it travels."""
        steps = INNER_STEPS if self.kind == "pfedme" and self.steps is None else self.steps
        strength = self.pull if self.kind in STRENGTH else self.strength
        return replace(self, keep=tuple(self.keep) or KEEP.get(self.kind, ()), strength=strength, steps=steps)


@dataclass(frozen=True)
class PersonalTrace:
    """Which personal state a client has started from, and which it has stored: 8 bytes of either's digest."""

    before: bytes = b""
    """Empty: none, so that the personal model has started from the server's values."""
    after: bytes = b""


@dataclass(frozen=True)
class Pruning:
    """How a client makes its model smaller for one round, and what it measures around that.

    Structures travel as bitmaps over the whole base (`structure.bitmap`); empty bytes are the whole model.
    """

    settings: PruningSettings
    stages: tuple[bytes, ...] = ()
    """Structures to train in, one after the other, each a part of the one before; none: the whole model, or with the
    policy `local` what the client's own scores say."""
    previous: bytes = b""
    """Structure of the client's last participation, in which `loss_before` is measured."""
    scores_requested: bool = False
    """Scores are to be sent, or with the policy `vote` a mask."""
    moments_requested: bool = False
    """Moments of the layers' inputs are to be sent, by which pruned models are repaired; asked of clients that train
    the whole model."""
    whole_requested: bool = False
    """The losses are to be measured in the whole model as well, of a client that holds it; the blobs are then in the
    coordinates of the whole base."""


@dataclass(frozen=True)
class TrainLora:
    """The task to train a LoRA adapter by first-order steps: where it starts, what is trained, what is sent back.

    A starts as `draw_a(a_key, ...)` and B as zero; then the rows of A and the columns of B that came in the blob
    `local` take the first places (b is divided by the plan's scale).
    """

    a_key: int
    train: Literal["ab", "b"] = "ab"
    upload: Upload = "factors"
    """difference: end minus start of either factor, which keeps its precision in a wire format of 16 bits or fewer."""
    wire_dtype: WireDtype = "bf16"
    """Number format of the upload; modules_to_save always travel in fp32."""
    terms: tuple[Term, ...] = ()
    """Of the objective, beside the loss on the client's examples or, with `Preference`, in its place; each kind at most
    once."""
    blobs: Mapping[str, Tensors] = field(default_factory=dict)
    """Tensors by role: `global` (frozen adapter), `local` (start of the trainable one), `saved` (modules_to_save),
    `moments` (of the base's layers, by which a pruned model is repaired).

    Adapters are flat, as `adapter.pack` makes them. In `global`, `<module>.w` (out, in) may replace both factors. Both
    may be quantised (`number_formats`).
    """
    pruning: Pruning | None = None
    """How the model is pruned; the blobs are in the coordinates of all that `stages` and `previous` keep, or of the
    whole base with the policy `local`."""
    personal: Personal | None = None
    """How the client trains a model of its own beside; tensors that it keeps come in no blob, and in no update."""


@dataclass(frozen=True)
class SeedState:
    """The accumulators of FedKSeed as they travel; see `directions.downlink`."""

    form: Literal["whole", "changed", "log"]
    since: int
    """Rounds whose result the client must know, for `changed` and `log`; 0: accumulators of zero."""
    data: bytes
    round: int
    """Rounds that are in the accumulators."""
    digest: bytes
    """SHA-256 of the seed ledger that they give, 32 bytes."""


@dataclass(frozen=True)
class ProbeSeeds:
    """The task to measure losses along seeded directions: how, and from which weights; see `directions`."""

    bank: BankName
    seeds: int
    """K."""
    key: int
    """Of the newest bank, 64 bits."""
    exponent: int
    """e of the displacement unit 2^-e."""
    shift: int
    """A scalar of one on the wire moves an accumulator by 2^shift."""
    perturbation: int
    """E, in displacement units: the loss is measured at A - E and A + E."""
    state: SeedState
    sampling: Sampling = "uniform"
    levels: bytes = b""
    """`pro`: a byte per seed, its share of the draws."""
    estimator: Estimator = "two-sided"
    queries: int = 1
    """`one-sided`: directions per optimizer step."""
    normalise: bool = False
    """`one-sided`: divide by the standard deviation of the step's losses instead of by the perturbation."""
    clip: float = math.inf
    """Largest |g|: a number, infinite for none, or 0 for twice the running 0.9-quantile."""
    trainable: Sequence[str] = ()
    """Globs over the tensors that are moved; none takes all that the bank allows."""
    vectors: bool = False
    embeddings: bool = False
    calibrate: bool = False
    """Measure how large g is and move nothing."""
    head: Tensors = field(default_factory=dict)
    """In the base's place, by parameter name, float32, where the run has made it of class sums; sent with a state that
    needs no earlier one, and known to clients from there."""
    groups: Groups = 1
    earlier: tuple[int, ...] = ()
    """Keys of the banks before the newest one, oldest first, 64 bits each."""
    curvatures: bool = False
    """With `calibrate`: along directions that all clients share, and the curvature too, so that the server can choose
    the learning rate."""


@dataclass(frozen=True)
class SumClasses:
    """The task to sum the features that a classifier's head reads, by class; nothing is trained. See `class_sums`."""

    fraction_bits: int
    """Features are rounded to whole numbers of 2^-fraction_bits."""


@dataclass(frozen=True)
class DescendSeeds:
    """The task to move the numbers of seeded directions by first-order steps, and to send what each has moved by.

    The plan's training is that of these steps: its `learning_rate` is the root mean square of the weights' change in
    one step, as a share of that of the base's own weights.
    """

    probe: ProbeSeeds
    """From which weights and along which directions; and how to measure them, where `fallback` says with which steps.
    """
    count: int
    """Numbers of the answer: groups x K."""
    largest_shift: int
    """A number of one in the answer moves an accumulator by at most 2^largest_shift."""
    bits: ScalarBits = 8
    """Of each number of the answer."""
    fallback: Training | None = None
    """How a client whose memory does not allow a backward pass measures seeds instead, with `steps` set: it then
    answers as to a `ProbeSeeds` task. None: it fails."""


SeedTask: TypeAlias = ProbeSeeds | DescendSeeds
Task: TypeAlias = TrainLora | SeedTask | SumClasses
VERBS: Mapping[type[Task], Verb] = {TrainLora: "adapt", ProbeSeeds: "probe", DescendSeeds: "descend"}
"""The names of the tasks in recipes."""
