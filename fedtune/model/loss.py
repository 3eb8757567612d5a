"""The loss of a batch, summed over what counts in it: cross-entropy, or DPO's of preferred and rejected answers."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy, logsigmoid

from fedtune.data.encode import IGNORED
from fedtune.model.batches import Batch, Pairs, reads
from fedtune.model.fused_loss import head_cross_entropies, token_cross_entropies


def summed_loss(model: Any, batch: Batch, *, task: str) -> torch.Tensor:
    """Return the cross-entropy summed over the tokens (causal) or examples that count, in float32.

    Where a batch holds preferred and rejected answers, the loss that compares them, summed over the pairs.
    """
    if batch.pairs is not None:
        return preference_losses(answer_likelihoods(model, batch), batch.pairs).sum()
    if batch.fused:
        return fused_cross_entropies(model, batch)
    return cross_entropies(logits_of(model, batch, task=task), batch.labels, task=task)


def preference_losses(likelihoods: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Return -log sigmoid(beta (log p(preferred) - log p(rejected) - margin of the reference)): (pairs,).

    DPO, Rafailov et al., NeurIPS 2023, arXiv 2305.18290, equation 7.

    Args:
        likelihoods: (2 pairs,), log p of every answer, the preferred ones first.
        pairs: beta, and the margins of the reference.
    """
    return -logsigmoid(pairs.beta * (answer_margins(likelihoods) - pairs.margins))


def answer_margins(likelihoods: torch.Tensor) -> torch.Tensor:
    """Return log p(preferred) - log p(rejected) of each pair: (pairs,)."""
    preferred, rejected = likelihoods.chunk(2)
    return preferred - rejected


def answer_likelihoods(model: Any, batch: Batch) -> torch.Tensor:
    """Return log p of what counts in each row of a causal model's batch, summed over its tokens, in float32: (rows,).

    Summed and not averaged: the reward of DPO is a ratio of the probabilities of whole answers.
    """
    labels = batch.labels[:, 1:]  # the output at t predicts token t + 1
    rows, places = (labels != IGNORED).nonzero(as_tuple=True)
    if batch.fused:
        counted = hidden_of(model, batch)[:, :-1][rows, places]
        losses = token_cross_entropies(model.get_output_embeddings(), counted, labels[rows, places])
    else:
        logits = logits_of(model, batch, task="causal")[:, :-1][rows, places]
        losses = cross_entropy(logits.float(), labels[rows, places], reduction="none")
    # Put in their places and then summed: adding them up by row would have another order on CUDA at every call.
    return -losses.new_zeros(labels.shape).index_put((rows, places), losses).sum(1)


def fused_cross_entropies(model: Any, batch: Batch) -> torch.Tensor:
    """Return the same of a causal model without its logits: only tokens that count go through the output layer."""
    return hidden_cross_entropies(model, hidden_of(model, batch), batch.labels)


def hidden_of(model: Any, batch: Batch) -> torch.Tensor:
    """Return the last hidden states of a batch: (batch, time, width)."""
    hidden: torch.Tensor = model.base_model(**batch.inputs, use_cache=False)[0]
    return hidden


def hidden_cross_entropies(model: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy summed over the tokens that count of some rows' last hidden states, in float32."""
    labels = labels[:, 1:].flatten()  # the output at t predicts token t + 1
    [places] = (labels != IGNORED).nonzero(as_tuple=True)
    counted = hidden[:, :-1].flatten(0, 1).index_select(0, places)
    return head_cross_entropies(model.get_output_embeddings(), counted, labels[places])


def logits_of(model: Any, batch: Batch, *, task: str) -> torch.Tensor:
    """Return the logits of a batch: (batch, time, vocabulary), or (batch, classes)."""
    # Without use_cache=False every forward pass would store keys and values for a generation that never comes, and one
    # that is computed again for its gradients would find them. Encoders have no such argument.
    options = {"use_cache": False} if task == "causal" or reads(model, "use_cache") else {}
    logits: torch.Tensor = model(**batch.inputs, **options).logits
    return logits


def cross_entropies(logits: torch.Tensor, labels: torch.Tensor, *, task: str) -> torch.Tensor:
    """Return the cross-entropy summed over the tokens or examples that count, in float32."""
    if task == "causal":
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # the output at t predicts token t + 1
    # In float32: a sum over a vocabulary in 16 bits would round the loss to two or three digits.
    return cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
