"""The messages of a round as values: assignments, updates and failures, with the settings that travel in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval

from fedtune.errors import ShapeError
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import BlockLayout, ModelStructure
from fedtune.tensors import Array, Tensors

WireDtype: TypeAlias = Literal["fp32", "bf16", "fp16", "int8", "int4"]
Upload: TypeAlias = Literal["factors", "difference"]
Weighting: TypeAlias = Literal["examples", "uniform"]
BankName: TypeAlias = Literal["hadamard", "gaussian", "kron"]
Sampling: TypeAlias = Literal["uniform", "distinct", "pro"]
Estimator: TypeAlias = Literal["two-sided", "one-sided"]
Verb: TypeAlias = Literal["adapt", "probe"]
BaseDtype: TypeAlias = Literal["", "int8", "nf4"]
View: TypeAlias = Literal["whole", "deployed"]
ImportanceName: TypeAlias = Literal["", "gain", "gradient", "svd", "adalora"]
Role: TypeAlias = Literal["change", "factors", "saved", "scalars", "mean"]
"""Parts of an update's change that are bounded apart: the layers' products b a, the factors' own numbers,
modules_to_save, the scalars of seeds, and what a `LinearMethod` takes the mean of."""
MOVES: Sequence[Role] = ("change", "saved", "scalars")
"""The roles by which the model itself moves."""

OMIT_DEFAULT: Mapping[str, bool] = {"omit_default": True}
"""Metadata of a recipe's key that a release added: at its default it is left out of a recipe's text and of its digest,
so that digests which sites have pinned in their policies still hold."""
ON_SERVER: Mapping[str, bool] = {"travels": False}
"""Metadata of a settings field that is no part of the settings on the wire."""


@dataclass(frozen=True)
class Client:
    """One member of the fleet, by its lasting name."""

    name: str
    num_examples: int
    """Training examples the client holds; never below 1."""
    memory_bytes: int = 0
    """Main memory of its machine, as it says itself; 0 where it is not known."""
    organisation: str = ""
    """That it belongs to, by the roster; empty where there is none, and it is taken for one of its own."""
    s_per_tflop: float | None = None
    """Seconds for 1e12 operations, as it has measured for the coming round alone; None where it has not."""
    s_per_mb: float | None = None
    """Seconds for a megabyte, down and up alike, measured likewise."""


@dataclass(frozen=True)
class Training:
    """How a client trains in one round; the recipe's table `client`.

    With `fedkseed` there are only batch, learning_rate, steps and epochs; the other keys are refused.
    """

    batch: Annotated[int, Ge(1)] = 4
    """Examples per forward pass."""
    learning_rate: Annotated[float, Gt(0)] = 2e-4
    """Step size of the optimizer; with `fedkseed`, of each step along a direction."""
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
    whole_requested: bool = False
    """Whether the client is to measure its change in the whole model where it trains a smaller one; it holds both."""


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


Term: TypeAlias = TailRank | Proximal


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
    """Of the objective, beside the loss on the client's examples; each kind at most once."""
    blobs: Mapping[str, Tensors] = field(default_factory=dict)
    """Tensors by role: `global` (frozen adapter), `local` (start of the trainable one), `saved` (modules_to_save),
    `moments` (of the base's layers, by which a pruned model is repaired).

    Adapters are flat, as `adapter.pack` makes them. In `global`, `<module>.w` (out, in) may replace both factors. Both
    may be quantised (`number_formats`).
    """
    pruning: Pruning | None = None
    """How the model is pruned; the blobs are in the coordinates of all that `stages` and `previous` keep, or of the
    whole base with the policy `local`."""


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
    """Of the bank, 64 bits."""
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


Task: TypeAlias = TrainLora | ProbeSeeds
VERBS: Mapping[type[Task], Verb] = {TrainLora: "adapt", ProbeSeeds: "probe"}
"""The names of the tasks in recipes."""


