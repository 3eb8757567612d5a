"""What pruning saves in real time and memory: inference and a training step of pruned models beside the whole one.

    python benchmarks/pruned.py [--device cpu|cuda] [--base FOLDER_OF_MINILM] [--repeats 5]

A BERT encoder (MiniLM, where its folder is given) and a Llama of about 40 million parameters made here, at 0, 25, 50
and 75 % of block sparsity. Times are medians over repeats that take turns, so that a busy machine hurts all alike;
ratios are to the whole model of the same run. Prefill and decoding are apart. Peak memory of a training step is that of
a process of its own (CPU: of the process above its imports; CUDA: of the allocator): once with the model loaded at its
pruned widths, and once, as in a federated client, with the smaller copies beside the whole model. Prints one JSON line
per case.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedtune.model.checkpoint import load_pruned_base
from fedtune.model.settings import ModelSettings
from fedtune.model.surgery import layout_of, with_structure
from fedtune.pruning.ranking import PruningSettings, rank_units, structure_at
from fedtune.pruning.structure import ModelStructure, sparsity
from fedtune.seeds import generator

RATIOS = (0.0, 0.25, 0.5, 0.75)
SETTINGS = PruningSettings()


def llama() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=8192,
                hidden_size=512,
                intermediate_size=1408,
                num_hidden_layers=11,
                num_attention_heads=8,
                num_key_value_heads=4,
                max_position_embeddings=1024,
            )
        )


def bert() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12, num_labels=77
        )
        return BertForSequenceClassification(config)


def random_structure(model: Any, ratio: float) -> ModelStructure:
    """Return the structure of a ratio by random scores: which heads and channels stay changes no time."""
    layout, rng = layout_of(model), generator(1)
    sizes = sum(block.heads for block in layout.blocks), sum(block.channels for block in layout.blocks)
    importance = {"heads": rng.random(sizes[0]), "channels": rng.random(sizes[1])}
    return structure_at(rank_units(importance, layout, SETTINGS), layout, SETTINGS, ratio)


def tokens(model: Any, batch: int, length: int, device: torch.device) -> torch.Tensor:
    ids = generator(2).integers(5, model.config.vocab_size, (batch, length))
    return torch.from_numpy(ids).to(device)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def training_step(model: Any, ids: torch.Tensor, targets: list[str]) -> Callable[[], None]:
    wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)
    labels = ids if isinstance(model, LlamaForCausalLM) else torch.zeros(len(ids), dtype=torch.long, device=ids.device)

    def step() -> None:
        wrapped(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def forward(model: Any, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        model(input_ids=ids)


def decode(model: Any, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        model.generate(input_ids=ids[:1, :8], max_new_tokens=32, do_sample=False, pad_token_id=0)


def times(name: str, model: Any, targets: list[str], device: torch.device, repeats: int) -> None:
    """Print the times of one model at every ratio; each is cut out of the same model while it is measured."""
    model = model.eval().to(device).requires_grad_(False)
    layout, causal = layout_of(model), isinstance(model, LlamaForCausalLM)
    batch, length = (8, 128) if causal else (32, 64)
    ids = tokens(model, batch, length, device)
    seconds: dict[str, dict[float, list[float]]] = {}
    for repeat in range(repeats + 1):
        for ratio in RATIOS:
            with with_structure(model, random_structure(model, ratio), layout):
                work = {"prefill" if causal else "inference": partial(forward, model, ids)}
                if causal:
                    work["decode 32 tokens, batch 1"] = partial(decode, model, ids)
                for title, call in work.items():
                    call() if repeat == 0 else None  # the first call allocates and compiles
                    seconds.setdefault(title, {}).setdefault(ratio, []).append(seconds_of(call, device))
                step = training_step(model, ids, targets)
                step() if repeat == 0 else None
                seconds.setdefault("training step", {}).setdefault(ratio, []).append(seconds_of(step, device))
                model = remove_lora(model)
    for title, rows in seconds.items():
        middle = {ratio: median(values[1:]) for ratio, values in rows.items()}
        print(
            json.dumps(
                {
                    "model": name,
                    "what": title,
                    "ms": {f"{r:g}": round(1e3 * t, 2) for r, t in middle.items()},
                    "of the whole": {f"{r:g}": round(t / middle[0.0], 3) for r, t in middle.items()},
                }
            ),
            flush=True,
        )
    blocks = {f"{r:g}": round(1 - sparsity(random_structure(model, r), layout), 3) for r in RATIOS}
    print(json.dumps({"model": name, "what": "parameters of the blocks, of the whole", "of the whole": blocks}))


def remove_lora(model: Any) -> Any:
    """Return the model without the layers of peft, whose base layers it keeps."""
    for module in list(model.modules()):
        for child, layer in list(module.named_children()):
            if hasattr(layer, "base_layer"):
                setattr(module, child, layer.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model.requires_grad_(False)


def peaks(name: str, model: Any, targets: list[str], device: torch.device) -> None:
    """Print the peak memory of a training step at every ratio, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for loaded, title in (("pruned", "the pruned model alone"), ("whole", "the pruned model beside the whole one")):
            peak = {}
            for ratio in RATIOS:
                arguments = [folder, str(ratio), str(device), ",".join(targets), loaded]
                command = [sys.executable, __file__, "--measure", *arguments]
                peak[f"{ratio:g}"] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            share = {ratio: round(value / peak["0"], 3) for ratio, value in peak.items()}
            megabytes = {ratio: round(value / 1e6, 1) for ratio, value in peak.items()}
            what = f"peak of a training step, MB: {title}"
            print(json.dumps({"model": name, "what": what, "MB": megabytes, "of the whole": share}), flush=True)


