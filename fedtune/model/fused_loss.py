"""Cross-entropy from hidden states, some tokens at a time: the logits of a batch are never in memory all at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 32 * 2**20
"""Of float32 logits at a time on a CPU: of 50 000 tokens 170 rows, enough for a matrix product at its full speed."""
GPU_FACTOR = 8
"""On other devices so many times as much: there a product of few rows waits for the weights to be read."""
PROBE_TOKENS = 4
"""Length of the text by which a model is asked how it makes logits of hidden states."""
LARGE_LOGIT = 1000.0
"""Beyond any cap that models put on logits: tanh would show."""


def head_cross_entropies(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy of an output layer on hidden states, in float32, without all logits at once.

    Args:
        head: the model's output layer; it may be trained, or carry an adapter.
        hidden: (tokens, width), only of tokens whose label counts.
        labels: (tokens,)
    """
    rows = chunk_rows(head, hidden)
    if is_plain(head):
        return plain_losses(head, hidden, labels, rows)[0]
    # Computed twice, so that the backward pass needs no logits; the gradients of the head's own parameters add up.
    parts = zip(hidden.split(rows), labels.split(rows), strict=True)
    return sum(
        (checkpoint(chunk_loss, head, *part, use_reentrant=False) for part in parts), hidden.new_zeros(()).float()
    )


def token_cross_entropies(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each token, (tokens,), in float32; arguments as of `head_cross_entropies`."""
    rows = chunk_rows(head, hidden)
    if is_plain(head):
        return plain_losses(head, hidden, labels, rows)[1]
    parts = zip(hidden.split(rows), labels.split(rows), strict=True)
    return torch.cat([checkpoint(chunk_loss, head, *part, "none", use_reentrant=False) for part in parts])


def chunk_rows(head: nn.Module, hidden: torch.Tensor) -> int:
    """Return how many tokens' logits are in memory at a time."""
    size = CHUNK_BYTES * (1 if hidden.device.type == "cpu" else GPU_FACTOR)
    return max(1, size // (4 * num_outputs(head)))


def plain_losses(head: Any, hidden: torch.Tensor, labels: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy of a frozen output layer, summed up and by token; of one of them a gradient is taken."""
    weight, bias = head.weight, head.bias
    if torch.is_autocast_enabled(hidden.device.type):
        # Here and not in every chunk: autocast remembers its copies of trained weights only.
        dtype = torch.get_autocast_dtype(hidden.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    both: tuple[torch.Tensor, torch.Tensor] = FrozenHeadLoss.apply(hidden, weight, bias, labels, rows)  # type: ignore[no-untyped-call]
    return both


def chunk_loss(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
    return cross_entropy(head(hidden).float(), labels, reduction=reduction)


def num_outputs(head: Any) -> int:
    """Return the number of tokens that an output layer has a row for; peft's layers hold the weight in one below."""
    return int(getattr(head, "base_layer", head).weight.shape[0])


def is_plain(head: nn.Module) -> bool:
    """Return whether an output layer is one frozen product, without an adapter or hooks."""
    hooks = head._forward_hooks or head._forward_pre_hooks
    return type(head) is nn.Linear and not hooks and not any(p.requires_grad for p in head.parameters())


class FrozenHeadLoss(torch.autograd.Function):
    """The cross-entropy of a frozen output layer, summed and by token, its gradient computed beside it, by chunks.

    As in Liger Kernel, arXiv 2410.10989, section 3.2: a chunk's logits become its probabilities in place, and are gone
    before the next one begins. What is stored for the backward pass is as large as the hidden states.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # (tokens, width)
        weight: torch.Tensor,  # (vocabulary, width)
        bias: torch.Tensor | None,  # (vocabulary,)
        labels: torch.Tensor,  # (tokens,)
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # A gradient that is not asked for stays None: the sum's is one number for all tokens.
        ctx.set_materialize_grads(False)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for begin in range(0, len(hidden), rows):
            chunk, places = slice(begin, begin + rows), labels[begin : begin + rows, None]
            # In float32: a sum over a vocabulary in 16 bits would round the loss to two or three digits.
            logits = linear(hidden[chunk], weight, bias).float()
            logits -= logits.amax(1, keepdim=True)
            picked = logits.gather(1, places)
            sums = logits.exp_().sum(1, keepdim=True)
            own = sums.log() - picked
            losses[chunk] = own[:, 0]
            total += own.sum()
            if gradient is not None:
                probabilities = logits.div_(sums)
                probabilities.scatter_add_(1, places, torch.full_like(picked, -1.0))
                gradient[chunk] = probabilities.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        [gradient] = ctx.saved_tensors
        of_sum, of_tokens = grad_outputs
        if gradient is None:
            return None, None, None, None, None
        scaled = gradient if of_sum is None else gradient * of_sum.to(gradient.dtype)
        if of_tokens is not None:
            scaled = gradient * of_tokens[:, None].to(gradient.dtype)
        return scaled, None, None, None, None


@torch.no_grad()
def projects_plainly(model: Any) -> bool:
    """Return whether a causal model's logits are its output layer's product with its body's hidden states, as it is.

    Not of a model that caps, scales or shifts its logits. The output layer answers with large numbers of our own, which
    must reach the caller unchanged; small ones would pass through a cap nearly as they are.
    """
    head, body = model.get_output_embeddings(), model.base_model
    if not isinstance(head, nn.Linear) or body is model:
        return False
    seen = list[torch.Tensor]()

    width = head.weight.shape[0]
    numbers = torch.linspace(-LARGE_LOGIT, LARGE_LOGIT, width, device=head.weight.device)
    # From the middle of the table: the first tokens are often special ones, which some models mask.
    ids = (width // 2 + torch.arange(PROBE_TOKENS, device=numbers.device))[None] % width
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    hooks = [
        head.register_forward_pre_hook(lambda _, given: seen.append(given[0]), prepend=True),
        head.register_forward_hook(lambda *_: numbers.to(model.dtype).expand(*ids.shape, width)),
    ]
    try:
        logits, hidden = model(**inputs).logits, body(**inputs)[0]
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        return False
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != 1 or seen[0].shape != hidden.shape or seen[0].dtype != hidden.dtype:
        return False
    unchanged = torch.equal(logits.float(), numbers.to(model.dtype).float().expand_as(logits))
    return unchanged and torch.allclose(seen[0], hidden, rtol=1e-3)
