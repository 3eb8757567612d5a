from __future__ import annotations

import pytest
import torch
from transformers.utils import logging

from fedtune.model.libraries import quiet, threads


def test_threads_are_held_inside_and_given_back_after() -> None:
    before = torch.get_num_threads()
    with threads(before + 1) as count:
        assert count == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_no_number_leaves_the_libraries_their_own() -> None:
    before = torch.get_num_threads()
    with threads(None) as count:
        assert count == torch.get_num_threads() == before


def test_threads_are_given_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("bars", [True, False])
def test_quiet_silences_remarks_and_bars_and_gives_back_what_was(bars: bool) -> None:
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_info()
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        with quiet():
            assert logging.get_verbosity() == logging.ERROR
            assert not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled() is bars
    finally:
        logging.set_verbosity(level)
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
