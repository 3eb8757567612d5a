"""The runtime of GGUF bundles: losses around a ledger's weights and greedy text, through llama.cpp's tensor library."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np

from fedtune.data.encode import IGNORED
from fedtune.directions.bank import perturb
from fedtune.directions.kron import Kron
from fedtune.directions.seed_ledger import Manifest, SeedLedger
from fedtune.edge import ggml
from fedtune.edge.bundle import Bundle
from fedtune.edge.ggml import F32, library
from fedtune.edge.gguf_decoder import FAMILIES, NEIGHBOURS, Decoder, read_decoder
from fedtune.edge.gguf_file import GgufFile
from fedtune.edge.gguf_forward import Cache, Engine, Path, Tokens, logits_of, run_blocks
from fedtune.edge.gguf_names import gguf_name, interleave
from fedtune.errors import ClientError, ConfigError, Fault
from fedtune.probing.rows import PaddedRows
from fedtune.probing.steps import Move
from fedtune.tensors import Array

WEIGHTS = "weights"
"""Key of a bundle's details: the name of the GGUF file."""
TOKENS_AT_ONCE = 1024
"""Tokens of all moves in one pass: more would take memory and no less time."""
HEAD_BYTES = 2**23
"""Of the output layer, expanded at a time."""


def load(bundle: Bundle, *, threads: int) -> GgufRuntime:
    """Return the runtime of a bundle.

    Raises:
        ConfigError: if its file is not whole, or holds a model that this runtime does not run.
        ExtraError: if the package xllamacpp is missing, or is another version.
    """
    name = str(bundle.facts.details.get(WEIGHTS, ""))
    if name not in (bundle.folder.listed or {}):
        expected, hint = f"a bundle that lists its GGUF file under {WEIGHTS!r}", "get the bundle again"
        raise ConfigError(Fault("model.base", expected, f"{bundle.path} with {name!r}", hint))
    file = GgufFile(bundle.path / name)
    return GgufRuntime(file, bundle.manifest, eos_ids=bundle.facts.eos_ids, threads=threads)


class GgufRuntime:
    """An open GGUF file, and the directions of the run that was asked for last."""

    def __init__(self, file: GgufFile, manifest: Manifest, *, eos_ids: Collection[int], threads: int) -> None:
        self._file, self._manifest, self._eos_ids = file, manifest, frozenset(eos_ids)
        self.decoder = read_decoder(file)
        self._engine = Engine(file, self.decoder, threads=threads)
        self._paths: tuple[object, Paths] | None = None

    @contextmanager
    def at(self, ledger: SeedLedger, trainable: Sequence[int]) -> Iterator[GgufPosition]:
        """See `edge.runtime.Runtime.at`.

        Raises:
            ConfigError: if a tensor is to be moved that this runtime cannot move.
        """
        yield GgufPosition(self._engine, self._paths_of(ledger, trainable).beside, ledger)

    def continue_tokens(
        self, ledger: SeedLedger | None, trainable: Sequence[int], ids: Sequence[int], *, new_tokens: int
    ) -> Iterator[int]:
        """See `edge.runtime.Runtime.continue_tokens`."""
        engine, decoder = self._engine, self.decoder
        check_ids(np.asarray(ids), decoder)
        beside = self._paths_of(ledger, trainable).beside if ledger else {}
        matrices = matrices_of(ledger, [(0, 0)]) if ledger else np.zeros((1, 1, 1), np.float32)
        count = min(new_tokens, decoder.positions - len(ids))
        with ExitStack() as stack:
            size = decoder.head_size * decoder.kv_heads * (len(ids) + count)
            tensors = stack.enter_context(tensors_of([(size,)] * (2 * decoder.blocks)))
            cache = Cache(tensors[::2], tensors[1::2])
            start, ahead = 0, np.asarray(ids, np.int64)
            for _ in range(count):
                tokens = Tokens(ahead[None], np.array([len(ahead) - 1]), matrices, start)
                # Quantised as they are: one token at a time, expanded weights would take most of the time.
                outputs = run_blocks(engine, beside, tokens, cache=cache, expand=False)
                chosen = int(logits_of(engine, outputs, 0, decoder.vocabulary, expand=False).argmax())
                if chosen in self._eos_ids:
                    return
                yield chosen
                start, ahead = start + len(ahead), np.array([chosen])

    def _paths_of(self, ledger: SeedLedger, trainable: Sequence[int]) -> Paths:
        """Return the paths of a ledger's bank; those of the last call are kept, as a run has one bank."""
        key = (ledger.bank, tuple(trainable))
        if self._paths is None or self._paths[0] != key:
            bank = ledger.bank
            if not isinstance(bank, Kron):
                raise ConfigError(Fault("method.bank", "'kron', which a device runs", repr(bank.name)))
            if self._paths is not None:
                self._paths[1].close()
                self._paths = None
            self._paths = (key, Paths(bank, self._manifest, trainable, self._file, self.decoder))
        return self._paths[1]


