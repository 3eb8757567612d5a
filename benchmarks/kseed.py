"""What FedKSeed costs: a model rebuilt from K integers, and a step, beside the published loop, a copy and two forwards.

    python benchmarks/kseed.py rebuild --parameters 2e8
    python benchmarks/kseed.py step
    python benchmarks/kseed.py pair --parameters 1.35e8

Prints one JSON line per case, on one core. Times of a rebuild are the best of several, scaled to 10^9 parameters; a
slow way is measured on a slice, whose size is in its line. The published loop draws one normal tensor per seed and
adds it. A step is measured on a Llama of 25 million random weights: two forward passes of the same batch are the floor
(processor time, which a busy machine changes least), and the published step perturbs all weights in place three times,
with a draw each, and a fourth time to update them. A pair, on the same model or, above 10^8
parameters, one of SmolLM2-135M's shapes, is a step in both ways that fedtune has, with displacements in memory and by
rebuilds, and two plain forward passes, in turn.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.data.encode import Example
from fedtune.directions import rebuild_torch
from fedtune.directions.bank import DirectionBank
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.kron import Kron
from fedtune.directions.rebuild_numpy import rebuild
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.space import directions
from fedtune.directions.trainable import TensorSelection, trainable_ordinals
from fedtune.model.base import Base
from fedtune.model.batches import Batch, collate
from fedtune.model.probe import at_position
from fedtune.model.seed_rebuild import DisplacedPosition, RebuiltPosition, mean_loss, working_copy
from fedtune.model.targets import find_targets
from fedtune.model.torch_seed import torch_seed
from fedtune.probing.measure import Position
from fedtune.seeds import derive, generator
from fedtune.tensors import Array

BILLION = 10**9
WIDTH = 4096
EXPONENT = 26
AMOUNT = 33_554
"""A perturbation of 5e-4."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure; everything without it")
    parser.add_argument("--parameters", type=float, default=1e8, help="size of the tensor that is rebuilt")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for part in args.parts or PARTS:
        PARTS[part](int(args.parameters), args.repeat)


