"""The decoders of GGUF files that are run: their sizes, the tensors that they must hold, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedtune.edge.ggml import F32, library
from fedtune.edge.gguf_file import GgufFile, unreadable
from fedtune.errors import ConfigError, Fault

NEIGHBOURS, HALVES = 0, 2
"""How rotary positions pair the numbers of a head: each even one with the next, or the first half with the second."""
FAMILIES: Mapping[str, int] = {"llama": NEIGHBOURS, "qwen2": HALVES, "qwen3": HALVES}
"""Architectures by their pairs; GGUF calls Llama, Mistral and SmolLM2 `llama`."""
KINDS = frozenset({0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, 30})
"""Formats of matrices: F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS and BF16."""
FACTORS = "rope_freqs.weight"
"""By which Llama 3.1 and later stretch their rotary frequencies."""
SCALES = (
    *("logit_scale", "embedding_scale", "residual_scale", "attn_logit_softcapping", "final_logit_softcapping"),
    *("rope.scaling.attn_factor", "attention.clamp_kqv"),
)
"""Keys, below the family's name, of what other families of llama.cpp multiply or bound."""
OTHER = "take part by the bundle of the runtime onnx, or with the torch client"


@dataclass(frozen=True)
class Decoder:
    """A causal model of one of the families."""

    family: str
    blocks: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    """Width inside the blocks' multi-layer perceptrons."""
    vocabulary: int
    positions: int
    epsilon: float
    """Of the norms."""
    theta: float
    """Base of the rotary frequencies."""
    scale: float
    """By which rotary positions are multiplied; 1 unless they are stretched by one factor."""
    head: str
    """Name of the output layer's matrix: the embedding's, where they are tied."""


def read_decoder(file: GgufFile) -> Decoder:
    """Return the decoder in a file.

    Raises:
        ConfigError: if its family is another, or it holds a tensor that the family lacks or lacks one that it has.
    """
    family = file.text("general.architecture")
    if family not in FAMILIES:
        expected = f"a GGUF file of one of the families {', '.join(FAMILIES)}"
        raise ConfigError(Fault("model.base", expected, f"{file.path} of {family!r}", OTHER))
    refuse_unknown_rules(file, family)
    width, heads = file.integer(f"{family}.embedding_length"), file.integer(f"{family}.attention.head_count")
    stretched = file.text(f"{family}.rope.scaling.type") == "linear"
    decoder = Decoder(
        family=family,
        blocks=file.integer(f"{family}.block_count"),
        width=width,
        heads=heads,
        kv_heads=file.integer(f"{family}.attention.head_count_kv", heads),
        head_size=head_size(file, family),
        hidden=file.integer(f"{family}.feed_forward_length"),
        vocabulary=file.tensors["token_embd.weight"].rows if "token_embd.weight" in file.tensors else 0,
        positions=file.integer(f"{family}.context_length"),
        epsilon=file.real(f"{family}.attention.layer_norm_rms_epsilon"),
        theta=file.real(f"{family}.rope.freq_base", 10000.0),
        scale=1.0 / file.real(f"{family}.rope.scaling.factor", 1.0) if stretched else 1.0,
        head="output.weight" if "output.weight" in file.tensors else "token_embd.weight",
    )
    check_tensors(file, decoder)
    return decoder


