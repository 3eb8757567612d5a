"""The base's own weights are never touched: what the losses are taken at is made anew from the integers each time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.directions import rebuild_torch
from fedtune.directions.bank import displacement, perturb
from fedtune.directions.blocks import Groups
from fedtune.directions.moves_torch import mover
from fedtune.directions.rebuild_numpy import rebuild
from fedtune.directions.rebuild_torch import as_array
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.space import directions
from fedtune.errors import ConfigError, RoundError, ShapeError
from fedtune.model import seed_rebuild
from fedtune.model.base import Base, digest
from fedtune.model.batches import Batch, collate
from fedtune.model.seed_rebuild import DisplacedPosition, RebuiltPosition, mean_loss, with_rebuilt_weights, working_copy
from tests.model.conftest import bank_of, ledger_of

BANKS = ["hadamard", "gaussian", "kron"]


def every(base: Base) -> range:
    """The ordinals of all tensors."""
    return range(len(base.manifest.entries))


def weights(base: Base) -> Mapping[str, bytes]:
    return {name: as_array(p.contiguous()).tobytes() for name, p in base.model.named_parameters()}


def memory(base: Base) -> Mapping[str, int]:
    return {name: parameter.data_ptr() for name, parameter in base.model.named_parameters()}


def by_reference(base: Base, ledger: SeedLedger) -> Mapping[str, bytes]:
    """All weights at w(A), by the numpy reference."""
    parameters = dict(base.model.named_parameters())
    found = {}
    for ordinal, entry in enumerate(base.manifest.entries):
        old = as_array(parameters[entry.name].contiguous())
        new = rebuild(old, ledger.accumulators, bank=ledger.bank, ordinal=ordinal, exponent=ledger.exponent)
        found[entry.name] = new.tobytes()
    return found


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize(("name", "dtype"), [("llama", "float32"), ("gpt2", "bfloat16"), ("llama", "float16")])
def test_within_the_block_every_weight_is_the_reference_s_to_the_bit(
    bank: str, name: str, dtype: str, loaded: Any
) -> None:
    base = loaded(name, targets=["all-linear"], dtype=dtype)
    ledger, own = ledger_of(base, bank), weights(base)
    expected = by_reference(base, ledger)
    with with_rebuilt_weights(base, ledger, every(base)):
        assert weights(base) == expected
    assert all(expected[tensor] != own[tensor] for tensor in own)
    assert weights(base) == own


def grouped_ledger(base: Base, name: str, groups: Groups) -> SeedLedger:
    """A ledger of two banks over a base."""
    bank = directions(name, 16, [3, 2**64 - 1], groups, every(base))
    sums = np.random.default_rng(2).integers(-8, 9, bank.size).astype(np.int32)
    return SeedLedger(bank, 10, 3, base.manifest.digest, sums)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("bank", "groups"), [("hadamard", 4), ("hadamard", "tensor"), ("gaussian", 1), ("kron", "tensor")]
)
def test_several_banks_and_groups_give_the_reference_s_weights_to_the_bit(
    bank: str, groups: Groups, compiled: bool, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = loaded(targets=["all-linear"], dtype="bfloat16")
    ledger, own = grouped_ledger(base, bank, groups), weights(base)
    expected = by_reference(base, ledger)
    if not compiled:
        monkeypatch.setattr(rebuild_torch, "fastest", lambda device: rebuild_torch.rebuild)
    with with_rebuilt_weights(base, ledger, every(base)):
        assert weights(base) == expected
    assert all(expected[tensor] != own[tensor] for tensor in own)
    if groups == "tensor":
        with pytest.raises(ConfigError, match="numbers for"), with_rebuilt_weights(base, ledger, range(3)):
            pass
    assert weights(base) == own


def test_only_the_trainable_tensors_are_moved(loaded: Any) -> None:
    base = loaded()
    own, moved = weights(base), [2, 5]
    names = {base.manifest.entries[ordinal].name for ordinal in moved}
    with with_rebuilt_weights(base, ledger_of(base, "hadamard"), moved):
        assert {name for name, data in weights(base).items() if data != own[name]} == names


def test_afterwards_the_base_holds_its_own_memory_again_whatever_happened_within(loaded: Any) -> None:
    base = loaded()
    ledger, own, places = ledger_of(base, "hadamard"), digest(base.model), memory(base)
    with with_rebuilt_weights(base, ledger, every(base)):
        assert not set(memory(base).values()) & set(places.values())
    assert (digest(base.model), memory(base)) == (own, places)
    with pytest.raises(ZeroDivisionError), with_rebuilt_weights(base, ledger, every(base)):
        raise ZeroDivisionError
    assert (digest(base.model), memory(base)) == (own, places)


def test_accumulators_of_another_length_leave_the_base_as_it_was(loaded: Any) -> None:
    base = loaded()
    ledger, places = ledger_of(base, "hadamard"), memory(base)
    short = SeedLedger(ledger.bank, ledger.exponent, 3, ledger.manifest, ledger.accumulators[:8])
    with pytest.raises(ShapeError, match="expected 16 signed integers"), with_rebuilt_weights(base, short, every(base)):
        pass
    assert memory(base) == places


def test_tied_embeddings_stay_tied(loaded: Any) -> None:
    base = loaded("gpt2", targets=["c_attn"])
    model, own = base.model, weights(base)
    with with_rebuilt_weights(base, ledger_of(base, "hadamard"), every(base)):
        assert model.lm_head.weight is model.transformer.wte.weight
        assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
        assert as_array(model.lm_head.weight).tobytes() != own["transformer.wte.weight"]
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_ledger_of_zeros_changes_no_bit(loaded: Any) -> None:
    base = loaded(dtype="bfloat16")
    own, zeros = digest(base.model), ledger_of(base, "hadamard", largest=0)
    with with_rebuilt_weights(base, zeros, every(base)):
        assert digest(base.model) == own


def batch_of(base: Base, examples: Any, count: int = 4) -> Batch:
    return collate(examples(count), base)


@pytest.mark.parametrize("bank", ["hadamard", "gaussian"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_displacements_that_are_kept_give_the_losses_of_weights_that_are_rebuilt(
    dtype: str, bank: str, loaded: Any, examples: Any
) -> None:
    """Of two ways to one model: the same bits, also after several moves, and both sides of more than one seed."""
    base = loaded(dtype=dtype)
    ledger, batch = ledger_of(base, bank), batch_of(base, examples)
    moves = [(3, -40), (3, 40), (5, -40), (5, 0), (3, 40)]
    found = []
    for kind in (RebuiltPosition, DisplacedPosition):
        with working_copy(base, every(base)) as trios, torch.inference_mode():
            position = kind(base, ledger, trios)
            seen = [position.losses(batch, moves)]
            for seed, amount in ((3, 17), (0, -120), (3, 1), (15, 16)):
                position.move(seed, amount)
                seen.append(position.losses(batch, moves))
        found.append(seen)
    assert found[0] == found[1]
    assert len({loss for seen in found[0] for loss in seen}) == 5 * 4  # the last move is the second one again


POSITIONS = [("hadamard", RebuiltPosition), ("hadamard", DisplacedPosition), ("gaussian", DisplacedPosition)]


@pytest.mark.parametrize(("bank", "kind"), POSITIONS)
def test_losses_are_those_of_weights_set_by_hand(bank: str, kind: Any, loaded: Any, examples: Any) -> None:
    base = loaded()
    ledger, batch, moves = ledger_of(base, bank), batch_of(base, examples), [(3, -40), (3, 40), (9, 0)]
    with working_copy(base, every(base)) as trios, torch.inference_mode():
        position = kind(base, ledger, trios)
        position.move(7, 30)
        found = position.losses(batch, moves)
    unit = 2.0 ** -(ledger.exponent + ledger.bank.halvings)
    own = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    for (seed, amount), loss in zip(moves, found, strict=True):
        sums = perturb(ledger.bank, perturb(ledger.bank, ledger.accumulators, 7, 30), seed, amount)
        with torch.no_grad():
            for ordinal, entry in enumerate(base.manifest.entries):
                y = displacement(ledger.bank, sums, ordinal=ordinal, shape=entry.shape).reshape(entry.shape)
                weight = base.model.get_parameter(entry.name)
                weight.copy_(own[entry.name] - unit * torch.from_numpy(y))
            assert mean_loss(base, batch) == pytest.approx(loss, abs=1e-6)
    assert len({round(loss, 4) for loss in found}) == 3


@pytest.mark.parametrize("kind", [RebuiltPosition, DisplacedPosition])
def test_a_loss_beyond_32_bits_is_refused(kind: Any, loaded: Any, examples: Any) -> None:
    base = loaded()
    ledger, batch = ledger_of(base, "hadamard"), batch_of(base, examples)
    with working_copy(base, every(base)) as trios, torch.inference_mode():
        position = kind(base, ledger, trios)
        [before] = position.losses(batch, [(0, 0)])
        with pytest.raises(RoundError, match=r"expected sum \|A\| of at most 2147483647"):
            position.losses(batch, [(3, 2**31 - 1)])
        assert position.losses(batch, [(0, 0)]) == [before]


def test_weights_that_stand_already_are_not_written_again(
    loaded: Any, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss before the first step is taken over several batches at one position."""
    base = loaded()
    ledger, written = ledger_of(base, "hadamard"), list[Any]()

    def spied(*arguments: Any, **options: Any) -> Any:
        write = mover(*arguments, **options)

        def write_and_note(moves: Any, beside: Any) -> None:
            written.append((list(moves), beside))
            write(moves, beside)

        return write_and_note

    monkeypatch.setattr(seed_rebuild, "mover", spied)
    with working_copy(base, every(base)) as trios, torch.inference_mode():
        position = DisplacedPosition(base, ledger, trios)
        for count in (1, 2, 3):
            position.losses(batch_of(base, examples, count), [(count, 0)])
        position.move(4, 9)
        position.move(5, -9)
        position.losses(batch_of(base, examples), [(4, -40), (4, 40), (4, 40)])
        position.move(1, 3)
        position.losses(batch_of(base, examples), [(4, 40)])
    assert written == [([], (0, 0)), ([(4, 9), (5, -9)], (4, -40)), ([], (4, 40)), ([(1, 3)], (4, 40))]


