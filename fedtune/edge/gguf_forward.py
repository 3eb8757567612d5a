"""Forward passes of a GGUF file's decoder, as graphs of llama.cpp's tensor library, with FedKSeed's changes beside it.

llama.cpp's own pass rounds the inputs of quantised layers to 8 bits, and that noise hides what a perturbation changes.
Here the weights of one layer at a time are expanded to float32, and nothing else is rounded. The products are numpy's,
whose BLAS multiplies matrices of float32 about twice as fast as llama.cpp's library.

A change -u U^T M V of a matrix is a path beside its layer, p numbers wide (`model.kron_forward`). M is an input of the
graph, one for each part of the batch, so the losses of all moves of a step come from one pass.

Axes are named as the library orders them, the fastest first: p is the bank's rank, n the number of tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from threadpoolctl import ThreadpoolController

from fedtune.edge import ggml
from fedtune.edge.ggml import F32, INT32, library
from fedtune.edge.gguf_decoder import FACTORS, FAMILIES, Decoder
from fedtune.edge.gguf_file import GgufFile
from fedtune.tensors import Array

NODES_PER_BLOCK, NODES = 96, 64
"""More than a block of any family needs, and than what stands around the blocks."""


@dataclass(frozen=True)
class Path:
    """The path beside one matrix: tensors V (in, p) and U^T (p, out), float32."""

    first: int
    second: int


@dataclass(frozen=True)
class Tokens:
    """What one pass reads: sequences of equal length, those of each move together."""

    ids: Array
    """(sequences, length)"""
    scored: Array
    """Places among all tokens whose outputs are wanted, in rising order and as many for every move."""
    matrices: Array
    """(moves, p, p), float32: M of each move, times -u."""
    start: int = 0
    """Position of the first token: how many are in the cache."""


@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, a tensor of (head_size * kv_heads * positions) for each block."""

    keys: Sequence[int]
    values: Sequence[int]


class Engine:
    """What runs the graphs of one file: threads, and working memory that is kept from one graph to the next."""

    def __init__(self, file: GgufFile, decoder: Decoder, *, threads: int) -> None:
        g = library()
        self.file, self.decoder = file, decoder
        self._blas = ThreadpoolController().select(user_api="blas")
        self._backend = g.ggml_backend_cpu_init()
        g.ggml_backend_cpu_set_n_threads(self._backend, threads)
        self._memory = g.ggml_gallocr_new(g.ggml_backend_cpu_buffer_type())

    def run(self, graph: Graph, output: int, shape: tuple[int, ...]) -> Array:
        """Compute a graph and return one of its tensors, float32.

        Raises:
            ClientError: if there is no memory for it.
        """
        g = library()
        g.ggml_set_output(output)
        g.ggml_build_forward_expand(graph.handle, output)
        if not g.ggml_gallocr_alloc_graph(self._memory, graph.handle):
            raise ggml.no_memory()
        for tensor, array in graph.inputs:
            ggml.write(tensor, array)
        # One thread for each product of ours: the library's own threads share them out.
        with self._blas.limit(limits=1):
            status = g.ggml_backend_graph_compute(self._backend, graph.handle)
        if status != 0 or not graph.is_complete:
            raise ggml.no_memory()
        return ggml.read(output, shape)

    def close(self) -> None:
        g = library()
        g.ggml_gallocr_free(self._memory)
        g.ggml_backend_free(self._backend)


