"""A base whose weights another program has changed: read again from where it came, into the same tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedtune.model.base import LOAD_ERRORS, Base, sum_bits
from fedtune.model.base_config import auto_class
from fedtune.model.base_files import readable
from fedtune.model.device import DTYPES
from fedtune.model.libraries import quiet


def changed_names(base: Base, before: Mapping[str, int]) -> list[str]:
    """Return the parameters of a base whose bits are not those of a checksum any more, sorted."""
    now = {name: sum_bits(parameter) for name, parameter in base.model.named_parameters()}
    return sorted(name for name in before if now.get(name) != before[name])


def reread(base: Base, before: Mapping[str, int]) -> bool:
    """Write the checkpoint's weights over those of a base, in place; return whether all have their bits again.

    A base that Python code gave may have no checkpoint, or one that is not what was given: then it stays changed.

    Args:
        base: with layers and attributes as they were loaded.
        before: the checksum of its weights as they were loaded.
    """
    wrong, own = changed_names(base, before), dict(base.model.named_parameters())
    dtype = next((own[name].dtype for name in own if name not in wrong), DTYPES.get(base.dtype, torch.float32))
    try:
        with quiet():
            fresh = auto_class(base.task).from_pretrained(
                readable(base.path, None), dtype=dtype, trust_remote_code=False, use_safetensors=True
            )
    except LOAD_ERRORS:
        return False
    numbers = dict(fresh.named_parameters())
    for name in wrong:
        if name not in numbers or numbers[name].shape != own[name].shape:
            return False
        # Also where the trainer has exchanged the tensor itself, for one of another format or on another device.
        own[name].data = numbers[name].data.to(base.device)
    return not changed_names(base, before)
