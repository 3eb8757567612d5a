"""The messages of a round as values: assignments, updates and failures; what they ask for stands in `fedtune.tasks`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal, TypeAlias

from fedtune.class_sums import ClassSums
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import BlockLayout, ModelStructure
from fedtune.tasks import (
    OMIT_DEFAULT,
    ON_SERVER,
    VERBS,
    BankName,
    BaseDtype,
    DescendSeeds,
    Estimator,
    ImportanceName,
    Personal,
    PersonalTrace,
    Plan,
    PlannedClient,
    Preference,
    ProbeSeeds,
    Proximal,
    Pruning,
    Sampling,
    ScalarBits,
    SeedState,
    SeedTask,
    SumClasses,
    TailRank,
    Task,
    Term,
    Training,
    TrainLora,
    Upload,
    Verb,
    VerbChoice,
    View,
    WireDtype,
)
from fedtune.tensors import Array, Tensors

__all__ = [
    "MOVES",
    "OMIT_DEFAULT",
    "ON_SERVER",
    "OUT_OF_MEMORY",
    "VERBS",
    "AdmittedUpdate",
    "Assignment",
    "BankName",
    "BaseDtype",
    "Blueprint",
    "Client",
    "ClientScores",
    "ClientUpdate",
    "DescendResult",
    "DescendSeeds",
    "Estimator",
    "Failure",
    "ImportanceName",
    "LoraResult",
    "Measured",
    "Outcome",
    "Personal",
    "PersonalRequest",
    "PersonalTrace",
    "Plan",
    "PlannedClient",
    "Preference",
    "ProbeResult",
    "ProbeSeeds",
    "Proximal",
    "Pruning",
    "Role",
    "Sampling",
    "ScalarBits",
    "ScoreRequest",
    "SeedResult",
    "SeedState",
    "SeedTask",
    "Size",
    "SumClasses",
    "TailRank",
    "Task",
    "Term",
    "Traffic",
    "TrainLora",
    "Training",
    "Upload",
    "Verb",
    "VerbChoice",
    "View",
    "Weight",
    "Weighting",
    "WireDtype",
    "cohort_weights",
]

Weighting: TypeAlias = Literal["examples", "uniform"]
Role: TypeAlias = Literal["change", "factors", "saved", "scalars", "numbers", "features", "mean"]
"""Parts of an update's change that are bounded apart: the layers' products b a, the factors' own numbers,
modules_to_save, the scalars of seeds that were measured, the numbers of those that a client moved by first-order steps,
the root mean square of features that are summed, and what a `LinearMethod` takes the mean of."""
MOVES: Sequence[Role] = ("change", "saved", "scalars", "numbers")
"""The roles by which the model itself moves."""


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
class Assignment:
    """Server -> client: everything one client needs for one round, beside the base model that it has."""

    method: str
    round: int
    seed: int
    """This client's key for this round; data order and dropout are derived from it."""
    plan: Plan
    """Of a `ProbeSeeds` task only `client` and the training's batch, learning_rate and steps are used; of a
    `DescendSeeds` task the training's accumulation too."""
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
        """What the task says of accumulators, directions and measuring, where it is known to be one of seeds."""
        assert isinstance(self.task, SeedTask)
        return self.task.probe if isinstance(self.task, DescendSeeds) else self.task

    @property
    def descend(self) -> DescendSeeds:
        """The task, where it is known to be this one."""
        assert isinstance(self.task, DescendSeeds)
        return self.task

    @property
    def sums(self) -> SumClasses:
        """The task, where it is known to be this one."""
        assert isinstance(self.task, SumClasses)
        return self.task

    def probed_instead(self) -> Assignment | None:
        """Return the order to measure seeds in place of one to descend; None where it is none, or allows it not."""
        task = self.task
        if not isinstance(task, DescendSeeds) or task.fallback is None:
            return None
        return replace(self, plan=replace(self.plan, training=task.fallback), task=task.probe)


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
    personal: PersonalTrace | None = None
    """Of the client's personal state, which itself stays there, where the task has asked for one."""


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
    """`calibrate`: root mean square of learning_rate * g; None where `slopes` say it."""
    lost: bool = False
    """The client does not hold the accumulators that the message refers to: it asks for them whole. It so answers a
    `DescendSeeds` task too."""
    slopes: tuple[float, ...] = ()
    """`curvatures`: g along each of the shared directions, as float32 holds it."""
    curvatures: tuple[float, ...] = ()
    """`curvatures`: second derivative of the loss along each of them, likewise."""