class Graph:
    """A graph that is being built, inside a `with` block."""

    def __init__(self, engine: Engine, num_nodes: int, *, expand: bool) -> None:
        self.engine, self.num_nodes = engine, num_nodes
        self.expand = expand
        """Whether products are taken with weights in float32; else as llama.cpp takes them, which is faster for a few
        tokens at a time."""
        self.inputs: list[tuple[int, Array]] = []
        self._places: dict[tuple[int, int], int] = {}
        self._products: list[Product] = []

    def __enter__(self) -> Graph:
        # Three tensors a node: also what is given, and views.
        self.context = ggml.context(3 * self.num_nodes, num_nodes=self.num_nodes)
        self._multiply = ggml.OPERATION(self._multiply_share)
        self.handle = library().ggml_new_graph_custom(self.context, self.num_nodes, False)
        return self

    def __exit__(self, *_: object) -> None:
        library().ggml_free(self.context)

    def input_of(self, array: Array, kind: int = F32) -> int:
        """Return a tensor that has an array's numbers when the graph runs; its axes are the array's in reverse."""
        g = library()
        array = np.ascontiguousarray(array, np.float32 if kind == F32 else np.int32)
        new = (g.ggml_new_tensor_1d, g.ggml_new_tensor_2d, g.ggml_new_tensor_3d)[array.ndim - 1]
        tensor = int(new(self.context, kind, *array.shape[::-1]))
        g.ggml_set_input(tensor)
        self.inputs.append((tensor, array))
        return tensor

    def matrix(self, name: str, begin: int, end: int) -> int:
        """Return some rows of a matrix, ready for a product."""
        g, tensor = library(), self.engine.file.tensors[name]
        if self.expand and tensor.kind != F32:
            if (begin, end) not in self._places:
                self._places[begin, end] = self.input_of(np.arange(begin, end), INT32)
            return int(g.ggml_get_rows(self.context, tensor.handle, self._places[begin, end]))
        if (begin, end) == (0, tensor.rows):
            return tensor.handle
        size = g.ggml_row_size(tensor.kind, tensor.shape[0])
        return int(g.ggml_view_2d(self.context, tensor.handle, tensor.shape[0], end - begin, size, begin * size))

    def product(self, matrix: int, x: int, shape: tuple[int, int, int]) -> int:
        """Return the product (out, n) of a matrix (in, out) and an input (in, n), of sizes (n, in, out)."""
        g = library()
        if not self.expand:
            return int(g.ggml_mul_mat(self.context, matrix, x))
        self._products.append(Product(matrix, x, shape))
        sizes, sources = (shape[2], shape[0], 1, 1), (ctypes.c_void_p * 2)(matrix, x)
        # The place counts from 1: 0 would arrive as None.
        rest = (sources, 2, self._multiply, ggml.ALL_THREADS, len(self._products))
        return int(g.ggml_custom_4d(self.context, F32, *sizes, *rest))

    def _multiply_share(self, output: int, thread: int, threads: int, place: int) -> None:
        """Compute one thread's share of a product, by tokens."""
        product = self._products[place - 1]
        n, width, out = product.shape
        begin, end = n * thread // threads, n * (thread + 1) // threads
        x, matrix = ggml.view(product.x, (n, width)), ggml.view(product.matrix, (out, width))
        np.matmul(x[begin:end], matrix.T, out=ggml.view(output, (n, out))[begin:end])
        product.done.append(end - begin)

    @property
    def is_complete(self) -> bool:
        """Whether every product was computed: an error in a function that C calls is written, and raised nowhere."""
        return all(sum(product.done) == product.shape[0] for product in self._products)


@dataclass(frozen=True)
class Product:
    """A product that numpy computes when the graph runs."""

    matrix: int
    x: int
    shape: tuple[int, int, int]
    """Tokens, width of the input, width of the output."""
    done: list[int] = field(default_factory=list)
    """Tokens of the shares that are computed."""


