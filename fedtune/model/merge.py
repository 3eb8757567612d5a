"""The merged model: the pristine checkpoint in float32, the change added once, one cast at the very end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from fedtune.lora.adapter import Adapter
from fedtune.model.base import DTYPES, Base, to_torch
from fedtune.model.libraries import quiet
from fedtune.tensors import Tensors


@dataclass(frozen=True)
class Merged:
    """What became of the change when it was cast."""

    applied: float
    """Projection of the applied change on the true one: 1 is all of it, 0 is nothing."""
    error: float
    """Norm of (applied - true) over the norm of the true change."""


def merge(base: Base, adapter: Adapter, saved: Tensors, *, dtype: str, revision: str | None, out: Path) -> Merged:
    """Write a Hugging Face model folder of the base with the adapter merged in, and say what the cast cost.

    The base is read again from its checkpoint in float32, whatever precision it trained in: merging into a low
    precision base would lose most of a small change.
    """
    auto = AutoModelForSequenceClassification if base.task == "classification" else AutoModelForCausalLM
    with quiet():
        model = auto.from_pretrained(
            base.path,
            revision=revision,
            trust_remote_code=False,
            config=base.model.config,
            dtype=torch.float32,
            use_safetensors=True,
        )
    parameters = dict(model.named_parameters())
    along = squared = off = 0.0
    with torch.no_grad():
        for name, array in saved.items():
            parameters[name].copy_(to_torch(array, torch.device("cpu")))
        for name, factors in adapter.items():
            module = model.get_submodule(name)
            change = torch.from_numpy(factors.b).double() @ torch.from_numpy(factors.a).double()  # (out, in)
            if isinstance(module, Conv1D):
                change = change.T
            before = module.weight.detach().clone()
            module.weight.copy_((before.double() + change).float())
            cast = module.weight.to(DTYPES[dtype]).double() - before.to(DTYPES[dtype]).double()
            along += float((cast * change).sum())
            squared += float(change.square().sum())
            off += float((cast - change).square().sum())
    model.to(DTYPES[dtype])
    with quiet():
        model.save_pretrained(out)  # safetensors, which is all that it writes
        base.tokenizer.save_pretrained(out)
    if squared == 0.0:
        return Merged(applied=1.0, error=0.0)
    return Merged(applied=along / squared, error=(off / squared) ** 0.5)
