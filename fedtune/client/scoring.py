"""What a client does with a request for scores: the global model on the rows that it holds out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from fedtune.client.personal_scoring import score_own
from fedtune.client.personal_state import StateFolder
from fedtune.data.encode import Example
from fedtune.directions.seed_ledger import decode_ledger
from fedtune.errors import ClientError, ConfigError
from fedtune.lora.adapter import unpack
from fedtune.messages import ClientScores, ScoreRequest
from fedtune.model import libraries
from fedtune.model.base import Base
from fedtune.model.evaluate import evaluate
from fedtune.model.preference import check_rows
from fedtune.model.seed_rebuild import with_rebuilt_weights
from fedtune.tensors import Tensors


def score(
    base: Base,
    held_out: Sequence[Example],
    request: ScoreRequest,
    *,
    threads: int,
    examples: Sequence[Example] = (),
    folder: StateFolder | None = None,
) -> ClientScores:
    """Return what a global model scores on a client's held-out rows; the base is afterwards as before.

    Where the request names a model of the client's own, that is scored too, from the client's training examples and the
    folder of its states.

    Raises:
        ClientError: if the base is another, or the client holds no row out.
        ShapeError: if a tensor that was sent does not fit the base.
        WireError: if the seeds are none.
    """
    began, name = time.perf_counter(), request.client
    if request.base != base.digest:
        hint = "load the same model in the same revision and dtype"
        raise ClientError(f"{name}: expected base {request.base[:12]}; has {base.digest[:12]} ({base.name}); {hint}")
    rows = held_out[: request.examples or None]
    if not rows:
        raise ClientError(f"{name}: expected rows that are held out; got none; set data.held_out above 0")
    check_rows(rows, (request.preference,) if request.preference else (), name)
    adapter, saved = unpack(request.blobs.get("global", {})), request.blobs.get("saved", {})
    if request.ledger:
        head, saved = saved, {}  # that the seeds move: it comes before them, and not after
    else:
        head = {}
    with libraries.threads(threads), with_seeds(base, request, head):
        preference = request.preference
        metrics = evaluate(base, adapter, saved, {name: rows}, batch=request.batch, preference=preference)[name]
        own: Mapping[str, float] = {}
        if request.personal is not None:
            own = score_own(
                base,
                examples,
                rows,
                request.personal,
                client=name,
                round=request.round,
                adapter=adapter,
                saved=saved,
                folder=folder,
                batch=request.batch,
            )
    return ClientScores(name, request.round, base.digest, metrics, time.perf_counter() - began, own)


@contextmanager
def with_seeds(base: Base, request: ScoreRequest, head: Tensors) -> Iterator[None]:
    """Give the base the weights that the seeds of a request give while the block runs, if it has any."""
    if not request.ledger:
        yield
        return
    ledger, entries = decode_ledger(request.ledger), len(base.manifest.entries)
    if request.trainable and request.trainable[-1] >= entries:
        raise ClientError(f"{request.client}: expected ordinals below {entries}; got {request.trainable[-1]}")
    try:
        with with_rebuilt_weights(base, ledger, request.trainable, head):
            yield
    except ConfigError as error:
        raise ClientError(f"{request.client}: {error}") from error