@dataclass(frozen=True)
class DescendResult:
    """The result of a `DescendSeeds` task: number n moves accumulator n of the newest bank by n-th number * 2^shift."""

    numbers: Array
    """int8 (groups * K,), row-major; within +-127, +-7 or +-1 for 8, 4 or 2 bits."""
    shift: int
    """The smallest that keeps the largest number within its bits."""
    bits: ScalarBits = 8
    state: bytes = b""
    """As in `ProbeResult`."""
    checks: bytes = b""
    """As in `ProbeResult`."""
    skipped: int = 0
    """Optimizer steps that were left out because their loss or gradient was not finite."""


SeedResult: TypeAlias = ProbeResult | DescendResult


@dataclass(frozen=True)
class ClientUpdate:
    """Client -> server: what one client learned in one round."""

    client: str
    round: int
    num_examples: int
    result: LoraResult | SeedResult | ClassSums
    measured: Measured = Measured()

    @property
    def lora(self) -> LoraResult:
        """The result, where the task is known to have been `TrainLora`."""
        assert isinstance(self.result, LoraResult)
        return self.result

    @property
    def probe(self) -> ProbeResult:
        """The result, where seeds are known to have been measured."""
        assert isinstance(self.result, ProbeResult)
        return self.result

    @property
    def descend(self) -> DescendResult:
        """The result, where the task is known to have been `DescendSeeds`, and done."""
        assert isinstance(self.result, DescendResult)
        return self.result

    @property
    def seeds(self) -> SeedResult:
        """The result, where the task is known to have been one of seeds."""
        assert isinstance(self.result, SeedResult)
        return self.result

    @property
    def class_sums(self) -> ClassSums:
        """The result, where the task is known to have been `SumClasses`."""
        assert isinstance(self.result, ClassSums)
        return self.result


@dataclass(frozen=True)
class PersonalRequest:
    """Which model of its own a client scores beside the global one."""

    personal: Personal
    training: Training | None = None
    """With `finetune` alone: how the global model is trained before it is scored, with `steps` set."""
    scale: float = 1.0
    """With `finetune`: the factor between B as trained and b as sent."""
    train: Literal["ab", "b"] = "ab"
    """With `finetune`: which factors are trained."""
    seed: int = 0
    """With `finetune`: of the order of the examples, and of dropout."""


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
    preference: Preference | None = None
    """By which preferred and rejected answers are scored, where the objective compares them."""
    personal: PersonalRequest | None = None
    """Which model of its own the client scores too."""


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
    personal: Mapping[str, float] = field(default_factory=dict)
    """The same of the client's own model, where that was asked for."""


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
    origin: Any = None
    """The method's state that its client started from, where the server has gone on since; None: the current one."""
    discount: float = 1.0
    """Factor on its change, below 1 where it is stale."""

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
        """The result, where seeds are known to have been measured."""
        return self.update.probe

    @property
    def descend(self) -> DescendResult:
        """The result, where the numbers of seeds are known to have been moved by first-order steps."""
        return self.update.descend

    @property
    def seeds(self) -> SeedResult:
        """The result, of a method whose tasks are of seeds."""
        return self.update.seeds

    @property
    def class_sums(self) -> ClassSums:
        """The result, of a round whose task is `SumClasses`."""
        return self.update.class_sums


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
    verbs: tuple[Verb, ...] = ()
    """What clients may be asked to do, sorted, where the method leaves that open; empty: what it does by itself."""
    classes: int = 0
    """Of a classifier whose head is made of class sums in the first round; 0 for all others."""


def cohort_weights(updates: Sequence[AdmittedUpdate], weights: Weighting) -> Sequence[tuple[AdmittedUpdate, float]]:
    """Return (update, p_k) sorted by client name, the p_k summing to 1: by the weights of the round.

    Sorting here makes every method independent of the order in which answers arrived.
    """
    cohort = sorted(updates, key=lambda update: update.client)
    # Integers, so that the sum is exact and every p_k is rounded only once.
    sizes = [update.counts(weights) for update in cohort]
    return [(update, size / sum(sizes)) for update, size in zip(cohort, sizes, strict=True)]
