"""FederatedScope's run, model, data, training and rounds as keys of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isclose
from pathlib import PurePosixPath

from fedtune.config.fs_given import Given, Remark, Setting, wrong
from fedtune.data.presets import PRESETS


def run_part(given: Given) -> Iterator[Setting | Remark]:
    tag = given.text("expname_tag", "")
    if name := "-".join(filter(None, [given.text("expname", ""), tag])):
        plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).strip(".-")[:100]
        yield Setting("name", plain or "run", ("expname", "expname_tag"))
    yield Setting("seed", given.whole("seed", 0), ("seed",))
    if given.text("backend", "torch") != "torch":
        raise wrong("backend", "torch", given.values["backend"])
    number = given.whole("device", -1)
    device = "cpu" if not given.flag("use_gpu", False) else "auto" if number < 0 else f"cuda:{number}"
    yield Setting("model.device", device, ("use_gpu", "device"))
    if (processes := given.whole("federate.process_num", 1)) > 1:
        yield Setting("engine.name", "processes", ("federate.process_num",))
        yield Setting("engine.workers", processes, ("federate.process_num",))


HUBS = ("huggingface_llm", "modelscope_llm")


def model_part(given: Given) -> Iterator[Setting | Remark]:
    text = given.text("model.type", "")
    name, _, hub = text.partition("@")
    if hub not in HUBS or not name:
        hint = "other kinds of models have no counterpart"
        raise wrong("model.type", "a language model, such as NAME@huggingface_llm", text or "nothing", hint)
    if hub == "modelscope_llm":
        yield Remark(
            "model.type", "a name on ModelScope's hub: name a local folder, or the same model on Hugging Face's"
        )
    if given.flag("llm.offsite_tuning.use", False):
        yield from emulator_part(given, name)
    else:
        yield Setting("model.base", name, ("model.type",))
    half = given.flag("train.is_enable_half", False)
    yield Setting("model.dtype", "bfloat16" if half else "float32", ("train.is_enable_half",))
    yield from adapter_part(given, name)


EMULATOR = "emulator"
"""Folder of an emulator that a recipe names."""


def emulator_part(given: Given, base: str) -> Iterator[Setting | Remark]:
    """Yield the emulator as a base, whose first and last blocks are tuned, and the command that writes it."""
    table = "llm.offsite_tuning"
    if (strategy := given.text(f"{table}.strategy", "drop_layer")) != "drop_layer":
        raise wrong(f"{table}.strategy", "drop_layer", strategy, "its other strategies are not written there either")
    front, end = given.whole(f"{table}.emu_l", 1), given.whole(f"{table}.emu_r", 10)
    share = given.number(f"{table}.kwargs.drop_ratio", 0.2)
    if not 0 < front < end or not 0 <= share < 1:
        raise wrong(f"{table}.emu_r", "more than emu_l, which is at least 1", end)
    middle = round((end - front) * (1 - share))
    first, last = front - 1, 2 * front + middle - 1
    layers = f"0-{first}, {front + middle}-{last}" if front > 1 else f"0, {last}"
    of = tuple(f"{table}.{key}" for key in ("use", "emu_l", "emu_r", "kwargs.drop_ratio"))
    yield Setting("model.base", EMULATOR, ("model.type", f"{table}.use"))
    yield Setting("adapter.layers", layers, of)
    command = (
        f"fedtune export {base} --form emulator --front {front} --back {front} --drop {share:g} --select floor "
        f"--out {EMULATOR}"
    )
    yield Remark(f"{table}.use", f"write the emulator first: {command}")
    yield Remark(
        f"{table}.emu_r", f"read as {front} blocks at the end too: set --back and adapter.layers if it has others"
    )
    if not given.flag("llm.adapter.use", False):
        yield Remark(
            "llm.offsite_tuning.use", "the ends get LoRA adapters, where FederatedScope tunes all their weights"
        )


FAMILIES: Mapping[str, Sequence[str]] = {
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "gpt-neox": ("query_key_value",),
    "pythia": ("query_key_value",),
    "bloom": ("query_key_value",),
    "falcon": ("query_key_value",),
    "chatglm": ("query_key_value",),
}
"""Layers that peft takes by itself, by what is in a model's name; of all others the queries and values."""
METHODS: Mapping[str, str] = {"lora": "lora", "prefix": "prefix", "p-tuning": "p-tuning", "prompt": "prompt"}


