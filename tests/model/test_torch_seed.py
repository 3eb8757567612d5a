from __future__ import annotations

import torch

from fedtune.model.torch_seed import torch_seed

CPU = torch.device("cpu")


def test_the_same_key_gives_the_same_draws() -> None:
    with torch_seed(7, CPU):
        first = torch.rand(3)
    with torch_seed(7, CPU):
        second = torch.rand(3)
    with torch_seed(8, CPU):
        third = torch.rand(3)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_the_callers_generator_is_left_as_it_was() -> None:
    before = torch.random.get_rng_state()
    with torch_seed(7, CPU):
        torch.rand(3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_full_64_bit_key_is_taken() -> None:
    with torch_seed(2**64 - 1, CPU):
        torch.rand(1)
