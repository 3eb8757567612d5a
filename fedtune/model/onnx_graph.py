"""The forward pass of a decoder as two ONNX graphs, built from config and weights alone: no model is traced.

`body` computes the hidden states of the tokens that are asked for, `head` their logits and losses: so the output layer,
half of a small model's work, sees no token whose output is not read, and some at a time.

The only state of the body is `state`, float32 (rows, p, p): beside each layer with a weight W runs the path

    y = x W^T + ((x first^T) state) second        first (p, in), second (p, out): signs, int8

so that row by row the layer computes at W - u U^T M V of the bank `kron`: first = V, second = U, state = -u M^T; where
a layer holds its weight as (in, out): first = U, second = V, state = -u M. A row of state is the displacement of one
loss, and all losses of a step share one batch. p is no constant of the graph.

Rows are padded on the right: no token looks ahead, so the padding needs no mask. Rows that continue a text give its
keys and values as `keys.N` and `values.N` (rows, heads, past, width), of which past may be 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.onnx_ml_pb2 import ModelProto

from fedtune.errors import ConfigError, Fault
from fedtune.model.onnx_config import Architecture
from fedtune.model.onnx_weights import SCALE, Stored, names_of
from fedtune.tensors import Array

BODY, HEAD, WEIGHTS = "graph.onnx", "head.onnx", "weights.safetensors"
OPSET, IR_VERSION = 23, 11
"""Of the operators, and of the file; RMSNormalization is an operator of its own from 23 on."""
PIECE = 4 * 2**20
"""Weights of an output layer in 8 bits that are unpacked together, 16 MiB: the whole of it may take more than the rest.
"""
KINDS: Mapping[str, int] = {"F32": TensorProto.FLOAT, "I8": TensorProto.INT8}


class Graph:
    """Nodes of a graph under construction, in the order in which they compute; results are names of tensors."""

    def __init__(self, weights: Mapping[str, Stored]) -> None:
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._initialisers: dict[str, Any] = {}
        self._weights, self._count = weights, itertools.count()

    @property
    def used(self) -> AbstractSet[str]:
        """Names of the weights that the graph reads."""
        return self._initialisers.keys() & self._weights.keys()

    def add(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node with one result."""
        [result] = self.add_many(operator, *inputs, names=[name], **attributes)
        return result

    def add_many(self, operator: str, *inputs: str, names: Sequence[str], **attributes: Any) -> list[str]:
        """Add a node with several results; an empty name is chosen here."""
        results = [name or f"{operator}.{next(self._count)}" for name in names]
        self.nodes.append(helper.make_node(operator, list(inputs), results, **attributes))
        return results

    def input(self, name: str, kind: int, *axes: int | str) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, axes))
        return name

    def output(self, name: str, kind: int, *axes: int | str) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, kind, axes))

    def integers(self, *values: int) -> str:
        """Return a constant vector of integers, such as a shape."""
        return self._constant(np.array(values, np.int64))

    def number(self, value: float) -> str:
        return self._constant(np.array(value, np.float32))

    def numbers(self, values: Array) -> str:
        return self._constant(values)

    def _constant(self, values: Array) -> str:
        name = f"{values.dtype}{list(values.shape)}:{values.tobytes().hex()}"
        name = name if len(name) < 80 else f"constant.{next(self._count)}"
        self._initialisers.setdefault(name, numpy_helper.from_array(values, name))
        return name

    def has(self, name: str) -> bool:
        return name in self._weights

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights[name].shape

    def tensor(self, name: str) -> str:
        """Return a tensor of the file of weights, as it lies there."""
        if name not in self._initialisers:
            place = self._weights[name]
            tensor = TensorProto(name=name, data_type=KINDS[place.kind], dims=place.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", WEIGHTS), ("offset", place.begin), ("length", place.size)):
                tensor.external_data.add(key=key, value=str(value))
            self._initialisers[name] = tensor
        return name

    def weight(self, name: str) -> str:
        """Return a tensor in float32; of codes in 8 bits without their scale."""
        stored = self.tensor(name)
        return self.add("Cast", stored, to=TensorProto.FLOAT) if self._weights[name].kind == "I8" else stored

    def scale(self, name: str, outputs: str, *, result: str = "") -> str:
        """Return what codes in 8 bits have given, times the scales of the outputs."""
        if not self.has(name + SCALE):
            return outputs
        return self.add("Mul", outputs, self.tensor(name + SCALE), name=result)

    def model(self, name: str) -> ModelProto:
        graph = helper.make_graph(
            self.nodes, name, self.inputs, self.outputs, initializer=list(self._initialisers.values())
        )
        opsets = [helper.make_opsetid("", OPSET)]
        model: ModelProto = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="fedtune"
        )
        return model