def head_size(file: GgufFile, family: str) -> int:
    width, heads = file.integer(f"{family}.embedding_length"), file.integer(f"{family}.attention.head_count")
    return file.integer(f"{family}.attention.key_length", width // max(1, heads))


def refuse_unknown_rules(file: GgufFile, family: str) -> None:
    """Raise ConfigError for what a header may ask of the forward pass and this one does not do."""
    scaling = file.text(f"{family}.rope.scaling.type")
    # llama.cpp takes a factor without a rule for the linear one, and an older key too.
    bare = file.has(f"{family}.rope.scaling.factor") and not scaling
    turned, size = file.integer(f"{family}.rope.dimension_count", 0), head_size(file, family)
    rules = {
        "a factor of rotary positions without its rule": bare or file.has(f"{family}.rope.scale_linear"),
        f"rotary positions for {turned} of a head's {size} numbers": turned not in (0, size),
        "tokens that see those behind them": file.has(f"{family}.attention.causal"),
        f"rotary positions stretched by the rule {scaling!r}": scaling not in ("", "none", "linear"),
        "attention within a sliding window": file.has(f"{family}.attention.sliding_window"),
        "a mixture of experts": file.integer(f"{family}.expert_count", 0) > 0,
        "a scale of attention of its own": file.has(f"{family}.attention.scale"),
        **{f"a value under {name}": file.has(f"{family}.{name}") for name in SCALES},
    }
    if asked := [rule for rule, is_asked in rules.items() if is_asked]:
        expected = f"a plain decoder of the family {family!r}"
        raise ConfigError(Fault("model.base", expected, f"{file.path} with {' and '.join(asked)}", OTHER))


def shapes_of(decoder: Decoder) -> Mapping[str, tuple[int, ...]]:
    """Return the tensors that a decoder needs, matrices as (in, out)."""
    width, inner, hidden = decoder.width, decoder.heads * decoder.head_size, decoder.hidden
    shared = decoder.kv_heads * decoder.head_size
    block = {
        "attn_norm.weight": (width,),
        "attn_q.weight": (width, inner),
        "attn_k.weight": (width, shared),
        "attn_v.weight": (width, shared),
        "attn_output.weight": (inner, width),
        "ffn_norm.weight": (width,),
        "ffn_gate.weight": (width, hidden),
        "ffn_up.weight": (width, hidden),
        "ffn_down.weight": (hidden, width),
    }
    if decoder.family == "qwen2":
        block |= {"attn_q.bias": (inner,), "attn_k.bias": (shared,), "attn_v.bias": (shared,)}
    if decoder.family == "qwen3":
        block |= {"attn_q_norm.weight": (decoder.head_size,), "attn_k_norm.weight": (decoder.head_size,)}
    shapes: dict[str, tuple[int, ...]] = {"output_norm.weight": (width,)}
    shapes |= dict.fromkeys(("token_embd.weight", decoder.head), (width, decoder.vocabulary))
    return shapes | {f"blk.{i}.{name}": shape for i in range(decoder.blocks) for name, shape in block.items()}


def check_tensors(file: GgufFile, decoder: Decoder) -> None:
    """Raise ConfigError unless a file holds the decoder's tensors, and no other that would be left out in silence."""
    g, wanted = library(), dict(shapes_of(decoder))
    sizes = (decoder.width, decoder.heads, decoder.kv_heads, decoder.head_size, decoder.hidden, decoder.vocabulary)
    if min(sizes) < 1 or decoder.heads % max(1, decoder.kv_heads) or decoder.head_size % 2:
        raise unreadable(file.path, f"sizes that are no decoder's: {sizes}")
    if FACTORS in file.tensors:
        wanted[FACTORS] = (decoder.head_size // 2,)
    if strange := sorted(file.tensors.keys() - wanted.keys()):
        expected = f"a GGUF file of the family {decoder.family!r} alone"
        raise ConfigError(Fault("model.base", expected, f"{file.path} with {strange[0]}", OTHER))
    for name, shape in wanted.items():
        tensor = file.tensors.get(name)
        if tensor is None or tensor.shape != shape:
            got = "none" if tensor is None else f"{tensor.shape}"
            raise unreadable(file.path, f"{name} of shape {got} where {shape} belongs")
        kinds = KINDS if len(shape) == 2 else {F32}
        if tensor.kind not in kinds or shape[0] % g.ggml_blck_size(tensor.kind):
            kind = g.ggml_type_name(tensor.kind).decode()
            expected, hint = "weights in a format that llama.cpp expands on every processor", "use F16, Q8_0 or Q4_K"
            raise ConfigError(Fault("model.base", expected, f"{name} of {file.path} in {kind}", hint))