class GgufPosition:
    """Losses at w(A) and around it; see `probing.measure.Position`."""

    def __init__(self, engine: Engine, paths: Mapping[str, Path], ledger: SeedLedger) -> None:
        self._engine, self._paths, self._ledger = engine, paths, ledger
        self._sums: Array = np.array(ledger.accumulators)

    def losses(self, batch: PaddedRows, moves: Sequence[Move]) -> Sequence[float]:
        """Return the mean loss of the batch at w(A + amount e_k) for each (k, amount)."""
        check_ids(batch.input_ids, self._engine.decoder)
        at_once, losses = max(1, TOKENS_AT_ONCE // batch.input_ids.size), list[float]()
        try:
            for begin in range(0, len(moves), at_once):
                some = moves[begin : begin + at_once]
                losses += summed_losses(self._engine, self._paths, batch, matrices_of(self._ledger, some, self._sums))
        except MemoryError as error:
            raise ggml.no_memory() from error
        return [loss / max(1, batch.count) for loss in losses]

    def move(self, seed: int, amount: int) -> None:
        """Add an amount to one accumulator for good."""
        self._sums = perturb(self._ledger.bank, self._sums, seed, amount)


class Paths:
    """The paths beside the matrices that a bank moves, in memory of their own."""

    def __init__(
        self, bank: Kron, manifest: Manifest, trainable: Sequence[int], file: GgufFile, decoder: Decoder
    ) -> None:
        names = {ordinal: movable(manifest, ordinal, file, decoder) for ordinal in trainable}
        shapes = [manifest.entries[ordinal].shape for ordinal in trainable]
        self._stack = ExitStack()
        sizes = [size for out, width in shapes for size in ((width, bank.rank), (bank.rank, out))]
        tensors = self._stack.enter_context(tensors_of(sizes))
        self.beside: dict[str, Path] = {}
        for place, ((ordinal, name), shape) in enumerate(zip(names.items(), shapes, strict=True)):
            u, v = bank.factors(ordinal, shape)
            path = Path(*tensors[2 * place : 2 * place + 2])
            ggml.write(path.first, np.ascontiguousarray(v, np.float32))
            ggml.write(path.second, np.ascontiguousarray(in_file_order(u.T, name, decoder), np.float32))
            self.beside[name] = path

    def close(self) -> None:
        self._stack.close()


@contextmanager
def tensors_of(shapes: Sequence[tuple[int, ...]]) -> Iterator[Sequence[int]]:
    """Give float32 tensors of some shapes, the fastest axis first, inside the block.

    Raises:
        ClientError: if there is no memory for them.
    """
    g, context = library(), ggml.context(len(shapes))
    tensors = [
        int(
            g.ggml_new_tensor_2d(context, F32, *shape)
            if len(shape) == 2
            else g.ggml_new_tensor_1d(context, F32, *shape)
        )
        for shape in shapes
    ]
    buffer = g.ggml_backend_alloc_ctx_tensors_from_buft(context, g.ggml_backend_cpu_buffer_type())
    try:
        if not buffer:
            raise ggml.no_memory()
        yield tensors
    finally:
        if buffer:
            g.ggml_backend_buffer_free(buffer)
        g.ggml_free(context)


def movable(manifest: Manifest, ordinal: int, file: GgufFile, decoder: Decoder) -> str:
    """Return the name in the file of a matrix that is to be moved.

    Raises:
        ConfigError: if it is none of a block's linear layers, or of another size.
    """
    entry = manifest.entries[ordinal]
    name = gguf_name(entry.name) or ""
    tensor = file.tensors.get(name)
    if not name.startswith("blk.") or tensor is None or len(entry.shape) != 2:
        expected = "linear layers of the blocks alone, which a GGUF bundle moves"
        hint = "leave method.vectors, method.embeddings and the head out, or take part by the runtime onnx"
        raise ConfigError(Fault("method.trainable", expected, entry.name, hint))
    if tensor.shape != entry.shape[::-1]:
        expected = f"{name} of shape {entry.shape[::-1]}, as the bundle's list of tensors says"
        raise ConfigError(Fault("model.base", expected, f"{tensor.shape} in {file.path}", "get the bundle again"))
    return name


def check_ids(ids: Array, decoder: Decoder) -> None:
    """Raise ClientError for tokens that the vocabulary lacks, on which the library would end the process."""
    if ids.size and not 0 <= ids.min() <= ids.max() < decoder.vocabulary:
        raise ClientError(
            f"expected tokens from 0 to {decoder.vocabulary - 1}; got {ids.min()} to {ids.max()}; "
            "get the bundle again: its tokenizer belongs to another model"
        )


def in_file_order(rows: Array, name: str, decoder: Decoder) -> Array:
    """Return rows of a matrix of transformers in the order of the file; without it other weights would be moved."""
    heads = {"attn_q": decoder.heads, "attn_k": decoder.kv_heads}.get(name.split(".")[2])
    return interleave(rows, heads) if heads and FAMILIES[decoder.family] == NEIGHBOURS else rows


def matrices_of(ledger: SeedLedger, moves: Sequence[Move], sums: Array | None = None) -> Array:
    """Return -u M for each move, float32 (moves, p, p); u is a power of two, so the product is exact."""
    bank, rank = ledger.bank, int(np.sqrt(ledger.bank.size))
    at = ledger.accumulators if sums is None else sums
    matrices = [perturb(bank, at, seed, amount).reshape(rank, rank).astype(np.float32) for seed, amount in moves]
    return np.float32(-(2.0**-ledger.exponent)) * np.stack(matrices)


def summed_losses(engine: Engine, paths: Mapping[str, Path], batch: PaddedRows, matrices: Array) -> Sequence[float]:
    """Return the cross-entropy of each move, summed over the tokens that count."""
    moves, (rows, length) = len(matrices), batch.input_ids.shape
    row, time = np.nonzero(batch.labels[:, 1:] != IGNORED)  # the output at t predicts the label at t + 1
    if not len(row):
        return [0.0] * moves
    scored = (np.arange(moves)[:, None] * rows * length + row * length + time).reshape(-1)
    outputs = run_blocks(engine, paths, Tokens(np.tile(batch.input_ids, (moves, 1)), scored, matrices))
    targets = np.tile(batch.labels[row, time + 1], moves)
    losses: Array = cross_entropies(engine, outputs, targets).reshape(moves, -1)
    return [float(loss) for loss in losses.sum(axis=1)]


def cross_entropies(engine: Engine, outputs: Array, targets: Array) -> Array:
    """Return the cross-entropy of every output, float64, over the vocabulary in parts of bounded size."""
    vocabulary, words = engine.decoder.vocabulary, max(1, HEAD_BYTES // (4 * engine.decoder.width))
    # Largest logit so far, the sum of exponentials above it, and the target's logit.
    top, total = np.full(len(outputs), -np.inf, np.float32), np.zeros(len(outputs))
    own = np.full(len(outputs), np.nan)
    for begin in range(0, vocabulary, words):
        logits = logits_of(engine, outputs, begin, end := min(begin + words, vocabulary))
        rows = np.flatnonzero((targets >= begin) & (targets < end))
        own[rows] = logits[rows, targets[rows] - begin]
        highest = np.maximum(top, logits.max(axis=1))
        np.exp(np.subtract(logits, highest[:, None], out=logits), out=logits)
        total = total * np.exp((top - highest).astype(np.float64)) + logits.sum(axis=1, dtype=np.float64)
        top = highest
    entropies: Array = np.log(total) + top - own
    return entropies
