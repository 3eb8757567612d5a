"""Forward passes of a bundle by onnxruntime: the losses of a step in one batch, and greedy text with a cache.

The graphs are those of `fedtune.model.onnx_graph`; this module gives them M as one input, a square for each row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as states

from fedtune.data.encode import IGNORED
from fedtune.directions.bank import perturb
from fedtune.directions.kron import Kron
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.edge.bundle import AGAIN, Bundle
from fedtune.edge.memory import MAX_LOGITS, MAX_TOKENS
from fedtune.edge.onnx_file import check_graph
from fedtune.errors import ClientError, ConfigError, Fault, StoreError
from fedtune.probing.rows import PaddedRows
from fedtune.probing.steps import Move
from fedtune.store import manifest as manifests
from fedtune.tensors import Array

BODY, HEAD, WEIGHTS = "graph.onnx", "head.onnx", "weights.safetensors"
LOAD_ERRORS = (
    *(states.Fail, states.InvalidArgument, states.InvalidGraph, states.InvalidProtobuf, states.NoSuchFile),
    *(states.NotImplemented, states.NotFound, states.RuntimeException),
)


def load(bundle: Bundle, *, threads: int) -> OnnxRuntime:
    """Return the runtime of a bundle, its weights mapped.

    Raises:
        StoreError: if its files cannot be read, or are other ones.
        ConfigError: if a graph asks for what this program does not run, or memory runs out.
    """
    listed = bundle.folder.listed or {}
    if WEIGHTS not in listed:
        raise StoreError(f"{bundle.path}: expected {WEIGHTS}; got a bundle without it; {AGAIN}")
    size = listed[WEIGHTS].num_bytes
    sessions = []
    for name in (BODY, HEAD):
        data = bundle.read(name)
        check_graph(data, str(bundle.path / name), weights=WEIGHTS, size=size)
        sessions.append(open_session(data, bundle.path, name, threads=threads))
    return OnnxRuntime(bundle, *sessions)


def open_session(data: bytes, folder: Path, name: str, *, threads: int) -> Any:
    """Return a session over a graph whose weights lie in a folder.

    Raises:
        StoreError: if the library refuses the graph.
        ConfigError: if memory is too small.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # A device has other work: threads that wait must sleep, and memory must be given back between steps.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        return onnxruntime.InferenceSession(
            data,
            options,
            providers=["CPUExecutionProvider"],
            # Else weights in 8 bits would be unpacked for good: the memory of float32 without its precision.
            disabled_optimizers=["ConstantFolding"],
        )
    except LOAD_ERRORS as error:
        if out_of_memory(error):
            expected = "memory for the weights"
            raise ConfigError(Fault("model.base", expected, "too little", "take a smaller base")) from error
        reason = " ".join(str(error).split())[:160]
        raise StoreError(f"{folder / name}: expected a graph that onnxruntime runs; got {reason}; {AGAIN}") from error
    except MemoryError as error:
        raise ConfigError(Fault("model.base", "memory for the weights", "too little", "take a smaller base")) from error


