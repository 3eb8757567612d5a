"""The nouns of a round: what a client is asked, what it answers, and what becomes of a client that fails."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval

from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import BlockLayout, ModelStructure
from fedtune.tensors import Array, Tensors

WireDtype: TypeAlias = Literal["fp32", "bf16", "fp16"]
Weighting: TypeAlias = Literal["examples", "uniform"]
BankName: TypeAlias = Literal["hadamard", "gaussian", "kron"]
Sampling: TypeAlias = Literal["uniform", "distinct", "pro"]
Estimator: TypeAlias = Literal["two-sided", "one-sided"]
Verb: TypeAlias = Literal["adapt", "probe"]


@dataclass(frozen=True)
class Client:
    """One member of the fleet, by its lasting name."""

    name: str
    num_examples: int
    """Training examples the client holds; never below 1."""
    memory_bytes: int = 0
    """Main memory of its machine, as it says itself; 0 where it is not known."""


@dataclass(frozen=True)
class Training:
    """How a client trains; the recipe's table `client`. To `probe`, batch, learning_rate and steps are all there is."""

    batch: Annotated[int, Ge(1)]
    """Examples per forward pass."""
    learning_rate: Annotated[float, Gt(0)]
    """Step size of the optimizer, or of a step of FedKSeed."""
    steps: Annotated[int, Ge(1)] | None = None
    """Optimizer steps per round; exactly one of `steps` and `epochs` is given."""
    epochs: Annotated[float, Gt(0)] | None = None
    """Passes over the client's examples per round; the planner turns them into steps."""
    accumulation: Annotated[int, Ge(1)] = 1
    """Forward passes per optimizer step: one step sees batch * accumulation examples."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw: Adam with decoupled weight decay; sgd: stochastic gradient descent."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate over this client's steps of this round, after the warm-up."""
    warmup: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Share of the steps over which the learning rate rises linearly from zero."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay of the adapter's parameters; 0 is off."""
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """SGD only."""
    clip_norm: Annotated[float, Gt(0)] | None = 1.0
    """Gradient norm above which gradients are scaled down; none leaves them as they are."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """On the input of the trainable adapter only."""
    autocast: Literal["auto", "bf16", "off"] = "auto"
    """bf16 arithmetic in forward passes; auto: where the device has fast bf16 (CUDA from Ampere on)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class Plan:
    """What a planner asks of one client in one round."""

    client: str
    rank: int
    """LoRA rank of every target module."""
    scale: float
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA: the factor between B as trained and b as sent."""
    training: Training
    """With `steps` set."""
    ratio: float = 0.0
    """Share of the blocks' weights to be pruned away, in [0, 0.875]; 0 leaves the model whole."""
    first_ratio: float = 0.0
    """The least that fits the device: where a client takes part for the first time, its loss before is measured in a
    model pruned by so much; never travels."""
    deadline_s: float | None = None
    """When the planner expects the round to be over; never travels."""
    why: str = ""
    """What spoke for this plan, for the records; never travels."""


@dataclass(frozen=True)
class LocalAdapter:
    """Where a client's trainable adapter starts, which factors are trained, and what is sent back.

    A starts as `draw_a(a_key, ...)` and B as zero; then the rows of A and the columns of B that came in the blob
    `local` take the first places (b is divided by the plan's scale).
    """

    a_key: int
    train: Literal["ab", "b"] = "ab"
    upload: Literal["factors", "difference"] = "factors"
    """difference: end minus start of either factor, which keeps its precision in a 16-bit wire format."""
    wire_dtype: WireDtype = "bf16"
    """Number format of the upload; modules_to_save always travel in fp32."""
    rank_penalty: float = 0.0
    """HetLoRA's lambda: weight of ||B[:, g:]|| ||A[g:, :]|| in the loss, g = rank_decay * rank; 0 is off."""
    rank_decay: float = 1.0
    """HetLoRA's gamma; when the penalised product falls below its value at the start, the rank becomes g."""


@dataclass(frozen=True)
class Pruning:
    """How a client makes its model smaller for one round, and what it measures around that.

    Structures travel as bitmaps over the whole base (`keep.bitmap`); empty bytes stand for the whole model.
    """

    settings: PruningSettings
    stages: tuple[bytes, ...] = ()
    """What is kept, one structure after the other, each a part of the one before; none: the whole model, or with the
    policy `local` what the client's own scores say."""
    before: bytes = b""
    """Structure of the client's last participation, in which `loss_before` is measured."""
    wanted: bool = False
    """Scores are to be sent, or with the policy `vote` a mask."""


@dataclass(frozen=True)
class SeedState:
    """The accumulators of FedKSeed as they travel; see `directions.downlink`."""

    form: Literal["whole", "changed", "log"]
    since: int
    """Rounds whose result the client must know, for `changed` and `log`; 0 stands for accumulators of zero."""
    data: bytes
    round: int
    """Rounds that are in the accumulators."""
    digest: bytes
    """SHA-256 of the seed ledger that they give, 32 bytes."""