def drawn(steps: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(1)
    return [(int(rng.integers(16)), int(rng.integers(-127, 128))) for _ in range(steps)]


@pytest.mark.parametrize(("bank", "kind"), POSITIONS)
def test_two_hundred_losses_and_moves_leave_weights_and_buffers_as_they_were(
    bank: str, kind: Any, loaded: Any, examples: Any
) -> None:
    base = loaded(dtype="bfloat16")
    own, places, batch = digest(base.model), memory(base), batch_of(base, examples, count=2)
    buffers = {name: buffer.clone() for name, buffer in base.model.named_buffers()}
    with working_copy(base, every(base)) as trios, torch.inference_mode():
        position = kind(base, ledger_of(base, bank), trios)
        for seed, scalar in drawn(100):
            position.losses(batch, [(seed, -40), (seed, 40)])
            position.move(seed, scalar)
    assert (digest(base.model), memory(base)) == (own, places)
    assert buffers
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in base.model.named_buffers())


def test_the_published_perturbation_in_place_drifts_in_bfloat16(loaded: Any) -> None:
    """What the test above would see: +eps, -2 eps, +eps, as often, over three of the tensors."""
    base = loaded(dtype="bfloat16")
    own, bank = digest(base.model), bank_of("hadamard")
    parameters = dict(base.model.named_parameters())
    with torch.no_grad():
        for seed, _ in drawn(200):
            one = perturb(bank, np.zeros(16, np.int32), seed, 1)
            for ordinal, entry in enumerate(base.manifest.entries[:3]):
                z = torch.from_numpy(displacement(bank, one, ordinal=ordinal, shape=entry.shape)).view(entry.shape)
                for eps in (5e-4, -1e-3, 5e-4):
                    parameters[entry.name].add_(z.bfloat16(), alpha=eps)
    assert digest(base.model) != own
