"""What a training step costs by arm: some blocks trained, a part of the backward pass, half of the width.

    python benchmarks/arms.py [--repeats 9] [--threads 1]

A Llama of 6 blocks of width 512 and a BERT of MiniLM's shape, both drawn at random, LoRA of rank 8 on queries and
values, and on all linear layers. Arms take turns, so that a busy machine hurts all alike. Seconds are those of the
processor; ratios are to the dense step of the same turn: median, and the quartiles in brackets. Operations are those
that torch counts in matrix products and attention; stored bytes are what a forward pass keeps for the backward pass,
each memory once, without the model's own. Prints one JSON line per model, targets and arm.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedtune.model.lora import with_layers
from fedtune.model.lora_layer import Trainable
from fedtune.model.selective_backward import Windows, with_selective_backward
from fedtune.model.surgery import layout_of, with_structure
from fedtune.model.targets import linear_shape
from fedtune.pruning.ranking import PruningSettings, rank_units, structure_at
from fedtune.seeds import generator

RANK = 8


@dataclass(frozen=True)
class Arm:
    """What a step trains."""

    top: float = 1.0
    """Share of the blocks, from the top."""
    back: float = 0.0
    """Share of heads and channels that the backward pass leaves out."""
    ratio: float = 0.0
    """Share of the blocks' weights that is pruned."""


ARMS = {
    "dense": Arm(),
    "width .5": Arm(ratio=0.5),
    "backward .5": Arm(back=0.5),
    "backward .75": Arm(back=0.75),
    "top half": Arm(top=0.5),
    "top half, backward .5": Arm(top=0.5, back=0.5),
}


def llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
    )


def bert() -> Any:
    config = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    return BertForSequenceClassification(config)


MODELS = {"Llama, 6 x 512": (llama, (4, 128)), "BERT of MiniLM's shape": (bert, (16, 48))}
"""By name: the model, and the (rows, tokens) of a batch."""


@contextmanager
def arm_of(model: Any, arm: Arm, targets: tuple[str, ...]) -> Iterator[None]:
    """Attach an arm's adapters inside the block, in the structure that it trains."""
    layout = layout_of(model)
    settings, rng = PruningSettings(), generator(1)
    heads, channels = (sum(getattr(block, of) for block in layout.blocks) for of in ("heads", "channels"))
    ranking = rank_units({"heads": rng.random(heads), "channels": rng.random(channels)}, layout, settings)
    structure = structure_at(ranking, layout, settings, arm.ratio)
    lowest = round((1 - arm.top) * len(layout.blocks))
    with with_structure(model, structure, layout) if arm.ratio else nullcontext():
        trainable = {}
        for name, (block, _, _) in layout.sides.items():
            if block >= lowest and (not targets or name.endswith(targets)):
                shape = linear_shape(model.get_submodule(name))
                assert shape is not None
                a, b = torch.full((RANK, shape[1]), 0.01), torch.full((shape[0], RANK), 0.01)
                trainable[name] = Trainable(nn.Parameter(a), nn.Parameter(b), 2.0)
        selective = with_selective_backward(model, Windows(arm.back, 1)) if arm.back else nullcontext()
        with with_layers(model, trainable, {}), selective:
            yield


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    options = {"use_cache": False} if hasattr(model, "lm_head") else {}
    labels = ids if hasattr(model, "lm_head") else torch.zeros(len(ids), dtype=torch.long)
    loss: torch.Tensor = model(input_ids=ids, labels=labels, **options).loss
    return loss


def seconds_of(model: Any, ids: torch.Tensor) -> float:
    began = time.process_time()
    loss_of(model, ids).backward()
    return time.process_time() - began


def operations(model: Any, ids: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        loss_of(model, ids).backward()
    return int(counter.get_total_flops())


def stored_bytes(model: Any, ids: torch.Tensor) -> int:
    """Return what a forward pass keeps for the backward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    stored: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            stored[memory.data_ptr()] = memory  # held, so that no other memory gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_of(model, ids).backward()
    return sum(memory.nbytes() for memory in stored.values())


def measure(name: str, targets: tuple[str, ...], repeats: int) -> None:
    """Print what each arm costs on one model."""
    build, size = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval().requires_grad_(False)
    ids = torch.from_numpy(generator(2).integers(5, 2000, size))
    counts, seconds = {}, dict[str, list[float]]()
    for repeat in range(repeats + 1):
        for title, arm in ARMS.items():
            with arm_of(model, arm, targets):
                taken = seconds_of(model, ids)
                if repeat == 0:  # the first call allocates
                    counts[title] = operations(model, ids), stored_bytes(model, ids)
                else:
                    seconds.setdefault(title, []).append(taken)
    for title in ARMS:
        ratios = [mine / dense for mine, dense in zip(seconds[title], seconds["dense"], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        line = {
            "model": name,
            "targets": " ".join(targets) or "all",
            "arm": title,
            "ms": round(1e3 * median(seconds[title]), 1),
            "time": round(median(ratios), 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "operations": round(counts[title][0] / counts["dense"][0], 3),
            "stored": round(counts[title][1] / counts["dense"][1], 3),
            "stored MB": round(counts[title][1] / 1e6, 1),
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, some in (("Llama, 6 x 512", ("q_proj", "v_proj")), ("BERT of MiniLM's shape", ("query", "value"))):
        for targets in (some, ()):
            measure(name, targets, args.repeats)


if __name__ == "__main__":
    main()