class Forward:
    """The blocks of a decoder over some tokens, as nodes of a graph."""

    def __init__(self, graph: Graph, paths: Mapping[str, Path], tokens: Tokens, cache: Cache | None = None) -> None:
        self._graph, self._c, self._paths, self._cache = graph, graph.context, paths, cache
        self._file, self._d = graph.engine.file, graph.engine.decoder
        self._sequences, self._length = tokens.ids.shape
        self._moves, self._rank, _ = tokens.matrices.shape
        self._start = tokens.start
        self._n = tokens.ids.size
        self._ids = graph.input_of(tokens.ids.reshape(-1), INT32)
        places = np.arange(tokens.start, tokens.start + self._length)
        self._positions = graph.input_of(np.tile(places, self._sequences), INT32)
        keys = np.arange(tokens.start + self._length)
        # Padding is on the right, so what a token may not see is what comes after it.
        self._mask = graph.input_of(np.where(keys[None] > places[:, None], -np.inf, 0.0))
        self._scored = graph.input_of(tokens.scored, INT32)
        self._num_scored = len(tokens.scored)
        self._m = graph.input_of(tokens.matrices) if paths else 0

    def output(self) -> int:
        """Return the normed output of the last block at the scored tokens: (width, scored)."""
        g, c, d = library(), self._c, self._d
        x = g.ggml_get_rows(c, self._file.tensors["token_embd.weight"].handle, self._ids)  # (width, n)
        for block in range(d.blocks):
            at = f"blk.{block}."
            change = self._attention(at, self._norm(x, f"{at}attn_norm"), block)
            if block == d.blocks - 1:
                # What follows looks at one token at a time: those that are not scored are done.
                change, x = (g.ggml_get_rows(c, tensor, self._scored) for tensor in (change, x))
                self._n = self._num_scored
            x = g.ggml_add(c, x, self._linear(f"{at}attn_output", change))
            y = self._norm(x, f"{at}ffn_norm")
            y = g.ggml_swiglu_split(c, self._linear(f"{at}ffn_gate", y), self._linear(f"{at}ffn_up", y))
            x = g.ggml_add(c, x, self._linear(f"{at}ffn_down", y))
        return int(self._norm(x, "output_norm"))

    def _norm(self, x: int, name: str) -> int:
        g = library()
        y = g.ggml_rms_norm(self._c, x, self._d.epsilon)
        return int(g.ggml_mul(self._c, y, self._file.tensors[f"{name}.weight"].handle))

    def _linear(self, name: str, x: int) -> int:
        """Return a layer's output (out, n) for its input (in, n), the change of its matrix included."""
        g, c = library(), self._c
        width, out = self._file.tensors[f"{name}.weight"].shape
        product = self._graph.product
        y = product(self._graph.matrix(f"{name}.weight", 0, out), x, (self._n, width, out))
        if bias := self._file.tensors.get(f"{name}.bias"):
            y = g.ggml_add(c, y, bias.handle)
        if path := self._paths.get(f"{name}.weight"):
            p, moves = self._rank, self._moves
            t = g.ggml_reshape_3d(c, product(path.first, x, (self._n, width, p)), p, self._n // moves, moves)
            h = g.ggml_reshape_2d(c, g.ggml_mul_mat(c, self._m, t), p, self._n)  # h = -u M t of each move
            y = g.ggml_add(c, y, product(path.second, h, (self._n, p, out)))
        return int(y)

    def _attention(self, at: str, x: int, block: int) -> int:
        """Return what the heads read (heads * head_size, n), before the layer that mixes them."""
        g, c, d = library(), self._c, self._d
        size, length, sequences = d.head_size, self._length, self._sequences
        q = g.ggml_reshape_3d(c, self._linear(f"{at}attn_q", x), size, d.heads, self._n)
        k = g.ggml_reshape_3d(c, self._linear(f"{at}attn_k", x), size, d.kv_heads, self._n)
        v = self._linear(f"{at}attn_v", x)
        if d.family == "qwen3":
            q, k = self._norm(q, f"{at}attn_q_norm"), self._norm(k, f"{at}attn_k_norm")
        q, k = self._rotate(q), self._rotate(k)
        seen = self._start + length
        if self._cache:
            k, v = (self._append(cache[block], new) for cache, new in ((self._cache.keys, k), (self._cache.values, v)))
        q = g.ggml_cont(c, g.ggml_permute(c, g.ggml_reshape_4d(c, q, size, d.heads, length, sequences), 0, 2, 1, 3))
        k = g.ggml_permute(c, g.ggml_reshape_4d(c, k, size, d.kv_heads, seen, sequences), 0, 2, 1, 3)
        v = g.ggml_cont(c, g.ggml_permute(c, g.ggml_reshape_4d(c, v, size, d.kv_heads, seen, sequences), 1, 2, 0, 3))
        # Heads share keys in groups: the product repeats those of fewer heads. (seen, length, heads, sequences)
        weights = g.ggml_soft_max_ext(c, g.ggml_mul_mat(c, k, q), self._mask, size**-0.5, 0.0)
        read = g.ggml_mul_mat(c, v, weights)  # (head_size, length, heads, sequences)
        return int(g.ggml_reshape_2d(c, g.ggml_cont(c, g.ggml_permute(c, read, 0, 2, 1, 3)), size * d.heads, self._n))

    def _rotate(self, x: int) -> int:
        d, factors = self._d, self._file.tensors.get(FACTORS)
        # The numbers at the end are those of a rule that stretches positions unevenly, which is off.
        plain = (0.0, 1.0, 32.0, 1.0)
        numbers = (d.head_size, FAMILIES[d.family], d.positions, d.theta, d.scale, *plain)
        handle = factors.handle if factors else None
        return int(library().ggml_rope_ext(self._c, x, self._positions, handle, *numbers))

    def _append(self, memory: int, new: int) -> int:
        """Write the new tokens' keys or values behind those of the cache, and return all of them."""
        g, size = library(), self._d.head_size * self._d.kv_heads
        place = g.ggml_view_1d(self._c, memory, size * self._length, 4 * size * self._start)
        # At once: no node but the order in the graph says that this comes before the read below.
        g.ggml_build_forward_expand(self._graph.handle, g.ggml_cpy(self._c, new, place))
        return int(g.ggml_view_1d(self._c, memory, size * (self._start + self._length), 0))


def run_blocks(
    engine: Engine, paths: Mapping[str, Path], tokens: Tokens, *, cache: Cache | None = None, expand: bool = True
) -> Array:
    """Return the normed output of the last block at the scored tokens: (scored, width)."""
    with Graph(engine, NODES_PER_BLOCK * engine.decoder.blocks + NODES, expand=expand) as graph:
        return engine.run(
            graph, Forward(graph, paths, tokens, cache).output(), (len(tokens.scored), engine.decoder.width)
        )


def logits_of(engine: Engine, outputs: Array, begin: int, end: int, *, expand: bool = True) -> Array:
    """Return the logits of some words of the vocabulary, (scored, words), for the outputs of the last block."""
    with Graph(engine, NODES, expand=expand) as graph:
        head, x = graph.matrix(engine.decoder.head, begin, end), graph.input_of(outputs)
        n, width = outputs.shape
        return engine.run(graph, graph.product(head, x, (n, width, end - begin)), (n, end - begin))