def adapter_part(given: Given, base: str) -> Iterator[Setting | Remark]:
    args, offsite = "llm.adapter.args", given.flag("llm.offsite_tuning.use", False)
    if not given.flag("llm.adapter.use", False) and not offsite:
        yield Remark("llm.adapter.use", "LoRA is trained here, where FederatedScope trains all weights")
    package = given.text(f"{args}.adapter_package", "peft")
    if package != "peft":
        raise wrong(f"{args}.adapter_package", "peft", package, "AdapterHub's variants are left out")
    method = given.text(f"{args}.adapter_method", "lora")
    if method not in METHODS:
        raise wrong(f"{args}.adapter_method", "lora, prefix, p-tuning or prompt", method)
    if method != "lora":
        yield Setting("adapter.kind", METHODS[method], (f"{args}.adapter_method",))
        yield Setting("adapter.tokens", given.whole(f"{args}.num_virtual_tokens", 20), (f"{args}.num_virtual_tokens",))
        if method == "p-tuning":
            yield Setting("adapter.send", "encoder", (f"{args}.adapter_method",))
            if width := given.whole(f"{args}.encoder_hidden_size", 0):
                yield Setting("adapter.hidden", width, (f"{args}.encoder_hidden_size",))
        if method == "prompt" and (text := given.text(f"{args}.prompt_tuning_init_text", "")):
            yield Setting("adapter.init_text", text, (f"{args}.prompt_tuning_init_text",))
        return
    yield Setting("adapter.rank", given.whole(f"{args}.r", 8), (f"{args}.r",))
    yield Setting("adapter.alpha", given.number(f"{args}.lora_alpha", 8), (f"{args}.lora_alpha",))
    usual = next((own for part, own in FAMILIES.items() if part in base.lower()), ("q_proj", "v_proj"))
    targets = given.texts(f"{args}.target_modules") or usual
    yield Setting("adapter.targets", list(targets), (f"{args}.target_modules",))
    if saved := given.texts(f"{args}.modules_to_save"):
        yield Setting("adapter.modules_to_save", list(saved), (f"{args}.modules_to_save",))
    if given.flag(f"{args}.use_rslora", False):
        yield Setting("adapter.rslora", True, (f"{args}.use_rslora",))
    if dropout := given.number(f"{args}.lora_dropout", 0.0):
        yield Setting("client.dropout", dropout, (f"{args}.lora_dropout",))


DATA_SETS: Mapping[str, str] = {
    "alpaca": "alpaca",
    "alpaca_cleaned": "alpaca-cleaned",
    "dolly-15k": "dolly",
    "gsm8k": "gsm8k",
    "rosetta_alpaca": "rosetta",
    "code_search_net": "code-search-net",
}
"""Names in `data.type`, and here."""


def data_part(given: Given) -> Iterator[Setting | Remark]:
    text = given.text("data.type", "")
    name, _, kind = text.partition("@")
    by = "category"
    if kind != "llm" or not (name.lower() in DATA_SETS or name.endswith((".json", ".jsonl"))):
        raise wrong("data.type", f"NAME@llm, with {', '.join(DATA_SETS)} or a file .json or .jsonl", text or "nothing")
    if name.lower() in DATA_SETS:
        preset = DATA_SETS[name.lower()]
        by = {own: known.by for own, known in PRESETS.items()}[preset] or "category"  # type: ignore[index]
        yield Setting("data.preset", preset, ("data.type",))
        if preset == "gsm8k":
            yield Remark("data.type", "the answers keep '####', where FederatedScope writes 'The answer is'")
        if preset == "rosetta":
            yield Remark("data.type", "all languages are read, where FederatedScope drops X86-64 Assembly with meta")
    else:
        path = PurePosixPath(given.text("data.root", "data")) / name
        yield Setting("data.source", str(path), ("data.type", "data.root"))
        yield Setting("data.template", "alpaca", ("data.type",))
    yield Setting("data.max_tokens", given.whole("llm.tok_len", 128), ("llm.tok_len",))
    shares = given.values.get("data.splits", [0.8, 0.1, 0.1])
    if not isinstance(shares, list) or len(shares) != 3 or not all(isinstance(share, int | float) for share in shares):
        raise wrong("data.splits", "the shares of training, validation and test", shares)
    if not isclose(sum(shares), 1, abs_tol=1e-6) or not 0 < shares[0] <= 1:
        raise wrong("data.splits", "three shares whose sum is 1, the first above 0", shares)
    yield Setting("data.held_out", round(1 - shares[0], 9), ("data.splits",))
    yield from split_part(given, by)


