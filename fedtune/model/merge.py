"""The merged model: the pristine checkpoint in float32, the change added once, one cast at the very end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from fedtune.lora.adapter import Adapter
from fedtune.model.base import Base, to_torch
from fedtune.model.base_files import readable
from fedtune.model.device import DTYPES
from fedtune.model.libraries import quiet
from fedtune.tensors import Tensors


@dataclass(frozen=True)
class Merged:
    """How much of a change survived the cast to the output's number format."""

    applied: float
    """Projection of the applied change on the true one: 1 is all of it, 0 is nothing."""
    error: float
    """Norm of (applied - true) over the norm of the true change."""


class CastLoss:
    """Sums over all layers from which `Merged` follows."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._along = self._squared = self._off = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor, change: torch.Tensor) -> None:
        """Count a layer whose weight goes from `before` to `after`, both float32, by the float64 `change`."""
        cast = after.to(self._dtype).double() - before.to(self._dtype).double()
        self._along += float((cast * change).sum())
        self._squared += float(change.square().sum())
        self._off += float((cast - change).square().sum())

    def result(self) -> Merged:
        """Return the share that was applied; without any change that is all of it."""
        if self._squared == 0.0:
            return Merged(applied=1.0, error=0.0)
        return Merged(applied=self._along / self._squared, error=(self._off / self._squared) ** 0.5)


def merge(base: Base, adapter: Adapter, saved: Tensors, *, dtype: str, revision: str | None, out: Path) -> Merged:
    """Write a Hugging Face model folder of the base with the adapter merged in, and return what the cast cost.

    The base is read again from its checkpoint in float32, whatever precision it trained in: merging into a low
    precision base would lose most of a small change.
    """
    auto = AutoModelForSequenceClassification if base.task == "classification" else AutoModelForCausalLM
    with quiet():
        model = auto.from_pretrained(
            readable(base.path, revision),
            revision=revision,
            trust_remote_code=False,
            config=base.model.config,
            dtype=torch.float32,
            use_safetensors=True,
            # A head of other classes than the checkpoint's is among the saved modules.
            ignore_mismatched_sizes=base.task == "classification",
        )
    parameters, loss = dict(model.named_parameters()), CastLoss(DTYPES[dtype])
    with torch.no_grad():
        for name, array in saved.items():
            parameters[name].copy_(to_torch(array, torch.device("cpu")))
        for name, factors in adapter.items():
            module = model.get_submodule(name)
            # In float64, so that the sum is rounded once: the result is the float32 number nearest to W + BA.
            change = torch.from_numpy(factors.b).double() @ torch.from_numpy(factors.a).double()  # (out, in)
            if isinstance(module, Conv1D):
                change = change.T
            # A copy, since the weight is changed in place: the loss of the cast is measured on the difference.
            before = module.weight.detach().clone()
            module.weight.copy_((before.double() + change).float())
            loss.add(before, module.weight, change)
    model.to(DTYPES[dtype])
    with quiet():
        model.save_pretrained(out)  # as safetensors alone
        base.tokenizer.save_pretrained(out)
    return loss.result()
