"""The part of every training step that one of several processes computes, and the sums by which all take one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the sums of the others; of one that has ended it hears at once."""


@dataclass(frozen=True)
class Shares:
    """How the rows of each batch are divided among processes that train the same adapter on the same base."""

    place: int = 0
    """Of this process."""
    size: int = 1
    """Processes."""
    group: Any = None
    """torch's ProcessGroupGloo of all of them; None for one."""

    def own(self, rows: Sequence[T]) -> Sequence[T]:
        """Return what this process computes of a batch; it may be nothing."""
        return rows[self.place :: self.size]

    def join(self, parameters: Sequence[nn.Parameter], loss: float, count: int, tokens: int) -> tuple[float, int]:
        """Give the parameters the gradients of the whole step, and return its mean loss and its tokens.

        Args:
            parameters: with the gradients of the mean loss over this process's rows.
            loss: that mean.
            count: what it is the mean over.
            tokens: of this process's rows.
        """
        if self.size == 1:
            return loss, tokens
        sums = torch.tensor([loss * count, count, tokens], dtype=torch.float64)
        self.group.allreduce([sums]).wait()
        total = max(1.0, sums[1].item())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        # One vector in main memory, whatever computes: an adapter has a few megabytes.
        flat = torch.cat([grad.reshape(-1).float().cpu() for grad in grads]) * (count / total)
        self.group.allreduce([flat]).wait()
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter)
        return sums[0].item() / total, int(sums[2].item())


ALONE = Shares()
"""One process computes everything."""


def connect(store: Path, place: int, size: int) -> Shares:
    """Return this process's share among processes of one machine; waits until all of them have called it.

    Args:
        store: a file that does not exist yet, in a folder of this user alone.
        place: of this process, from 0.
        size: processes.
    """
    # Here, because not every build of torch has it.
    from torch import distributed

    gloo: Any = distributed.ProcessGroupGloo
    options = gloo._Options()
    # Of this machine alone: gradients say much about the data, and torch's default is the address of the host's name.
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = PATIENCE
    rendezvous: Any = distributed
    return Shares(place, size, gloo(rendezvous.FileStore(str(store), size), place, size, options))