@dataclass(frozen=True)
class Probe:
    """How a client measures along seeded directions, and from which weights; see `directions`."""

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


@dataclass(frozen=True)
class ProbeResult:
    """What a client measured along its seeds."""

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
class Assignment:
    """Server -> client: everything one client needs for one round, beside the base model that it has."""

    method: str
    round: int
    seed: int
    """This client's key for this round; data order and dropout are derived from it."""
    plan: Plan
    local: LocalAdapter
    blobs: Mapping[str, Tensors] = field(default_factory=dict)
    """Tensors by role: `global` (frozen adapter), `local` (start of the trainable one), `saved` (modules_to_save).

    Adapters are flat, as `adapter.pack` makes them. In `global`, `<module>.w` (out, in) may stand for both factors.
    """
    base: str = ""
    """Digest of the base model that the tensors belong to."""
    probe: Probe | None = None
    """What to measure, for the verb `probe`; `local` and `blobs` are idle then."""
    surgery: Pruning | None = None
    """How the model is pruned; the blobs are in the coordinates of all that `stages` and `before` keep, or of the whole
    base with the policy `local`."""
    whole: Assignment | None = None
    """Never travels: what is sent instead to a client that does not hold the accumulators `probe` refers to."""

    @property
    def verb(self) -> Verb:
        return "adapt" if self.probe is None else "probe"


@dataclass(frozen=True)
class Measured:
    """What a client measured while it worked."""

    seconds: float = 0.0
    peak_bytes: int = 0
    tokens: int = 0
    """Tokens that went forward in training, padding left out."""
    loss_before: float | None = None
    """Mean training loss of the first step's batch, under the model as received. With surgery: of up to 16 rows, in
    the structure of the last participation."""
    loss_after: float | None = None
    """Mean training loss over the last tenth of the steps (at least one). With surgery: of the same rows."""
    importance: float | None = None
    """With surgery: mean over the steps of the sum of |parameter * gradient| over the trained factors."""
    side_tokens: int = 0
    """Tokens that went forward for scores and for the losses above."""


@dataclass(frozen=True)
class ClientUpdate:
    """Client -> server: what one client learned in one round."""

    client: str
    round: int
    num_examples: int
    tensors: Tensors
    """Flat factors `<module>.a`, `<module>.b`, the scale folded into b; only `.b` where only B is trained."""
    saved: Tensors = field(default_factory=dict)
    """modules_to_save, by parameter name, float32."""
    measured: Measured = Measured()
    base: str = ""
    probed: ProbeResult | None = None
    """What came of the verb `probe`; `tensors` and `saved` are empty then."""
    kept: bytes = b""
    """Digest of what was kept (`Keep.digest`), in whose coordinates the tensors are; empty for the whole model."""
    mask: bytes = b""
    """Bitmap of what was kept (policy `local`), or of what the client would keep (`vote`, where it was wanted)."""
    scores: Tensors = field(default_factory=dict)
    """`heads` and `channels` of what was kept, float16, in units of their means, where they were wanted."""
    keep: ModelStructure | None = None
    """Never travels: what `kept` stands for, once the update is admitted."""
    ratio: float = 0.0
    """Never travels: the plan's pruning ratio, once the update is admitted."""


@dataclass(frozen=True)
class Failure:
    """A client whose update of this round is not used, and why: a value, not an exception."""

    client: str
    reason: str
    kind: Literal["failed", "refused", "late", "unfit"] = "failed"
    """failed: the client could not do it; refused: the server would not take it; late: no answer in time; unfit:
    nothing that could be asked fits its device, so it was not asked."""
    code: str = field(default="", compare=False)
    """Of a refused update: which of the schema's reasons it is."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client in one round, counted on the encoded messages."""

    down: int = 0
    up: int = 0


Outcome: TypeAlias = ClientUpdate | Failure

OUT_OF_MEMORY = "memory ran out"
"""Stands in the reason of a client whose device could not hold what it was asked; planners look for it."""


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
    """`directions.manifest.Manifest.encode` of the base, for methods that move all of it; empty for others."""
    anatomy: BlockLayout | None = None
    """Of the base's blocks; None where surgery does not know them."""
    pruning: PruningSettings | None = None
    """How clients' models are made smaller; None where they are not."""
    ranking: Tensors = field(default_factory=dict)
    """`heads` and `channels`: worth of each, where the recipe names an order; empty where clients are asked first."""


def cohort_weights(updates: Sequence[ClientUpdate], weights: Weighting) -> Sequence[tuple[ClientUpdate, float]]:
    """Return (update, p_k) sorted by client name, the p_k summing to 1: by examples, or uniform.

    Sorting here makes every method independent of the order in which answers arrived.
    """
    cohort = sorted(updates, key=lambda update: update.client)
    sizes = [update.num_examples if weights == "examples" else 1 for update in cohort]
    return [(update, size / sum(sizes)) for update, size in zip(cohort, sizes, strict=True)]