def split_part(given: Given, by: str) -> Iterator[Setting | Remark]:
    clients, splitter = given.whole("federate.client_num", 0), given.text("data.splitter", "")
    if given.text("federate.method", "FedAvg").lower() == "global":
        yield Setting("data.split.kind", "iid", ("federate.method",))
        yield Setting("data.split.clients", 1, ("federate.method",))
        return
    kinds = {"iid": "iid", "lda": "dirichlet", "meta": "meta"}
    if splitter not in kinds:
        raise wrong("data.splitter", "iid, lda or meta", splitter or "nothing")
    if clients < 1:
        raise wrong("federate.client_num", "at least 1", clients)
    yield Setting("data.split.kind", kinds[splitter], ("data.splitter",))
    yield Setting("data.split.clients", clients, ("federate.client_num",))
    if splitter != "iid":
        yield Setting("data.split.by", by, ("data.splitter",))
    if splitter == "lda":
        alpha = given.number("data.splitter_args.alpha", 0.5)
        yield Setting("data.split.alpha", alpha, ("data.splitter_args.alpha",))
    if (least := given.whole("data.splitter_args.min_size", 1)) > 1:
        yield Setting("data.split.min_examples", least, ("data.splitter_args.min_size",))


OPTIMIZERS: Mapping[str, str] = {"sgd": "sgd", "adam": "adamw", "adamw": "adamw"}


def client_part(given: Given) -> Iterator[Setting | Remark]:
    batch = given.whole("dataloader.batch_size", given.whole("data.batch_size", 64))
    yield Setting("client.batch", batch, ("dataloader.batch_size", "data.batch_size"))
    length, unit = given.whole("train.local_update_steps", 1), given.text("train.batch_or_epoch", "batch")
    accumulation = given.whole("grad.grad_accum_count", 1)
    if unit not in ("batch", "epoch"):
        raise wrong("train.batch_or_epoch", "batch or epoch", unit)
    of = ("train.local_update_steps", "train.batch_or_epoch")
    if unit == "epoch":
        yield Setting("client.epochs", float(length), of)
    else:
        yield Setting("client.steps", max(1, length // max(1, accumulation)), of)
        if length % max(1, accumulation):
            yield Remark("train.local_update_steps", f"{length} batches are no whole number of {accumulation} each")
    if accumulation > 1:
        yield Setting("client.accumulation", accumulation, ("grad.grad_accum_count",))
    name = given.text("train.optimizer.type", "SGD")
    if name.lower() not in OPTIMIZERS:
        raise wrong("train.optimizer.type", "SGD, Adam or AdamW", name)
    optimizer, decay = OPTIMIZERS[name.lower()], given.number("train.optimizer.weight_decay", 0.0)
    yield Setting("client.optimizer", optimizer, ("train.optimizer.type",))
    yield Setting("client.learning_rate", given.number("train.optimizer.lr", 0.1), ("train.optimizer.lr",))
    if decay:
        yield Setting("client.weight_decay", decay, ("train.optimizer.weight_decay",))
        if name.lower() == "adam":
            yield Remark("train.optimizer.weight_decay", "decoupled from the gradient, as AdamW has it")
    if optimizer == "sgd" and (momentum := given.number("train.optimizer.momentum", 0.0)):
        yield Setting("client.momentum", momentum, ("train.optimizer.momentum",))
    clip = given.number("grad.grad_clip", -1.0)
    yield Setting("client.clip_norm", clip if clip > 0 else "none", ("grad.grad_clip",))
    if given.flag("fedprox.use", False) and (mu := given.number("fedprox.mu", 0.0)):
        yield Setting("client.proximal", mu, ("fedprox.use", "fedprox.mu"))


def rounds_part(given: Given) -> Iterator[Setting | Remark]:
    yield Setting("rounds.count", given.whole("federate.total_round_num", 50), ("federate.total_round_num",))
    every = max(0, given.whole("eval.freq", 1))
    yield Setting("evaluate.every", every, ("eval.freq",))
    number, of = cohort(given)
    if of:
        yield Setting("rounds.cohort", number, (of,))
    if (patience := given.whole("early_stop.patience", 5)) > 0 and every:
        yield Setting("rounds.patience", patience, ("early_stop.patience",))
    key = given.text("eval.best_res_update_round_wise_key", "val_loss")
    if "eval.best_res_update_round_wise_key" in given.values and every and key.endswith("_loss"):
        yield Setting("rounds.keep", "best", ("eval.best_res_update_round_wise_key",))
        yield Setting("rounds.metric", "loss", ("eval.best_res_update_round_wise_key",))


def cohort(given: Given) -> tuple[int, str]:
    """Return how many clients a round has, and the key that says so; of all clients that key is empty."""
    clients = given.whole("federate.client_num", 0)
    if given.text("federate.method", "FedAvg").lower() == "global":
        return 1, ""
    share, number = given.number("federate.sample_client_rate", -1.0), given.whole("federate.sample_client_num", -1)
    if 0 < share <= 1:
        return max(1, int(share * clients)), "federate.sample_client_rate"
    return (number, "federate.sample_client_num") if 0 < number < clients else (clients, "")
