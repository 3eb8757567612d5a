"""The libraries beneath, held to fedtune's manners: no chatter while loading, and a fixed number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits
from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' remarks and bars inside the block; what matters is raised or noted by fedtune."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Hold torch and BLAS to so many threads inside the block, and give the number; none leaves their own choice.

    Bits are promised per thread count: the order of a sum changes with it.
    """
    before = torch.get_num_threads()
    if count is None:
        yield before
        return
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield count
    finally:
        torch.set_num_threads(before)