@dataclass(frozen=True)
class Assignment:
    """Server -> client: everything one client needs for one round, beside the base model that it has."""

    method: str
    round: int
    seed: int
    """This client's key for this round; data order and dropout are derived from it."""
    plan: Plan
    """Of a `ProbeSeeds` task only `client` and the training's batch, learning_rate and steps are used."""
    task: Task
    base: str = ""
    """Digest of the base model that the tensors belong to."""
    labels: tuple[str, ...] = ()
    """Class names that the client must use, by class; none: its own."""
    date: str = ""
    """The day that its chat template writes, such as "2026-11-29"; empty: its own."""

    @property
    def lora(self) -> TrainLora:
        """The task, where it is known to be this one."""
        assert isinstance(self.task, TrainLora)
        return self.task

    @property
    def probe(self) -> ProbeSeeds:
        """The task, where it is known to be this one."""
        assert isinstance(self.task, ProbeSeeds)
        return self.task


@dataclass(frozen=True)
class Measured:
    """What a client measured while it worked."""

    seconds: float = 0.0
    peak_bytes: int = 0
    tokens: int = 0
    """Tokens that went forward in training, padding left out."""
    loss_before: float | None = None
    """Mean loss before training, under the model as received, on some of the client's held-out rows, or of its training
    rows if it holds out none. With pruning: in the structure of the last participation."""
    loss_after: float | None = None
    """Mean loss after training, on the same rows."""
    importance: float | None = None
    """With pruning: mean over the steps of the sum of |parameter * gradient| over the trained factors."""
    side_tokens: int = 0
    """Tokens that went forward for scores of modules, and with pruning for other scores and for the losses above."""
    skipped_steps: int = 0
    """Optimizer steps that were left out because their loss or gradient was not finite."""
    whole_loss_before: float | None = None
    """As `loss_before`, in the whole model: of a client that trained a smaller one, and holds the whole base."""
    whole_loss_after: float | None = None
    """The same after training, with its change scattered to the whole model."""
    module_importance: tuple[float, ...] = ()
    """Where it was asked for: the share of each trained module, in sorted order of their names; their sum is 1."""
    joules: float | None = None
    """Energy that the client's machine took meanwhile, where it counts it and the client's policy lets it be sent."""


@dataclass(frozen=True)
class LoraResult:
    """The result of a `TrainLora` task."""

    tensors: Tensors
    """Flat factors `<module>.a`, `<module>.b`, the scale folded into b; only `.b` where only B is trained. Quantised as
    they travel (`number_formats`), float32 once they are admitted."""
    saved: Tensors = field(default_factory=dict)
    """modules_to_save, by parameter name, float32."""
    base: str = ""
    """Digest of the base that was trained on."""
    structure_digest: bytes = b""
    """Digest of the structure (`ModelStructure.digest`) in whose coordinates the tensors are; empty: all."""
    mask: bytes = b""
    """Bitmap of that structure (policy `local`), or of the one the client votes for (`vote`, where requested)."""
    scores: Tensors = field(default_factory=dict)
    """`heads` and `channels` of that structure, float16, in units of their means, where they were requested."""
    base_dtype: BaseDtype = ""
    """Number format of the frozen base that was trained over, where it was quantised."""
    codes: bytes = b""
    """First 8 bytes of the digest of three of its layers' codes, by which clients of one format agree."""
    moments: Tensors = field(default_factory=dict)
    """Of the inputs of layers that read heads or channels (`least_squares.moment_shapes`), float16, where they were
    requested."""


@dataclass(frozen=True)
class ProbeResult:
    """The result of a `ProbeSeeds` task."""

    scalars: Array
    """int8, one per seed drawn, in the order of the draws."""
    state: bytes = b""
    """First 8 bytes of the digest of the ledger that the client started from."""
    checks: bytes = b""
    """First 4 bytes of the SHA-256 of the displacements of each block that the state's digest draws."""
    skipped: int = 0
    """Scalars that are 0 because a loss was not finite."""
    rms: float | None = None
    """`calibrate`: root mean square of learning_rate * g."""
    lost: bool = False
    """The client does not hold the accumulators that the message refers to: it asks for them whole."""