def write_graphs(
    folder: Path, architecture: Architecture, weights: Mapping[str, Stored], paths: Collection[str]
) -> None:
    """Write the two graphs beside the file of weights that they refer to.

    Args:
        folder: with that file, `WEIGHTS`.
        architecture: of the decoder.
        weights: where the tensors lie in the file.
        paths: names of the layers that seeds may move.

    Raises:
        ConfigError: if a tensor is missing or none of this family's, or a layer is none that has a path.
    """
    body, head, unmet = Graph(weights), Graph(weights), set(paths)
    try:
        Decoder(architecture, body, unmet).compute()
        add_head(architecture, head)
    except KeyError as error:
        expected, got = f"the tensor {error.args[0]} of {architecture.family}", "a base without it"
        raise ConfigError(Fault("model.base", expected, got, "give a whole model of this family")) from error
    # A bias or norm that no node reads would be missing in every loss.
    if unread := sorted(names_of(weights) - {*body.used, *head.used}):
        expected, got = f"tensors that {architecture.family} computes with", f"{unread[0]} (of {len(unread)}) as well"
        raise ConfigError(Fault("model.base", expected, got, "let its sites run clients with torch"))
    if unmet:
        expected, got = "linear layers of the blocks, for devices", sorted(unmet)[0]
        raise ConfigError(Fault("adapter.targets", expected, got, 'leave it out, e.g. targets = ["all-linear"]'))
    for graph, name in ((body, BODY), (head, HEAD)):
        (folder / name).write_bytes(graph.model(name).SerializeToString(deterministic=True))
        onnx.checker.check_model(str(folder / name))


