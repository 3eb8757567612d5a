"""What a GPU gives: many clients in one forward pass, the cost of the framework, memory of a step, bf16.

    python benchmarks/gpu.py [--stories FOLDER] [--repeat 3]

Over stories260k, where its folder is given, and a Llama of 110 million random weights. Compared in turn, in one run:
clients one after the other and together; a client's work in fedtune and in a bare peft loop; the loss from logits and
from hidden states; forward passes in float32 and under bf16 autocast. Prints one JSON line per case; says so and ends
where there is no CUDA device. `--device cpu` runs the same on small numbers, to see that it runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedtune.client.batched import Batched, Resident
from fedtune.client.perform import perform
from fedtune.data.encode import Example
from fedtune.lora.adapter import Factors, draw_a
from fedtune.messages import Assignment, ClientUpdate, Plan, Training, TrainLora
from fedtune.model.base import Base, base_from_object, load, load_tokenizer
from fedtune.model.batches import collate
from fedtune.model.lora import with_adapters
from fedtune.model.loss import cross_entropies, logits_of, summed_loss
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.model.torch_seed import torch_seed

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
RANK = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stories", type=Path, help="folder of the model stories260k-hf")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(json.dumps({"case": "gpu", "skipped": "there is no CUDA device"}))
        return
    small = args.device == "cpu"
    report("machine", device=torch.cuda.get_device_name() if not small else "cpu", torch=torch.__version__)
    if args.stories:
        stories = stories_base(args.stories, args.device)
        for autocast in ("off", "bf16"):
            together(stories, "stories260k", autocast, clients=4 if small else 16, tokens=128, repeat=args.repeat)
    llama = random_llama(args.device, small=small)
    tokens = 32 if small else 256
    for autocast in ("off", "bf16"):
        together(llama, "llama-110m", autocast, clients=2 if small else 8, tokens=tokens, repeat=args.repeat)
    overhead(llama, steps=2 if small else 20, tokens=tokens, repeat=args.repeat)
    if not small:
        loss_memory(llama, tokens=512)


def report(case: str, **values: Any) -> None:
    print(json.dumps({"case": case, **values}), flush=True)


def stories_base(folder: Path, device: str) -> Base:
    settings = ModelSettings(base=str(folder), dtype="float32", device=device)
    adapter = AdapterSettings(rank=RANK, targets=TARGETS)
    return load(settings, adapter, tokenizer=load_tokenizer(settings, Path()), root=Path(), seed=0)


def random_llama(device: str, *, small: bool) -> Base:
    """Return a Llama of random weights: 110 million, or few."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")),
        unk_token="<unk>",
        pad_token="<unk>",
    )
    width = 64 if small else 768
    config = LlamaConfig(
        vocab_size=512 if small else 32_000,
        hidden_size=width,
        intermediate_size=64 if small else 2048,
        num_hidden_layers=2 if small else 12,
        num_attention_heads=width // 64,
        max_position_embeddings=1024,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    with torch_seed(0, torch.device("cpu")):
        model = LlamaForCausalLM(config)
    settings = ModelSettings(base="llama-110m", dtype="float32", device=device)
    return base_from_object(settings, AdapterSettings(rank=RANK, targets=TARGETS), (model, tokenizer))


def rows_of(base: Base, count: int, tokens: int, seed: int = 0) -> list[Example]:
    """Return rows of random tokens, between a half and all of `tokens` long."""
    rng, vocabulary = np.random.default_rng(seed), base.model.config.vocab_size
    ids = [rng.integers(3, vocabulary, rng.integers(tokens // 2, tokens + 1)).astype(np.int64) for _ in range(count)]
    return [Example(row, row, characters=len(row), prompt="", reference="", prompt_tokens=0) for row in ids]


def order(base: Base, name: str, training: Training) -> Assignment:
    task = TrainLora(a_key=len(name), wire_dtype="fp32")
    return Assignment("fedit", 1, sum(name.encode()), Plan(name, RANK, 2.0, training), task, base.digest)


def seconds_of(work: Callable[[], Any]) -> float:
    """Return how long some work takes, until the device has done all of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def alternate(works: Mapping[str, Callable[[], Any]], repeat: int) -> Mapping[str, list[float]]:
    """Return the seconds of several works, taken in turn after one warm-up of each."""
    for work in works.values():
        work()
    taken: Mapping[str, list[float]] = {name: [] for name in works}
    for _ in range(repeat):
        for name, work in works.items():
            taken[name].append(seconds_of(work))
    return taken


def together(base: Base, name: str, autocast: Any, *, clients: int, tokens: int, repeat: int) -> None:
    """Measure a round of clients one after the other, and in one forward pass."""
    training = Training(batch=4, learning_rate=1e-3, steps=8, autocast=autocast)
    fleet = {f"client-{at:02}": Resident(rows_of(base, 32, tokens, at), (), 1) for at in range(clients)}
    orders = [order(base, client, training) for client in fleet]

    def alone() -> Mapping[str, ClientUpdate]:
        return {o.plan.client: perform(base, fleet[o.plan.client].examples, o, threads=1) for o in orders}

    batched = Batched(base, fleet)
    ours, theirs = batched(orders), alone()
    assert ours.keys() == theirs.keys()
    works: dict[str, Callable[[], Any]] = {"alone": alone, "together": partial(batched, orders)}
    taken = alternate(works, repeat)
    peaks = {kind: peak(work, base.device) for kind, work in works.items()}
    report(
        "a round of clients one after the other, and in one forward pass",
        base=name,
        autocast=autocast,
        clients=clients,
        **{f"{kind}_s": [round(value, 3) for value in values] for kind, values in taken.items()},
        ratio=[round(a / b, 2) for a, b in zip(taken["alone"], taken["together"], strict=True)],
        **{f"{kind}_peak_mib": value for kind, value in peaks.items()},
        largest_difference=max(
            float(np.abs(ours[client].lora.tensors[key] - theirs[client].lora.tensors[key]).max())
            for client in ours
            for key in ours[client].lora.tensors
        ),
        largest_change=max(
            float(np.abs(array).max())
            for u in theirs.values()
            for key, array in u.lora.tensors.items()
            if key[-1] == "b"
        ),
    )


def peak(work: Callable[[], Any], device: torch.device) -> int | None:
    """Return the highest memory of a work in MiB, of what it allocates beyond what is there before."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - before) // 2**20


def overhead(base: Base, *, steps: int, tokens: int, repeat: int) -> None:
    """Measure a client's work in fedtune, without scores, and the same steps in a bare peft loop."""
    rows = rows_of(base, 8 * steps, tokens)
    for autocast in ("off", "bf16"):
        training = Training(batch=8, learning_rate=1e-3, steps=steps, autocast=autocast)
        work = partial(perform, base, rows, order(base, "ann", training), threads=1)
        bare = bare_loop(base, rows, training)
        taken = alternate({"bare": bare, "fedtune": work}, repeat)
        remove_peft(base)
        report(
            "a client's work against a bare peft loop",
            base="llama-110m",
            autocast=autocast,
            steps=steps,
            **{f"{kind}_s": [round(value, 3) for value in values] for kind, values in taken.items()},
            ratio=round(median(a / b for a, b in zip(taken["fedtune"], taken["bare"], strict=True)), 3),
        )


def bare_loop(base: Base, rows: Sequence[Example], training: Training) -> Callable[[], None]:
    """Return what one would write by hand: peft, AdamW, the same number of rows; on a copy of the model."""
    copy = LlamaForCausalLM(base.model.config)
    copy.load_state_dict(base.model.state_dict())
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model: Any = get_peft_model(copy.to(base.device), config)
    trained = [p for p in model.parameters() if p.requires_grad]

    def loop() -> None:
        optimizer = torch.optim.AdamW(trained, lr=training.rate)
        model.train()
        for begin in range(0, len(rows), training.batch):
            batch = collate(rows[begin : begin + training.batch], base)
            kind = base.device.type
            with torch.autocast(kind, torch.bfloat16, enabled=training.autocast == "bf16"):
                loss = model(**batch.inputs, labels=batch.labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return loop


def remove_peft(base: Base) -> None:
    """Free the copy of the bare loop before the next measurement."""
    gc.collect()
    if base.device.type == "cuda":
        torch.cuda.empty_cache()


def loss_memory(base: Base, *, tokens: int) -> None:
    """Measure the memory of one step whose loss is taken from logits, and from hidden states."""
    local = {name: zero_factors(base, name) for name in base.modules}
    batch = collate([row for row in rows_of(base, 64, 2 * tokens) if len(row.input_ids) >= tokens][:8], base)

    def step(fused: bool, autocast: bool) -> None:
        with (
            with_adapters(base, local=local, half=autocast) as model,
            torch.autocast("cuda", torch.bfloat16, enabled=autocast),
        ):
            if fused:
                loss = summed_loss(model, batch, task="causal")
            else:
                loss = cross_entropies(logits_of(model, batch, task="causal"), batch.labels, task="causal")
            (loss / batch.count).backward()

    for autocast in (False, True):
        works = {kind: partial(step, kind == "fused", autocast) for kind in ("logits", "fused")}
        taken = alternate(works, 5)
        report(
            "one step with the loss from logits, and from hidden states",
            base="llama-110m",
            shape=list(batch.input_ids.shape),
            vocabulary=base.model.config.vocab_size,
            fused=batch.fused,
            autocast="bf16" if autocast else "off",
            **{f"{kind}_peak_mib": peak(work, base.device) for kind, work in works.items()},
            **{f"{kind}_ms": round(1000 * median(values), 1) for kind, values in taken.items()},
        )


def zero_factors(base: Base, name: str) -> Factors:
    m, n = base.modules[name]
    return Factors(a=draw_a(1, name, RANK, n), b=np.zeros((m, RANK), np.float32))


if __name__ == "__main__":
    main()