@dataclass(frozen=True)
class ClientUpdate:
    """Client -> server: what one client learned in one round."""

    client: str
    round: int
    num_examples: int
    result: LoraResult | ProbeResult
    measured: Measured = Measured()

    @property
    def lora(self) -> LoraResult:
        """The result, where the task is known to have been `TrainLora`."""
        assert isinstance(self.result, LoraResult)
        return self.result

    @property
    def probe(self) -> ProbeResult:
        """The result, where the task is known to have been `ProbeSeeds`."""
        assert isinstance(self.result, ProbeResult)
        return self.result


@dataclass(frozen=True)
class ScoreRequest:
    """Server -> client: score a global model on the rows that the client trains nothing on."""

    client: str
    method: str
    round: int
    """The last round that is in the model; 0 for the base."""
    base: str
    """Digest of the base model that the tensors belong to."""
    batch: int
    """Examples per forward pass."""
    examples: int = 0
    """Of the held-out rows at most the first so many; 0: all."""
    blobs: Mapping[str, Tensors] = field(default_factory=dict)
    """Tensors by role: `global` (adapter of scale 1, flat), `saved` (modules_to_save)."""
    ledger: bytes = b""
    """The model as seeds (`SeedLedger.encode`); empty where it is in the blobs."""
    trainable: tuple[int, ...] = ()
    """Ordinals of the tensors that the seeds move."""
    labels: tuple[str, ...] = ()
    """Class names that the client must use, by class; none: its own."""
    date: str = ""
    """The day that its chat template writes, such as "2026-11-29"; empty: its own."""


@dataclass(frozen=True)
class ClientScores:
    """Client -> server: what a global model scores on the rows that one client holds out."""

    client: str
    round: int
    """Of the request."""
    base: str
    """Digest of the base that was scored with."""
    metrics: Mapping[str, float]
    """By name: `loss`, `accuracy`, ..., and how much was scored: `examples`, `tokens`."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Size:
    """How large one role of a change is."""

    norm: float
    """Frobenius norm over all its parts."""
    largest: str = ""
    """Name of the part with the largest share."""


@dataclass(frozen=True)
class Weight:
    """What a client counts in one round: whole numbers, of which only the proportions matter."""

    examples: int
    """Where clients count in proportion to their examples."""
    uniform: int
    """Where all count the same, as far as their organisations do not have too many of them."""


@dataclass(frozen=True)
class AdmittedUpdate:
    """An update that answers its assignment in every respect; methods aggregate these."""

    update: ClientUpdate
    structure: ModelStructure | None = None
    """In whose coordinates the tensors are; None: the whole base."""
    ratio: float = 0.0
    """The plan's pruning ratio; 0 where the whole model was trained."""
    sizes: Mapping[Role, Size] = field(default_factory=dict)
    """How large its change is, by role; each is within the bounds of the round."""
    weight: Weight | None = None
    """What it counts, as set before the round began; None outside of rounds: its own examples."""
    upload: Upload = "factors"
    """What its tensors are, as the task has asked."""
    view: View = "whole"
    """Of which model it trained the adapter, as the plan has asked."""
    down_rank: int | None = None
    """Largest rank of the global change that its client was sent, where the planner chose one."""

    @property
    def ranks(self) -> Mapping[str, int]:
        """The rank of each module that it has factors of, by name."""
        tensors = self.update.lora.tensors
        return {name.removesuffix(".b"): int(b.shape[1]) for name, b in tensors.items() if name.endswith(".b")}

    def counts(self, weights: Weighting) -> int:
        """Return what the update counts in a mean over its cohort, in proportion to the others."""
        own = self.weight or Weight(self.num_examples, 1)
        return own.examples if weights == "examples" else own.uniform

    @property
    def norm(self) -> float:
        """Frobenius norm of all that the update moves in the model."""
        # The other roles are these numbers again, in other coordinates.
        return math.sqrt(sum(self.sizes[role].norm ** 2 for role in MOVES if role in self.sizes))

    @property
    def client(self) -> str:
        return self.update.client

    @property
    def num_examples(self) -> int:
        return self.update.num_examples

    @property
    def measured(self) -> Measured:
        return self.update.measured

    @property
    def lora(self) -> LoraResult:
        """The result, of a method whose task is `TrainLora`."""
        return self.update.lora

    @property
    def probe(self) -> ProbeResult:
        """The result, of a method whose task is `ProbeSeeds`."""
        return self.update.probe