class Decoder:
    """The body of a decoder: what its blocks share of shapes, positions and masks."""

    def __init__(self, architecture: Architecture, graph: Graph, unmet: set[str]) -> None:
        self.of, self.graph, self.unmet = architecture, graph, unmet
        """`unmet` are the layers whose path has not been added; edited in place."""
        of = architecture
        self.ids = graph.input("input_ids", TensorProto.INT64, "rows", "time")
        self.positions = graph.input("positions", TensorProto.INT64, "time")
        self.state = graph.input("state", TensorProto.FLOAT, "rows", "p", "p")
        self.places = graph.input("places", TensorProto.INT64, "scored")
        self.past = [
            (
                graph.input(f"keys.{block}", TensorProto.FLOAT, "rows", of.kv_heads, "past", of.head_width),
                graph.input(f"values.{block}", TensorProto.FLOAT, "rows", of.kv_heads, "past", of.head_width),
            )
            for block in range(of.blocks)
        ]
        shape = graph.add("Shape", self.state)
        self.rows = graph.add("Slice", shape, graph.integers(0), graph.integers(1))
        rank = graph.add("Slice", shape, graph.integers(2), graph.integers(3))
        self.by_rows = graph.add("Concat", self.rows, graph.integers(-1), rank, axis=0)
        self.flat = graph.add("Concat", graph.integers(-1), rank, axis=0)
        self.time = graph.add("Shape", self.positions)
        past = graph.add("Slice", graph.add("Shape", self.past[0][0]), graph.integers(2), graph.integers(3))
        self.total = graph.add("Add", past, self.time)

    def compute(self) -> None:
        graph = self.graph
        x = self._run_gpt2() if self.of.family == "gpt2" else self._run_llama()
        graph.add("Identity", x, name="hidden")
        graph.output("hidden", TensorProto.FLOAT, "scored", self.of.width)

    def _run_llama(self) -> str:
        graph, of = self.graph, self.of
        x = self._embed("model.embed_tokens.weight")
        mask, rotation = self._mask(), self._rotation()
        for block in range(of.blocks):
            name = f"model.layers.{block}"
            y = self._rms_norm(x, f"{name}.input_layernorm.weight")
            q, k, v = (self._linear(y, f"{name}.self_attn.{part}_proj") for part in "qkv")
            q, k, v = self._heads(q, of.heads), self._heads(k, of.kv_heads), self._heads(v, of.kv_heads)
            if graph.has(f"{name}.self_attn.q_norm.weight"):
                q = self._rms_norm(q, f"{name}.self_attn.q_norm.weight")
                k = self._rms_norm(k, f"{name}.self_attn.k_norm.weight")
            attended = self._attend(self._rotate(q, rotation), self._rotate(k, rotation), v, mask, block)
            x = graph.add("Add", x, self._linear(attended, f"{name}.self_attn.o_proj"))
            y = self._rms_norm(x, f"{name}.post_attention_layernorm.weight")
            gate = self._activate(self._linear(y, f"{name}.mlp.gate_proj"))
            y = graph.add("Mul", gate, self._linear(y, f"{name}.mlp.up_proj"))
            x = graph.add("Add", x, self._linear(y, f"{name}.mlp.down_proj"))
        return self._rms_norm(graph.add("Gather", x, self.places), "model.norm.weight")

    def _run_gpt2(self) -> str:
        graph, of = self.graph, self.of
        looked_up = graph.add("Gather", graph.tensor("transformer.wpe.weight"), self.positions)  # (time, width)
        x = self._embed("transformer.wte.weight", looked_up)
        mask = self._mask()
        for block in range(of.blocks):
            name = f"transformer.h.{block}"
            y = self._linear(self._norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
            q, k, v = graph.add_many("Split", y, names=["", "", ""], axis=1, num_outputs=3)
            q, k, v = (self._heads(part, of.heads) for part in (q, k, v))
            attended = self._attend(q, k, v, mask, block)
            x = graph.add("Add", x, self._linear(attended, f"{name}.attn.c_proj"))
            y = self._activate(self._linear(self._norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"))
            x = graph.add("Add", x, self._linear(y, f"{name}.mlp.c_proj"))
        return self._norm(graph.add("Gather", x, self.places), "transformer.ln_f")

    def _embed(self, name: str, positions: str = "") -> str:
        """Return the embeddings of all tokens, (rows * time, width)."""
        graph = self.graph
        x = graph.add("Gather", graph.tensor(name), self.ids)  # (rows, time, width)
        if graph.has(name + SCALE):
            scale = graph.add("Unsqueeze", graph.add("Gather", graph.tensor(name + SCALE), self.ids), graph.integers(2))
            x = graph.add("Mul", graph.add("Cast", x, to=TensorProto.FLOAT), scale)
        if positions:
            x = graph.add("Add", x, positions)
        return graph.add("Reshape", x, graph.integers(-1, self.of.width))

    def _mask(self) -> str:
        """Return (time, total): 0 where a token may look, minus infinity at those behind it."""
        graph = self.graph
        zero, step = graph.numbers(np.array(0, np.int64)), graph.numbers(np.array(1, np.int64))
        columns = graph.add("Range", zero, graph.add("Squeeze", self.total), step)
        columns = graph.add("Unsqueeze", columns, graph.integers(0))
        later = graph.add("Greater", columns, graph.add("Unsqueeze", self.positions, graph.integers(1)))
        return graph.add("Where", later, graph.number(-np.inf), graph.number(0))

    def _rotation(self) -> tuple[str, str]:
        """Return cosine and sine of every position's angles, each (time, head width)."""
        graph = self.graph
        assert self.of.frequencies is not None
        places = graph.add("Unsqueeze", graph.add("Cast", self.positions, to=TensorProto.FLOAT), graph.integers(1))
        half = graph.add("Mul", places, graph.numbers(self.of.frequencies))
        angles = graph.add("Concat", half, half, axis=1)
        return graph.add("Cos", angles), graph.add("Sin", angles)

    def _rotate(self, x: str, rotation: tuple[str, str]) -> str:
        """Turn the pairs (i, i + width / 2) of every head by the angles of its position."""
        graph, (cosine, sine) = self.graph, rotation
        first, second = graph.add_many("Split", x, names=["", ""], axis=3, num_outputs=2)
        turned = graph.add("Concat", graph.add("Neg", second), first, axis=3)
        return graph.add("Add", graph.add("Mul", x, cosine), graph.add("Mul", turned, sine))

    def _linear(self, x: str, name: str) -> str:
        """Return a layer of (rows * time, in) with the path beside it, where it has one."""
        graph, weight, of = self.graph, f"{name}.weight", self.of
        transposed = of.family == "gpt2"
        # A bias is added with the product, unless that is of codes without their scale.
        bias = [graph.tensor(f"{name}.bias")] if graph.has(f"{name}.bias") else []
        coded = graph.has(weight + SCALE)
        y = graph.add("Gemm", x, graph.weight(weight), *([] if coded else bias), transB=0 if transposed else 1)
        if coded:
            y = graph.scale(weight, y)
            y = graph.add("Add", y, *bias) if bias else y
        if name not in self.unmet:
            return y
        self.unmet.discard(name)
        inner, outer = graph.shape(weight) if transposed else graph.shape(weight)[::-1]
        first = graph.add("Cast", graph.input(f"first.{name}", TensorProto.INT8, "p", inner), to=TensorProto.FLOAT)
        second = graph.add("Cast", graph.input(f"second.{name}", TensorProto.INT8, "p", outer), to=TensorProto.FLOAT)
        t = graph.add("Reshape", graph.add("Gemm", x, first, transB=1), self.by_rows)  # (rows, time, p)
        h = graph.add("Reshape", graph.add("MatMul", t, self.state), self.flat)
        return graph.add("Gemm", h, second, y)

    def _rms_norm(self, x: str, name: str) -> str:
        return self.graph.add("RMSNormalization", x, self.graph.tensor(name), axis=-1, epsilon=self.of.epsilon)

    def _norm(self, x: str, name: str) -> str:
        parts = [self.graph.tensor(f"{name}.weight"), self.graph.tensor(f"{name}.bias")]
        return self.graph.add("LayerNormalization", x, *parts, axis=-1, epsilon=self.of.epsilon)

    def _activate(self, x: str) -> str:
        match self.of.activation:
            case "silu":
                return self.graph.add("Mul", x, self.graph.add("Sigmoid", x))
            case "relu":
                return self.graph.add("Relu", x)
            case kind:
                return self.graph.add("Gelu", x, approximate="tanh" if kind == "gelu_tanh" else "none")

    def _heads(self, x: str, heads: int) -> str:
        """Return (rows, heads, time, head width) of (rows * time, heads * head width)."""
        graph = self.graph
        shape = graph.add("Concat", self.rows, graph.integers(-1, heads, self.of.head_width), axis=0)
        return graph.add("Transpose", graph.add("Reshape", x, shape), perm=[0, 2, 1, 3])

    def _attend(self, q: str, k: str, v: str, mask: str, block: int) -> str:
        """Return what each token reads of those before it, (rows * time, heads * head width)."""
        graph, of = self.graph, self.of
        past_keys, past_values = self.past[block]
        k = graph.add("Concat", past_keys, k, axis=2, name=f"new_keys.{block}")
        v = graph.add("Concat", past_values, v, axis=2, name=f"new_values.{block}")
        for name in (k, v):
            graph.output(name, TensorProto.FLOAT, "rows", of.kv_heads, "total", of.head_width)
        # All queries of one head of keys in one product: (rows, kv heads, queries * time, width).
        groups = graph.add("Concat", self.rows, graph.integers(of.kv_heads, -1, of.head_width), axis=0)
        q = graph.add("Reshape", graph.add("Mul", q, graph.number(of.scales[block])), groups)
        products = graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 3, 2]))
        by_head = graph.add("Concat", self.rows, graph.integers(of.heads), self.time, self.total, axis=0)
        products = graph.add("Add", graph.add("Reshape", products, by_head), mask)
        shares = graph.add("Softmax", products, axis=-1)
        by_group = graph.add("Concat", self.rows, graph.integers(of.kv_heads, -1), self.total, axis=0)
        read = graph.add("MatMul", graph.add("Reshape", shares, by_group), v)
        heads = graph.add("Concat", self.rows, graph.integers(of.heads, -1, of.head_width), axis=0)
        read = graph.add("Transpose", graph.add("Reshape", read, heads), perm=[0, 2, 1, 3])
        return graph.add("Reshape", read, graph.integers(-1, of.heads * of.head_width))


