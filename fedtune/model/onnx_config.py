"""What a config.json says of a decoder's computation, for the graphs of `model.onnx_graph`; it passes nothing over.

Every key of a config is one that is read here, one without an effect on an evaluation, or one that must have a certain
value. Any other is refused by name, as is every value that the graphs do not compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedtune.errors import ConfigError, Fault
from fedtune.tensors import Array

FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""By the names of configs; `gelu_new` and `gelu_pytorch_tanh` are the same function."""

WITHOUT_EFFECT = frozenset(
    {
        # Names, training, generation, and how values are returned.
        *(
            "model_type",
            "_name_or_path",
            "_model_name_or_path",
            "unk_token_id",
            "architectures",
            "transformers_version",
            "auto_map",
            "transformers.js_config",
            "tokenizer_class",
            "unsloth_fixed",
            "unsloth_version",
        ),
        *("dtype", "torch_dtype", "initializer_range", "use_cache", "output_hidden_states", "output_attentions"),
        *("return_dict", "id2label", "label2id", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id"),
        *("task_specific_params", "_attn_implementation_autoset", "is_llama_config", "chunk_size_feed_forward"),
        *("sep_token_id", "cls_token_id", "decoder_start_token_id", "prefix", "max_sequence_length"),
        # Dropout, which no evaluation has.
        *("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"),
        # Of GPT-2's classifiers and its first code, and of a kernel in 16 bits.
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
        *("n_ctx", "n_special", "predict_special_tokens", "num_labels", "_num_labels", "finetuning_task"),
        "reorder_and_upcast_attn",
        # The product of slices, with the same sum; and what the weights alone say (`bias`), or nothing without windows.
        *("pretraining_tp", "attention_bias", "mlp_bias", "max_window_layers"),
    }
)
"""Keys that change nothing of the losses in float32."""
OFF: Sequence[Any] = (None, False, {}, [], "")
"""Values of a key of which nothing is known: whatever it asks for is not asked for."""


@dataclass(frozen=True, eq=False)
class Architecture:
    """The computation of a decoder, beside its weights."""

    family: str
    blocks: int
    width: int
    heads: int
    kv_heads: int
    """Heads of keys and values; each serves heads / kv_heads queries."""
    head_width: int
    epsilon: float
    """Of the norms."""
    activation: Activation
    vocabulary: int
    positions: int
    """Largest number of tokens that the config names."""
    tied: bool
    """Whether the output layer is the table of embeddings."""
    frequencies: Array | None
    """Of rotary positions, float32 (head_width / 2); None where positions are looked up."""
    scales: tuple[float, ...]
    """By which each block multiplies the products of queries and keys."""


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the computation that a config describes.

    Args:
        config: as transformers' `config.to_dict()` completes a config.json.

    Raises:
        ConfigError: naming every key or value that the graphs do not compute.
    """
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        hint = "give a base of one of these families, or let its sites run clients with torch"
        raise ConfigError(Fault("model.base", f"one of {', '.join(FAMILIES)} for devices", repr(family), hint))
    read = read_gpt2 if family == "gpt2" else read_llama
    faults: list[Fault] = []
    seen = Reader(config, faults)
    try:
        architecture = read(seen, family)
    except KeyError as error:
        raise ConfigError(Fault(f"config.json: {error.args[0]}", f"this key of {family}", "none")) from error
    seen.rest()
    if faults:
        raise ConfigError(faults)
    return architecture


class Reader:
    """A config and the keys of it that have been read: the others must be without effect."""

    def __init__(self, config: Mapping[str, Any], faults: list[Fault]) -> None:
        self._config, self._faults, self._seen = config, faults, set[str]()

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value that the caller computes with."""
        self._seen.add(key)
        value = self._config.get(key)
        return default if value is None else value

    def number(self, key: str) -> Any:
        """Return a value that must be there.

        Raises:
            KeyError: if it is not.
        """
        if (value := self.get(key)) is None:
            raise KeyError(key)
        return value

    def require(self, key: str, expected: str, fits: bool, got: Any) -> None:
        """Note a fault unless a value fits."""
        if not fits:
            hint = "the graphs for devices do not compute it; give another base"
            self._faults.append(Fault(f"config.json: {key}", expected, repr(got), hint))

    def rest(self) -> None:
        """Note a fault for every other key that may change the computation."""
        for key in sorted(self._config.keys() - self._seen - WITHOUT_EFFECT):
            value = self._config[key]
            self.require(
                key,
                "only keys whose meaning is known",
                any(type(value) is type(off) and value == off for off in OFF),
                value,
            )


def read_llama(config: Reader, family: str) -> Architecture:
    """Return the computation of Llama, Qwen2 and Qwen3: rotary positions, RMS norms, a gated MLP."""
    width, heads = config.number("hidden_size"), config.number("num_attention_heads")
    head_width, positions = config.get("head_dim", width // heads), config.number("max_position_embeddings")
    blocks = config.number("num_hidden_layers")
    config.get("intermediate_size")  # the weights' own shapes say it
    check_windows(config, positions)
    return Architecture(
        family=family,
        blocks=blocks,
        width=width,
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        head_width=head_width,
        epsilon=config.number("rms_norm_eps"),
        activation=activation_of(config, "hidden_act"),
        vocabulary=config.number("vocab_size"),
        positions=positions,
        tied=config.get("tie_word_embeddings", False),
        frequencies=rotary_frequencies(config, head_width),
        scales=(head_width**-0.5,) * blocks,
    )


def read_gpt2(config: Reader, family: str) -> Architecture:
    """Return the computation of GPT-2: positions that are looked up, norms with a mean, weights as (in, out)."""
    width, heads, blocks = config.number("n_embd"), config.number("n_head"), config.number("n_layer")
    config.get("n_inner")
    config.require("add_cross_attention", "False", not config.get("add_cross_attention"), True)
    scale = (width // heads) ** -0.5 if config.get("scale_attn_weights", True) else 1.0
    by_block = config.get("scale_attn_by_inverse_layer_idx", False)
    return Architecture(
        family=family,
        blocks=blocks,
        width=width,
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        epsilon=config.number("layer_norm_epsilon"),
        activation=activation_of(config, "activation_function"),
        vocabulary=config.number("vocab_size"),
        positions=config.number("n_positions"),
        tied=config.get("tie_word_embeddings", True),
        frequencies=None,
        scales=tuple(scale / (block + 1) if by_block else scale for block in range(blocks)),
    )


def activation_of(config: Reader, key: str) -> Activation:
    name = config.number(key)
    config.require(key, f"one of {', '.join(ACTIVATIONS)}", name in ACTIVATIONS, name)
    return ACTIVATIONS.get(name, "silu")


def check_windows(config: Reader, positions: int) -> None:
    """Note a fault where a block looks back at fewer tokens than the model has positions."""
    window, kinds = config.get("sliding_window"), config.get("layer_types", ())
    used, bites = config.get("use_sliding_window", False), window is not None and window < positions
    windowed = [kind for kind in kinds if kind != "full_attention"]
    config.require("use_sliding_window", "attention to all tokens", not (used and bites), f"a window of {window}")
    others = [kind for kind in windowed if kind != "sliding_attention" or bites]
    config.require("layer_types", "full_attention everywhere", not others, others[:1])


def rotary_frequencies(config: Reader, head_width: int) -> Array:
    """Return the inverse frequencies of rotary positions, float32 (head_width / 2).

    Of the plain rule, of linear scaling and of Llama 3.1's, as transformers computes them (`modeling_rope_utils`).
    """
    # Old files have the base and its scaling under two keys of their own; transformers joins them.
    table = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    table.update(config.get("rope_parameters") or {})
    kind = table.get("rope_type", table.get("type", "default"))
    share = table.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    config.require("partial_rotary_factor", "1.0", share == 1.0, share)
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    frequencies: Array = (1.0 / np.float32(table["rope_theta"]) ** exponents).astype(np.float32)
    if kind == "linear":
        known |= {"factor"}
        frequencies = frequencies / np.float32(table["factor"])
    elif kind == "llama3":
        known |= {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        frequencies = stretch(frequencies, table)
    else:
        config.require("rope_parameters", "the rope_type default, linear or llama3", kind == "default", kind)
    if kind in ("default", "linear", "llama3"):
        unknown = sorted(key for key, value in table.items() if key not in known and value is not None)
        config.require("rope_parameters", "only keys whose meaning is known", not unknown, unknown)
    return frequencies


def stretch(frequencies: Array, table: Mapping[str, Any]) -> Array:
    """Return frequencies by Llama 3.1's rule: long waves are stretched by the factor, those between by a mixture."""
    factor, low, high = (np.float32(table[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = np.float32(table["original_max_position_embeddings"])
    waves = np.float32(2 * math.pi) / frequencies
    smooth = (context / waves - low) / (high - low)
    mixed = (1 - smooth) * frequencies / factor + smooth * frequencies
    stretched = np.where(waves > context / low, frequencies / factor, frequencies)
    between = (waves >= context / high) & (waves <= context / low)
    return np.asarray(np.where(between, mixed, stretched), np.float32)
