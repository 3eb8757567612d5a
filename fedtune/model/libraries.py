"""Settings of the libraries beneath: no messages of transformers while loading, and a fixed number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits
from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings and progress bars inside the block; fedtune reports errors itself."""
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
    """Limit torch and BLAS to `count` threads inside the block, and yield the number; None leaves their own choice.

    Results are reproducible per number of threads: the order of a sum changes with it.
    """
    before = torch.get_num_threads()
    if count is None:
        yield before
        return
    torch.set_num_threads(count)
    # torch's setting does not reach the BLAS of numpy, which the aggregation and the rebuild use.
    try:
        with threadpool_limits(count):
            yield count
    finally:
        torch.set_num_threads(before)