def add_head(architecture: Architecture, graph: Graph) -> None:
    """Add the output layer: logits of hidden states, and the loss of each of them against its target."""
    of = architecture
    hidden = graph.input("hidden", TensorProto.FLOAT, "scored", of.width)
    targets = graph.input("targets", TensorProto.INT64, "scored")
    table = "transformer.wte.weight" if of.family == "gpt2" else "model.embed_tokens.weight"
    weight = "lm_head.weight" if graph.has("lm_head.weight") else table
    if of.tied == (weight == "lm_head.weight"):
        got = "an output layer of its own" if of.tied else "none"
        expected = "the output layer that tie_word_embeddings of config.json says"
        raise ConfigError(Fault("model.base", expected, got, "put config.json right"))
    if graph.has(weight + SCALE):
        logits = graph.scale(weight, multiply_in_pieces(graph, hidden, weight), result="logits")
    else:
        logits = graph.add("Gemm", hidden, graph.tensor(weight), transB=1, name="logits")
    picked = graph.add("Unsqueeze", targets, graph.integers(1))
    picked = graph.add("GatherElements", graph.add("LogSoftmax", logits, axis=1), picked, axis=1)
    graph.add("Squeeze", graph.add("Neg", picked), graph.integers(1), name="losses")
    graph.output("losses", TensorProto.FLOAT, "scored")
    graph.output("logits", TensorProto.FLOAT, "scored", of.vocabulary)


def multiply_in_pieces(graph: Graph, hidden: str, weight: str) -> str:
    """Return the products of codes in 8 bits without their scales, unpacked some outputs at a time."""
    outputs, width = graph.shape(weight)
    step, parts = max(1, PIECE // width), list[str]()
    for begin in range(0, outputs, step):
        ends = [graph.integers(begin), graph.integers(min(begin + step, outputs)), graph.integers(0)]
        piece = graph.add("Cast", graph.add("Slice", graph.tensor(weight), *ends), to=TensorProto.FLOAT)
        parts.append(graph.add("Gemm", hidden, piece, transB=1))
    return graph.add("Concat", *parts, axis=1)