def measure_rebuilds(parameters: int, repeat: int) -> None:
    """Rebuild one bfloat16 matrix of the size asked for."""
    base = torch.full((parameters // WIDTH, WIDTH), 0.02, dtype=torch.bfloat16)
    result = torch.empty_like(base)
    floor = per_billion(lambda: result.copy_(base), base.numel(), repeat)
    report("copy", seconds_per_billion=floor, measured_at=base.numel())
    loops = {size: published_loop(2**22, size) for size in (1024, 4096)}
    for size, seconds in loops.items():
        report("published loop", seeds=size, seconds_per_billion=seconds, measured_at=2**22, seeds_measured=SEEDS)
    for bank in (Hadamard(4096, KEY), Hadamard(1024, KEY), Kron(4096, KEY), Gaussian(1024, KEY), Gaussian(4096, KEY)):
        for way, rebuild_with in WAYS.items():
            slow = isinstance(bank, Gaussian)
            rows = min(len(base), SLICES[way, slow] // WIDTH)
            if not rows:
                continue
            sums = accumulators(bank)
            call = rebuild_call(rebuild_with, base[:rows], result[:rows], sums, bank)
            call()  # compiles, and draws what is drawn once
            seconds = per_billion(call, rows * WIDTH, 1 if slow else repeat)
            report(
                "rebuild",
                bank=bank.name,
                seeds=bank.size,
                way=way,
                seconds_per_billion=seconds,
                times_faster_than_loop=loops[bank.size] / seconds,
                times_slower_than_copy=seconds / floor,
                measured_at=rows * WIDTH,
            )


def measure_steps(parameters: int, repeat: int) -> None:
    """Measure one two-sided step with each bank; two forward passes are measured right before and after each."""
    base = llama()
    count = sum(parameter.numel() for parameter in base.model.parameters())
    banks: Sequence[DirectionBank] = (Kron(4096, KEY), Hadamard(4096, KEY), Gaussian(4096, KEY))
    for tokens in (32, 128, 512):
        batch = collate([example(tokens)], base)

        def forwards(batch: Batch = batch) -> None:
            mean_loss(base, batch)
            mean_loss(base, batch)

        for bank in banks[: 3 if tokens == 128 else 2]:
            ledger = SeedLedger(bank, EXPONENT, 1, base.manifest.digest, accumulators(bank))
            ordinals = trainable_ordinals(base.manifest, TensorSelection(bank.name), base.matrices)
            with torch.inference_mode():
                floor = best(forwards, repeat)
                with at_position(base, ledger, ordinals) as position:
                    seconds = best(partial(step, position, batch), repeat)
                report_step(bank.name, count, tokens, seconds, min(floor, best(forwards, repeat)))
        with torch.inference_mode():
            floor = best(forwards, repeat)
            seconds = best(partial(published_step, base, batch), repeat)
            report_step("published, in place", count, tokens, seconds, min(floor, best(forwards, repeat)))


def measure_pairs(parameters: int, repeat: int) -> None:
    """Measure the step of dense banks with displacements in memory and by rebuilds, beside two forward passes."""
    base = llama(SMOLLM2 if parameters > 1e8 else SMALL)
    count = sum(parameter.numel() for parameter in base.model.parameters())
    ordinals = trainable_ordinals(base.manifest, TensorSelection("hadamard"), base.matrices)
    several = directions("hadamard", 4096, [KEY + n for n in range(3)], 4)
    banks: Mapping[str, DirectionBank] = {
        "hadamard 4096": Hadamard(4096, KEY),
        "hadamard 1024": Hadamard(1024, KEY),
        "hadamard 4096, 3 banks of 4 groups": several,
    }
    for tokens, (label, bank) in product((32, 128), banks.items()):
        batch = collate([example(tokens)], base)
        ledger = SeedLedger(bank, EXPONENT, 1, base.manifest.digest, accumulators(bank))
        times: dict[str, list[float]] = {"forwards": [], "stored": [], "rebuilt": []}

        def forwards(batch: Batch = batch) -> None:
            mean_loss(base, batch)
            mean_loss(base, batch)

        with torch.inference_mode(), working_copy(base, ordinals) as trios:
            stored, rebuilt = DisplacedPosition(base, ledger, trios), RebuiltPosition(base, ledger, trios)
            calls: Mapping[str, Callable[[], Any]] = {
                "forwards": forwards,
                "stored": partial(step, stored, batch),
                "rebuilt": partial(step, rebuilt, batch),
            }
            for call in calls.values():
                call()
            for _ in range(max(5, repeat)):
                for way, call in calls.items():
                    began = time.process_time()
                    call()
                    times[way].append(time.process_time() - began)
        ratios = {
            "step_over_two_forwards": quotients(times["stored"], times["forwards"]),
            "rebuilt_step_over_two_forwards": quotients(times["rebuilt"], times["forwards"]),
            "times_faster": quotients(times["rebuilt"], times["stored"]),
            "times_faster_without_the_forwards": quotients(
                np.subtract(times["rebuilt"], times["forwards"]), np.subtract(times["stored"], times["forwards"])
            ),
        }
        for name, values in ratios.items():
            low, middle, high = np.quantile(values, (0, 0.5, 1)).tolist()
            report("pair", bank=label, parameters=count, tokens=tokens, ratio=name, median=middle, low=low, high=high)


def quotients(above: Sequence[float] | Array, below: Sequence[float] | Array) -> Array:
    """Return the quotients of times that were measured one after the other."""
    result: Array = np.asarray(above) / np.asarray(below)
    return result


def step(position: Position[Batch], batch: Batch) -> None:
    """Measure both sides of a seed, and move along it."""
    position.losses(batch, [(5, -AMOUNT), (5, AMOUNT)])
    position.move(5, 1)


def published_step(base: Base, batch: Batch) -> None:
    """Perturb in place by +eps, -2 eps and +eps, and update: the published step, one draw of all weights each."""
    for amount in (5e-4, -1e-3):
        nudge(base, amount)
        mean_loss(base, batch)
    nudge(base, 5e-4)
    nudge(base, 1e-7)


def nudge(base: Base, amount: float) -> None:
    """Add a multiple of one direction, drawn again by its seed, to all weights."""
    draw = torch.Generator().manual_seed(5)
    for parameter in base.model.parameters():
        parameter.data.add_(torch.normal(0.0, 1.0, parameter.shape, generator=draw), alpha=amount)


def report_step(way: str, parameters: int, tokens: int, seconds: float, floor: float) -> None:
    report(
        "step",
        way=way,
        parameters=parameters,
        tokens=tokens,
        milliseconds=1e3 * seconds,
        times_two_forward_passes=seconds / floor,
    )


def best(call: Callable[[], Any], repeat: int) -> float:
    """Return the least processor time of several calls, in seconds, after a call that compiles."""
    call()
    times = []
    for _ in range(max(7, repeat)):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


SMALL: Mapping[str, int] = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 8192,
}
SMOLLM2: Mapping[str, int] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
"""Shapes of Llamas: of 23 million weights, and those of SmolLM2-135M."""


def llama(shapes: Mapping[str, int] = SMALL) -> Base:
    """Return a Llama whose weights are drawn at random, as a base without a tokenizer."""
    config = LlamaConfig(**shapes, max_position_embeddings=512, pad_token_id=0, tie_word_embeddings=True)
    with torch_seed(KEY, torch.device("cpu")):
        model = LlamaForCausalLM(config).requires_grad_(False).eval()
    return Base(
        name="random",
        path="",
        model=model,
        tokenizer=None,
        task="causal",
        device=torch.device("cpu"),
        digest="",
        modules=find_targets(model, ["all-linear"]),
        saved=(),
        saved_modules=(),
    )


def example(tokens: int) -> Example:
    ids = generator(KEY).integers(1, 8192, tokens)
    return Example(ids, ids, characters=0, prompt="", reference="", prompt_tokens=0)


SEEDS = 8
"""Directions that the published loop is measured with; a rebuild's time is scaled to all of them."""
KEY = derive(0, "fedkseed.bank")


def rebuild_by_numpy(tensor: torch.Tensor, sums: Array, *, out: torch.Tensor, **options: Any) -> None:
    rebuild(rebuild_torch.as_array(tensor), sums, out=rebuild_torch.as_array(out), **options)


WAYS: Mapping[str, Callable[..., Any]] = {
    "numba": rebuild_torch.rebuild_compiled,
    "torch": rebuild_torch.rebuild,
    "numpy": rebuild_by_numpy,
}
SLICES: Mapping[tuple[str, bool], int] = {
    ("numba", False): 2**40,
    ("torch", False): 2**26,
    ("numpy", False): 2**24,
    ("numba", True): 2**18,
    ("torch", True): 0,  # draws every word by tensor operations: seconds for one block
    ("numpy", True): 2**14,
}
"""Parameters at which a way is measured at most, by whether the bank draws for each direction."""


def published_loop(parameters: int, seeds: int) -> float:
    """Return the seconds that a rebuild takes which draws each direction with torch, for 10^9 parameters."""
    weights = torch.zeros(parameters)
    draw = torch.Generator()

    def draw_all() -> None:
        for seed in range(SEEDS):
            draw.manual_seed(seed)
            weights.sub_(torch.normal(0.0, 1.0, weights.shape, generator=draw), alpha=1e-6)

    return per_billion(draw_all, parameters, 2) * seeds / SEEDS


def rebuild_call(
    way: Callable[..., Any], base: torch.Tensor, result: torch.Tensor, sums: Array, bank: DirectionBank
) -> Callable[[], Any]:
    return lambda: way(base, sums, bank=bank, ordinal=0, exponent=EXPONENT, out=result)


def accumulators(bank: DirectionBank) -> Array:
    """Return accumulators as after some rounds; their absolute sum is below 2^24."""
    return generator(KEY).integers(-1000, 1000, bank.size).astype(np.int32)


def per_billion(call: Callable[[], Any], parameters: int, repeat: int) -> float:
    """Return the shortest time of several calls, in seconds, scaled to 10^9 parameters."""
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times) * BILLION / parameters


def report(case: str, **numbers: Any) -> None:
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in numbers.items()}
    print(json.dumps({"case": case, **rounded}), flush=True)


PARTS: Mapping[str, Callable[[int, int], None]] = {
    "rebuild": measure_rebuilds,
    "step": measure_steps,
    "pair": measure_pairs,
}


if __name__ == "__main__":
    main()
