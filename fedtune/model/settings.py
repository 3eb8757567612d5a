"""Settings of the base model and its device, of the adapter's layers, and of when the global model is scored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from fedtune.data.settings import OMIT_DEFAULT

QuantisedFormat = Literal["int8", "nf4"]
FloatFormat = Literal["float32", "bfloat16", "float16"]
PoolingName = Literal["auto", "mean", "cls", "model"]
NumberFormat = Literal["auto", "float32", "bfloat16", "float16", "int8", "nf4"]
QUANTISED: Sequence[QuantisedFormat] = ("int8", "nf4")
"""The formats of bases whose blocks' linear layers are held in 8 or 4 bits."""


@dataclass(frozen=True)
class ModelSettings:
    """The base model and where it runs; the recipe's table `model`."""

    base: str
    """Folder with a config.json, GGUF file (needs the extra `gguf`), name on a model hub, or `embedded` for the small
    model that comes with fedtune."""
    task: Literal["causal", "classification"] = "causal"
    """causal: the model predicts the next token; classification: it gives each example one label."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: NumberFormat = "auto"
    """Number format of the frozen base; adapters are always trained in float32. auto: in a simulation bfloat16 on GPUs
    that are fast at it (CUDA from Ampere on), otherwise float32; at sites float32, for all must hold the same base.
    int8, nf4: the linear layers of blocks take 8 or 4.5 bits a weight, everything else stays in `unquantised`; the
    weights are read one at a time, so that no more than one is in memory in full."""
    unquantised: FloatFormat = field(default="float32", metadata=OMIT_DEFAULT)
    """With `dtype` int8 or nf4: number format of embeddings, norms and the output layer, and of products. Sites of one
    run may hold the same base in this format, in int8 and in nf4: all three have its digest."""
    kernels: Literal["auto", "torch", "bitsandbytes"] = field(default="auto", metadata=OMIT_DEFAULT)
    """What reads nf4 weights, to the same bits: torch itself, or bitsandbytes (needs the extra `quant`). auto:
    bitsandbytes on CUDA where it is installed, otherwise torch."""
    device: Literal["auto", "cpu", "cuda", "mps"] | str = "auto"
    """Where the model computes. auto: cuda if there is one, else mps, else cpu; `cuda:1` chooses one of several."""
    threads: Annotated[int, Ge(1)] = 1
    """CPU threads that each client trains with, on every engine. Another number changes the last bits of the result.
    With small models one thread and a worker process per core is fastest."""
    processes: Annotated[int, Ge(1)] = field(default=1, metadata=OMIT_DEFAULT)
    """Processes that train one client's adapter together, each on a GPU of its own (`cuda:0`, `cuda:1`, ...) with the
    whole base: each computes its share of the rows of every batch. With `device = "cpu"` they are processes of the CPU.
    """
    pooling: PoolingName = field(default="auto", metadata=OMIT_DEFAULT)
    """What a text encoder's classification head reads. mean: the mean of the tokens' last hidden states; cls: the first
    token's; model: as the architecture has it, for BERT the first token's through a layer of its own; auto: as the
    files of a sentence encoder say, and otherwise as the architecture has it."""
    digest: str | None = field(default=None, metadata=OMIT_DEFAULT)
    """SHA-256 of the base in this number format (a quantised one's as it is in `unquantised`), as `fedtune plan --pin`
    writes it here; another base is refused. none takes any."""


def same_everywhere(settings: ModelSettings) -> ModelSettings:
    """Return the settings of a base that several machines hold: no number format that depends on the device."""
    return replace(settings, dtype="float32") if settings.dtype == "auto" else settings


def quantised_format(dtype: str) -> QuantisedFormat | None:
    """Return a number format if it is one that quantises; None for the others.

    >>> quantised_format("nf4"), quantised_format("float32")
    ('nf4', None)
    """
    return next((kind for kind in QUANTISED if kind == dtype), None)


def without_quantisation(settings: ModelSettings) -> ModelSettings:
    """Return the settings by which a base is read whose weights quantised ones are the codes of."""
    return replace(settings, dtype=settings.unquantised) if quantised_format(settings.dtype) else settings


@dataclass(frozen=True)
class AdapterSettings:
    """Which layers get a LoRA adapter, and how large it is; the recipe's table `adapter`."""

    rank: Annotated[int, Ge(1)] = 8
    """LoRA rank of every client that no `[[override]]` names."""
    targets: Sequence[str] = ("all-linear",)
    """Modules that get an adapter, by name or last parts of the name, e.g. ["q_proj", "v_proj"], or by a pattern of
    them, e.g. ["self_attn.*_proj"] (`*` any text, `?` a character, `[qv]` one of these); ["all-linear"] takes every
    linear layer."""
    layers: str | None = field(default=None, metadata=OMIT_DEFAULT)
    """Only these layers (blocks) of the model, by their numbers from 0, such as "8-15" or "0-3, 28"; ends: the first
    and last blocks of an emulator, as its emulator.json names them; none: all of them."""
    kind: Literal["lora", "prefix", "p-tuning", "prompt"] = "lora"
    """Kind of adapter. lora: two factors beside each target. The others put virtual tokens before every text of a
    causal model, and train these alone. prefix: keys and values in every layer; prompt: embeddings; p-tuning:
    embeddings that an encoder of three layers gives."""
    tokens: Annotated[int, Interval(ge=1, le=65_536)] = field(default=20, metadata=OMIT_DEFAULT)
    """Virtual tokens of the kinds prefix, p-tuning and prompt."""
    hidden: Annotated[int, Interval(ge=1, le=65_536)] | None = field(default=None, metadata=OMIT_DEFAULT)
    """Width of P-tuning's encoder between its layers; none: that of the base's embeddings."""
    send: Literal["embeddings", "encoder"] = field(default="embeddings", metadata=OMIT_DEFAULT)
    """What of P-tuning trains and travels. embeddings: the encoder, drawn from the seed, only gives the first
    embeddings, which then train as a prompt's do; encoder: its layers and what they read, which is far larger."""
    init_text: str | None = field(default=None, metadata=OMIT_DEFAULT)
    """A text whose tokens' embeddings a prompt starts from, over and over; none: those of tokens drawn by the seed."""
    alpha: Annotated[float, Gt(0)] | Literal["2r"] = "2r"
    """The adapter is scaled by alpha / rank; 2r is twice the client's rank, which keeps the scale at 2 whatever the
    rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    modules_to_save: Sequence[str] = ()
    """Modules trained whole beside the adapter, such as a classification head; the server averages them."""
    head: Literal["drawn", "lda"] = field(default="drawn", metadata=OMIT_DEFAULT)
    """First values of a new classification head. drawn: at random, from the seed; lda: by discriminant analysis of sums
    of each client's features by class, for which the first round asks every client and in which nothing is trained."""
    start: str | None = field(default=None, metadata=OMIT_DEFAULT)
    """Folder of a PEFT adapter, or a run directory, that the run trains on: its global model is that adapter before
    round 1, exactly. `flora` and `fedex` take any ranks, `fedit`, `zeropad`, `hetlora` and `flexlora` up to the largest
    planned one, `ffa` what a run of `ffa` with the same seed has left; its layers must be among the targets. none: the
    base as it is."""


def layer_numbers(text: str) -> frozenset[int] | None:
    """Return the numbers that a text such as `0-3, 28` names; None where it is no such text.

    >>> sorted(layer_numbers("0-2, 7") or ())
    [0, 1, 2, 7]
    """
    numbers = set[int]()
    for part in text.split(","):
        if not (ends := re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part, re.ASCII)):
            return None
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last < first:
            return None
        numbers |= {*range(first, last + 1)}
    return frozenset(numbers)