OUT_OF_MEMORY = "memory ran out"
"""In the text of the error of a client whose device could not hold what it was asked; see `Failure.from_text`."""


@dataclass(frozen=True, eq=False)
class Failure:
    """A client whose update of this round is not used, and why: a value, not an exception.

    Two are equal if client, kind and reason are: one that was read back from a journal equals the one that was written.
    """

    client: str
    _: KW_ONLY
    expected: str = ""
    """What was expected; empty where `got` is the whole text of another program's error."""
    got: str = ""
    hint: str = ""
    """What to do."""
    where: str = ""
    """What it is about, such as a tensor's name."""
    kind: Literal["failed", "refused", "late", "unfit"] = "failed"
    """failed: the client could not do it; refused: the server would not take it; late: no answer in time; unfit:
    no feasible plan for its device, so it was not asked."""
    code: str = ""
    """Of a refused update: which of the schema's reasons it is. OUT_OF_MEMORY, WORKER_DIED: why the client failed."""

    @property
    def reason(self) -> str:
        """The same in one sentence, as records and journal hold it."""
        where, hint = f"{self.where}: " if self.where else "", f"; {self.hint}" if self.hint else ""
        parts = [f"expected {self.expected}"] if self.expected else []
        parts += [f"got {self.got}" if self.expected else self.got] if self.got else []
        return f"{where}{'; '.join(parts)}{hint}"

    @property
    def out_of_memory(self) -> bool:
        return self.code == "OUT_OF_MEMORY"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Failure) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[str, str, str]:
        return self.client, self.kind, self.reason

    @classmethod
    def from_text(
        cls, client: str, text: str, *, kind: Literal["failed", "refused", "late", "unfit"] = "failed", code: str = ""
    ) -> Failure:
        """Return the failure whose reason is a text that came from another process or was read back.

        Only text crosses these borders, so this is the one place where a phrase in it becomes a code.
        """
        if kind == "failed" and not code and OUT_OF_MEMORY in text:
            code = "OUT_OF_MEMORY"
        where, _, rest = text.partition("expected ")
        expected, _, got = rest.partition("; got ")
        where = where.removesuffix(": ")
        failure = cls(client, expected=expected, got=got, where=where, kind=kind, code=code)
        # Where the parts do not give the text again it stays whole: a record must say what the journal says.
        return failure if failure.reason == text else cls(client, got=text, kind=kind, code=code)


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client in one round, counted on the encoded messages."""

    down: int = 0
    up: int = 0


Outcome: TypeAlias = AdmittedUpdate | Failure


@dataclass(frozen=True)
class Blueprint:
    """What a method must know before the first round."""

    modules: Mapping[str, tuple[int, int]]
    """(out, in) of every module that gets an adapter, by full name."""
    saved: Mapping[str, Array]
    """Initial values of modules_to_save, by parameter name, float32."""
    max_rank: int
    """The largest rank planned for any client."""
    seed: int
    """The run's seed."""
    manifest: bytes = b""
    """`directions.seed_ledger.Manifest.encode` of the base, for methods that move all of it; empty for others."""
    anatomy: BlockLayout | None = None
    """Of the base's blocks; None for a model that cannot be pruned."""
    pruning: PruningSettings | None = None
    """How clients' models are made smaller; None where they are not."""
    ranking: Tensors = field(default_factory=dict)
    """`heads` and `channels`: importance of each, where the recipe names a ranking; empty where clients measure it."""
    moments: Tensors = field(default_factory=dict)
    """By which pruned models are repaired, where the recipe names a ranking; empty where clients measure them."""


def cohort_weights(updates: Sequence[AdmittedUpdate], weights: Weighting) -> Sequence[tuple[AdmittedUpdate, float]]:
    """Return (update, p_k) sorted by client name, the p_k summing to 1: by the weights of the round.

    Sorting here makes every method independent of the order in which answers arrived.
    """
    cohort = sorted(updates, key=lambda update: update.client)
    # Integers, so that the sum is exact and every p_k is rounded only once.
    sizes = [update.counts(weights) for update in cohort]
    return [(update, size / sum(sizes)) for update, size in zip(cohort, sizes, strict=True)]