def measure(folder: str, ratio: float, device: torch.device, targets: list[str], loaded: str) -> None:
    """Load a model, pruned or whole, take a few steps at its pruned widths, and print the peak memory in bytes."""
    before = resident_bytes()
    data = json.loads((Path(folder) / "config.json").read_text())
    causal = data["model_type"] == "llama"
    settings = ModelSettings(folder, task="causal" if causal else "classification", device=str(device))
    whole = LlamaForCausalLM if causal else BertForSequenceClassification
    with torch.device("meta"):
        skeleton = whole(whole.config_class.from_pretrained(folder))
    structure = random_structure(skeleton, ratio)
    with ExitStack() as stack:
        if loaded == "pruned":
            labels = [str(i) for i in range(data.get("num_labels", len(data.get("id2label", {"0": 0}))))]
            model = load_pruned_base(settings, structure, root=Path(), seed=0, labels=labels).model
        else:
            model = whole.from_pretrained(folder).eval().requires_grad_(False).to(device)
            stack.enter_context(with_structure(model, structure, layout_of(model)))
        step = training_step(model, tokens(model, 8 if causal else 32, 128 if causal else 64, device), targets)
        for _ in range(3):
            step()
        print(torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_bytes() - before)


def resident_bytes() -> int:
    """Return the peak memory of this program so far; getrusage would count that of its parent before it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        folder, ratio, where, names, loaded = sys.argv[2:]
        measure(folder, float(ratio), torch.device(where), names.split(","), loaded)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--base", help="folder of MiniLM; a model of its shape, drawn at random, without it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    encoder = BertForSequenceClassification.from_pretrained(args.base, num_labels=77) if args.base else bert()
    for name, model, targets in (
        ("MiniLM" if args.base else "BERT of MiniLM's shape", encoder, ["query", "key", "value", "dense"]),
        ("Llama, 40 M", llama(), ["q_proj", "v_proj", "o_proj", "down_proj"]),
    ):
        count = sum(parameter.numel() for parameter in model.parameters())
        print(json.dumps({"model": name, "parameters": count, "device": str(device), "threads": args.threads}))
        peaks(name, model, targets, device)
        times(name, model, targets, device, args.repeats)


if __name__ == "__main__":
    main()
