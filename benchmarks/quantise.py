"""Codes on the wire: bytes of encoded updates, how far sums over rounds are off, and time.

    python benchmarks/quantise.py

Clients' changes are drawn: normal numbers of a common part, which every client and round repeats, and a part of their
own. `sum` is the relative error of the mean of ten clients, summed over so many rounds, for three ways of rounding: to
the nearest, at random (what fedtune does), and at random with error feedback (Karimireddy et al., ICML 2019,
arXiv 1901.09847), for which every client would keep a residual of the size of its adapter from round to round. Prints
one JSON line per case.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from fedtune.messages import ClientUpdate, LoraResult, WireDtype
from fedtune.number_formats import from_wire, to_wire
from fedtune.seeds import derive, generator
from fedtune.tensors import Tensors
from fedtune.wire.codec import encode_update

FORMATS: tuple[WireDtype, ...] = ("fp32", "bf16", "int8", "int4")
NAMES = {"q_proj": 896, "c_attn": 2304, "query_key_value": 3072, "Wqkv": 2304}
"""Layers of four model families by what they are called, with their outputs; 896, 768, 1024 and 768 inputs."""
INPUTS = {"q_proj": 896, "c_attn": 768, "query_key_value": 1024, "Wqkv": 768}
CLIENTS = 10
COMMON = 0.3
"""Size of the common part of a change beside that of a client's own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    for name in NAMES:
        print(json.dumps(payload(name)))
    for dtype in FORMATS[1:]:
        print(json.dumps(summed_error(dtype, options.rounds)))
    for dtype in FORMATS[1:]:
        print(json.dumps(speed(dtype)))


def change(key: int, outputs: int, inputs: int, *, layers: int = 12, rank: int = 16, name: str = "q_proj") -> Tensors:
    rng = generator(key)
    shapes = {"a": (rank, inputs), "b": (outputs, rank)}
    return {
        f"model.layers.{layer}.{name}.{side}": rng.standard_normal(shape, dtype=np.float32) * np.float32(1e-3)
        for layer in range(layers)
        for side, shape in shapes.items()
    }


def payload(name: str) -> dict[str, object]:
    """Return the bytes of an encoded update in every format, over those in fp32."""
    tensors = change(derive(0, "bytes"), NAMES[name], INPUTS[name], name=name)
    sizes = {
        dtype: len(encode_update(ClientUpdate("anna", 1, 10, LoraResult(to_wire(tensors, dtype, key=1)))))
        for dtype in FORMATS
    }
    return {"layer": name, "bytes": sizes} | {dtype: round(sizes[dtype] / sizes["fp32"], 4) for dtype in FORMATS[1:]}


def summed_error(dtype: str, rounds: int) -> dict[str, object]:
    """Return how far the clients' mean, summed over rounds, is off by way of rounding."""
    common = change(derive(0, "common"), 256, 256, layers=1)
    exact = {name: np.zeros(array.shape) for name, array in common.items()}
    sums = {
        way: {name: np.zeros(array.shape) for name, array in common.items()} for way in ("nearest", "random", "fed")
    }
    residual = [{name: np.zeros_like(array) for name, array in common.items()} for _ in range(CLIENTS)]
    for number in range(rounds):
        for client in range(CLIENTS):
            key = derive(0, "client", number, str(client))
            own = change(key, 256, 256, layers=1)
            moved = {name: np.float32(COMMON) * common[name] + own[name] for name in own}
            fed = {name: moved[name] + residual[client][name] for name in moved}
            sent = {
                "nearest": from_wire(to_wire(moved, dtype)),
                "random": from_wire(to_wire(moved, dtype, key=key)),
                "fed": from_wire(to_wire(fed, dtype, key=key)),
            }
            residual[client] = {name: fed[name] - sent["fed"][name].astype(np.float32) for name in fed}
            for name in moved:
                exact[name] += moved[name]
                for way in sums:
                    sums[way][name] += sent[way][name].astype(np.float64)
    size = np.sqrt(sum(np.sum(array**2) for array in exact.values()))
    errors = {
        way: np.sqrt(sum(np.sum((total[name] - exact[name]) ** 2) for name in exact)) for way, total in sums.items()
    }
    return {
        "format": dtype,
        "rounds": rounds,
        "sum": {way: float(f"{error / size:.3g}") for way, error in errors.items()},
    }


def speed(dtype: str) -> dict[str, object]:
    """Return megabytes of float32 a second of this process's time: rounding at random, encoding, widening."""
    tensors = change(derive(0, "speed"), 4096, 4096, layers=16)
    size = sum(array.nbytes for array in tensors.values()) / 1e6
    began = time.process_time()
    wire = to_wire(tensors, dtype, key=1)
    rounded = time.process_time()
    encode_update(ClientUpdate("anna", 1, 10, LoraResult(wire)))
    encoded = time.process_time()
    from_wire(wire)
    widened = time.process_time()
    times = {"round": rounded - began, "encode": encoded - rounded, "widen": widened - encoded}
    return {"format": dtype, "megabytes_per_s": {step: round(size / max(t, 1e-6)) for step, t in times.items()}}


if __name__ == "__main__":
    main()
