"""What a client scores of its own model: on the rows that it holds out, beside the global model's score on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedtune.client.personal_state import PersonalState, StateFolder
from fedtune.data.encode import Example
from fedtune.errors import ClientError
from fedtune.lora.adapter import Adapter, Factors, pack, unpack
from fedtune.messages import PersonalRequest
from fedtune.model.base import Base
from fedtune.model.evaluate import evaluate
from fedtune.model.lora import read_local, with_adapters
from fedtune.model.train import report_out_of_memory, train, uses_autocast
from fedtune.tensors import Tensors


def score_own(
    base: Base,
    examples: Sequence[Example],
    rows: Sequence[Example],
    request: PersonalRequest,
    *,
    client: str,
    round: int,
    adapter: Adapter,
    saved: Tensors,
    folder: StateFolder | None,
    batch: int,
) -> Mapping[str, float]:
    """Return what a client's own model scores on some rows; the base is afterwards as before.

    Args:
        base: the base.
        examples: the client's own, on which `finetune` trains; the rows are none of them.
        rows: that are scored.
        request: which model of its own.
        client: its name.
        round: the last one that is in the global model.
        adapter: the global model's, of scale 1.
        saved: the global model's modules_to_save.
        folder: of the client's states; a client without one has the global model as its own.
        batch: examples per forward pass.

    Raises:
        ClientError: if there is nothing to score, or training fails.
    """
    if not rows:
        raise ClientError(f"{client}: expected rows that are held out; got none; set data.held_out above 0")
    if not request.personal.has_state:
        own, full = finetune(base, examples, request, client=client, adapter=adapter, saved=saved)
    else:
        stored = folder.load(client, round + 1) if folder is not None else None
        own, full = combine(adapter, saved, stored.state) if stored is not None else (adapter, saved)
    return evaluate(base, own, full, {client: rows}, batch=batch)[client]


def combine(adapter: Adapter, saved: Tensors, state: PersonalState) -> tuple[Adapter, Tensors]:
    """Return a client's own model: its own tensors in the places of the global model's.

    Where the client has trained fewer ranks than the global model has, these are the leading ones.
    """
    own = {name: tensor * state.scale if name.endswith(".b") else tensor for name, tensor in state.factors.items()}
    combined = dict(adapter)
    for module in {name.rpartition(".")[0] for name in own}:
        a, b = own.get(f"{module}.a"), own.get(f"{module}.b")
        if a is None or b is None:
            part = adapter.get(module)
            if part is None:
                continue  # a global model that has nothing there, as before round 1
            a, b = part.a if a is None else a, part.b if b is None else b
        rank = min(len(a), b.shape[1])
        combined[module] = Factors(a=a[:rank], b=b[:, :rank])
    return combined, {**saved, **state.saved}


def finetune(
    base: Base, examples: Sequence[Example], request: PersonalRequest, *, client: str, adapter: Adapter, saved: Tensors
) -> tuple[Adapter, Tensors]:
    """Return the global model after a few steps on the client's own examples; nothing of it is stored."""
    training = request.training
    assert training is not None  # of requests for this kind
    local = {name: Factors(a=part.a, b=part.b / request.scale) for name, part in adapter.items()}
    with (
        report_out_of_memory(client, training.batch),
        with_adapters(
            base,
            local=local,
            scale=request.scale,
            dropout=training.dropout,
            train=request.train,
            saved=saved,
            half=uses_autocast(training, base.device),
        ) as model,
    ):
        train(base, examples, training, key=request.seed, client=client)
        parameters = dict(model.named_parameters())
        ends = read_local(model)
        full = {name: parameters[name].detach().float().cpu().numpy().copy() for name in saved}
    trained = {name: Factors(a=part.a, b=part.b * request.scale) for name, part in ends.items()}
    return unpack(pack({**adapter, **trained})), full