def layer_of(module: str) -> int | None:
    """Return the number of the layer (block) that a module lies in: the first number in its name; None for none.

    >>> layer_of("model.layers.12.mlp.experts.3.w1"), layer_of("lm_head")
    (12, None)
    """
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def in_layers(module: str, layers: str | None) -> bool:
    """Return whether a module lies in one of the layers of a recipe, which are all where none are given."""
    return layers is None or layer_of(module) in (layer_numbers(layers) or ())


def names_module(target: str, module: str) -> bool:
    """Return whether a target, a name or a pattern, fits a module's full name or the last parts of it.

    >>> names_module("self_attn.[qv]_proj", "model.layers.1.self_attn.q_proj"), names_module("proj", "mlp.up_proj")
    (True, False)
    """
    # A `*` passes dots, as it does for every other pattern of a recipe.
    return fnmatchcase(module, target) or fnmatchcase(module, f"*.{target}")


def is_pattern(target: str) -> bool:
    return any(sign in target for sign in "*?[")


@dataclass(frozen=True)
class EvaluationSettings:
    """When, and on how many examples, the global model is scored; the recipe's table `evaluate`."""

    every: Annotated[int, Ge(0)] = 1
    """Score the test data every so many rounds; 0 only before the first round and after the last."""
    examples: Annotated[int, Ge(1)] | None = 256
    """Test examples that are scored, from the first on; none scores all."""
    clients: bool = True
    """Also score each client's held-out examples, before the first round and after the last."""
    client_examples: Annotated[int, Ge(1)] | None = 64
    """Held-out examples of each client that are scored, from the first on; none scores all."""
    batch: Annotated[int, Ge(1)] = 16
    """Examples per forward pass of an evaluation."""
    generate: Annotated[int, Ge(0)] = 0
    """Test examples that are also answered by greedy generation and scored with Rouge-L and exact match; 0 is off."""
    new_tokens: Annotated[int, Ge(1)] = 64
    """Longest answer that `generate`, `prompt` and `prompts` may give."""
    prompt: str | None = None
    """A text that the model continues before and after the run; both continuations are shown at its end."""
    prompts: Sequence[str] = field(default=(), metadata=OMIT_DEFAULT)
    """Questions that are put to the model as its training rows are, before and after the run; the answers stand side by
    side at its end."""
    references: Sequence[str] = field(default=(), metadata=OMIT_DEFAULT)
    """A good answer to each of `prompts`, by which the model's are scored: Rouge-L against it, and its own loss."""