class OnnxRuntime:
    """A base in two sessions; see `runtime.Runtime`."""

    def __init__(self, bundle: Bundle, body: Any, head: Any) -> None:
        self._bundle, self._body, self._head = bundle, body, head
        inputs = {each.name: each.shape for each in body.get_inputs()}
        self._caches = [name for name in inputs if name.startswith(("keys.", "values."))]
        self._cache_shape = inputs[self._caches[0]] if self._caches else []
        expected = {"input_ids", "positions", "state", "places", *self._caches}
        expected |= {f"{side}.{name}" for side in ("first", "second") for name in bundle.facts.modules}
        if not self._caches or inputs.keys() != expected:
            got = sorted(inputs.keys() ^ expected)[:1] or ["no cache"]
            raise StoreError(f"{bundle.path / BODY}: expected a path for every layer; it differs by {got[0]}; {AGAIN}")
        [_, vocabulary] = head.get_outputs()[1].shape
        if vocabulary != bundle.facts.vocabulary:
            stated = f"scores of {bundle.facts.vocabulary} tokens, as {manifests.NAME} says"
            raise StoreError(f"{bundle.path / HEAD}: expected {stated}; got {vocabulary}; {AGAIN}")
        self._paths: tuple[tuple[Kron | None, tuple[int, ...]], Mapping[str, Any]] | None = None
        """Signs of the last bank and tensors, which a run keeps; 20 MB for 135 million weights."""

    @contextmanager
    def at(self, ledger: SeedLedger, trainable: Sequence[int]) -> Iterator[OnnxPosition]:
        """See `runtime.Runtime.at`."""
        try:
            yield OnnxPosition(self, ledger, self.signs(ledger.bank, trainable))
        finally:
            give_back_memory()

    def continue_tokens(
        self, ledger: SeedLedger | None, trainable: Sequence[int], ids: Sequence[int], *, new_tokens: int
    ) -> Iterator[int]:
        """See `runtime.Runtime.continue_tokens`."""
        facts = self._bundle.facts
        count = min(new_tokens, facts.positions - 1)
        tokens = list(ids) or [facts.pad_id if facts.bos_id is None else facts.bos_id]
        # The end of a prompt that is too long: an answer must fit within the positions too.
        tokens = tokens[-(facts.positions - count) :]
        signs = self.signs(None if ledger is None else ledger.bank, trainable)
        square = np.zeros((1, 1), np.float32) if ledger is None else square_of(ledger, ledger.accumulators)
        state, cache, past = orient(square[None], facts.transposed), self._empty_cache(1), 0
        for _ in range(count):
            rows = np.array([tokens], np.int64)
            hidden, cache = self.hidden(rows, state, np.array([len(tokens) - 1]), signs, cache=cache, past=past)
            logits = self.logits(hidden)
            past, tokens = past + len(tokens), [int(np.argmax(logits[0]))]
            if tokens[0] in facts.eos_ids:
                return
            yield tokens[0]

    def signs(self, bank: Any, trainable: Sequence[int]) -> Mapping[str, Any]:
        """Return the inputs of all paths; those of layers that are not moved are zeros.

        Raises:
            ConfigError: if the bank is another than `kron`, or a tensor belongs to no layer with a path.
        """
        facts, entries = self._bundle.facts, self._bundle.manifest.entries
        if bank is not None and not isinstance(bank, Kron):
            hint = 'let its sites run clients with torch, or set method.bank = "kron"'
            raise ConfigError(Fault("method.bank", "'kron' on devices", repr(bank.name), hint))
        key = (bank, tuple(trainable) if bank is not None else ())
        if self._paths is not None and self._paths[0] == key:
            return self._paths[1]
        moved = {entries[ordinal].name: ordinal for ordinal in key[1]}
        if strange := sorted(moved.keys() - set(facts.layers)):
            hint = "leave method.vectors and method.embeddings false, and name layers in method.trainable"
            raise ConfigError(Fault("method.trainable", "matrices of layers on devices", strange[0], hint))
        paths: dict[str, Any] = {}
        for name, module in facts.modules.items():
            ordinal = moved.get(f"{name}.weight")
            if bank is None or ordinal is None:
                rank = 1 if bank is None else bank.rank
                first, second = (np.zeros((rank, length), np.int8) for length in (module.width, module.out))
            else:
                u, v = bank.factors(ordinal, entries[ordinal].shape)
                first, second = (u, v) if facts.transposed else (v, u)
            paths[f"first.{name}"], paths[f"second.{name}"] = value(first), value(second)
        self._paths = (key, paths)
        return paths

    def hidden(
        self,
        ids: Array,
        state: Array,
        places: Array,
        signs: Mapping[str, Any],
        *,
        cache: Mapping[str, Any] | None = None,
        past: int = 0,
    ) -> tuple[Any, Mapping[str, Any]]:
        """Return hidden states at some places of flattened rows, and keys and values if a cache is given."""
        inputs = {
            **signs,
            **(self._empty_cache(len(ids)) if cache is None else cache),
            "input_ids": value(ids),
            "positions": value(np.arange(past, past + ids.shape[1])),
            "state": value(state),
            "places": value(places),
        }
        names = ["hidden"] if cache is None else ["hidden", *(f"new_{name}" for name in self._caches)]
        results = run(self._body, names, inputs)
        return results[0], dict(zip(self._caches, results[1:], strict=False))

    def losses(self, hidden: Any, targets: Array) -> Array:
        """Return the cross-entropy of each hidden state against its target, float32."""
        [_, vocabulary] = self._head.get_outputs()[1].shape
        rows, vectors, parts = max(1, MAX_LOGITS // vocabulary), hidden.numpy(), []
        for at in range(0, len(targets), rows):
            inputs = {"hidden": value(vectors[at : at + rows]), "targets": value(targets[at : at + rows])}
            parts.append(run(self._head, ["losses"], inputs)[0].numpy())
        return np.concatenate(parts)

    def logits(self, hidden: Any) -> Array:
        """Return the logits of hidden states, float32 (places, vocabulary)."""
        targets = value(np.zeros(hidden.shape()[0], np.int64))
        logits: Array = run(self._head, ["logits"], {"hidden": hidden, "targets": targets})[0].numpy()
        return logits

    @property
    def transposed(self) -> bool:
        return self._bundle.facts.transposed

    def _empty_cache(self, rows: int) -> Mapping[str, Any]:
        empty = value(np.zeros((rows, self._cache_shape[1], 0, self._cache_shape[3]), np.float32))
        return dict.fromkeys(self._caches, empty)


class OnnxPosition:
    """Losses at w(A) and around it; see `probing.measure.Position`."""

    def __init__(self, runtime: OnnxRuntime, ledger: SeedLedger, signs: Mapping[str, Any]) -> None:
        self._runtime, self._ledger, self._signs = runtime, ledger, signs
        self._sums = np.array(ledger.accumulators)

    def losses(self, batch: PaddedRows, moves: Sequence[Move]) -> Sequence[float]:
        """See `probing.measure.Position.losses`."""
        labels = batch.labels[:, 1:]
        rows, times = np.nonzero(labels != IGNORED)
        if len(rows) == 0:
            return [0.0] * len(moves)
        places, targets = rows * batch.input_ids.shape[1] + times, labels[rows, times]
        together, losses = max(1, MAX_TOKENS // batch.input_ids.size), list[float]()
        for at in range(0, len(moves), together):
            part = moves[at : at + together]
            squares = np.stack(
                [square_of(self._ledger, perturb(self._ledger.bank, self._sums, *move)) for move in part]
            )
            state = orient(np.repeat(squares, len(batch.input_ids), axis=0), self._runtime.transposed)
            # The output at t predicts token t + 1: `places` are those t, in every copy of the rows.
            copies = (places + np.arange(len(part))[:, None] * batch.input_ids.size).reshape(-1)
            hidden, _ = self._runtime.hidden(np.tile(batch.input_ids, (len(part), 1)), state, copies, self._signs)
            summands = self._runtime.losses(hidden, np.tile(targets, len(part))).astype(np.float64)
            losses += [float(total) / batch.count for total in summands.reshape(len(part), -1).sum(axis=1)]
        return losses

    def move(self, seed: int, amount: int) -> None:
        """See `probing.measure.Position.move`."""
        self._sums = perturb(self._ledger.bank, self._sums, seed, amount)


def square_of(ledger: SeedLedger, sums: Array) -> Array:
    """Return -u M, float32 (p, p): exact below 2^24, for u is a power of two."""
    bank = ledger.bank
    assert isinstance(bank, Kron)
    return sums.reshape(bank.rank, bank.rank).astype(np.float32) * np.float32(-(2.0**-ledger.exponent))


def orient(squares: Array, transposed: bool) -> Array:
    """Return squares (rows, p, p) as the graph multiplies by them: from the columns of M to its rows, or back."""
    return np.ascontiguousarray(squares if transposed else squares.transpose(0, 2, 1))


def value(array: Array) -> Any:
    """Return an array as an input, which shares its memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def run(session: Any, names: Sequence[str], inputs: Mapping[str, Any]) -> Sequence[Any]:
    """Return some outputs of a session.

    Raises:
        ClientError: if memory runs out.
    """
    try:
        outputs: Sequence[Any] = session.run_with_ort_values(list(names), dict(inputs))
    except (*LOAD_ERRORS, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ClientError("expected its batch to fit; memory ran out; lower client.batch") from error
    return outputs


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library holds on to it: 245 MB after steps of SmolLM2."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error of the library says that memory ran out."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or "bad_alloc" in words or "failed to allocate" in words
