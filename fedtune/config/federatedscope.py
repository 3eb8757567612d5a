"""From a configuration of FederatedScope-LLM to a recipe: `fedtune import-fs`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import PurePosixPath
from typing import Any, TypeAlias

from fedtune.config.error_text import display, nearest
from fedtune.config.fs_keys import ARGUMENTS, GROUPS, KEYS, SWITCHES
from fedtune.config.render import entries, toml
from fedtune.data.presets import PRESETS
from fedtune.errors import ConfigError, Fault
from fedtune.methods.robust import least_clients
from fedtune.methods.settings import RobustRule


@dataclass(frozen=True)
class Setting:
    """One key of a recipe, and the keys of FederatedScope that it comes from, given or by default."""

    path: str
    value: Any
    of: tuple[str, ...]


@dataclass(frozen=True)
class Remark:
    """What a user should know of one key beyond the table."""

    key: str
    text: str


@dataclass(frozen=True)
class Entry:
    """What became of one key of the file."""

    key: str
    value: Any
    ours: Sequence[str]
    """The recipe's lines that it has made, such as `client.steps = 30`."""
    note: str
    known: bool = True
    """Whether FederatedScope has such a key."""


@dataclass(frozen=True)
class Converted:
    """A recipe's tables, and what became of every key."""

    tables: Mapping[str, Any]
    entries: Sequence[Entry]
    """One for each key of the file, in its order."""
    defaults: Sequence[str]
    """Lines of the recipe that FederatedScope's own defaults have made."""


Values: TypeAlias = Mapping[str, Any]
Part: TypeAlias = Callable[["Given"], Iterator[Setting | Remark]]


@dataclass(frozen=True)
class Given:
    """The values of a file, each checked as it is read; absent ones have FederatedScope's defaults."""

    values: Values

    def number(self, key: str, default: float) -> float:
        """Return a number; YAML 1.1 reads 5e-3 as a text."""
        value = self.values.get(key, default)
        try:
            return float("x") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            raise wrong(key, "a number", value) from None

    def whole(self, key: str, default: int) -> int:
        value = self.number(key, default)
        if not value.is_integer():
            raise wrong(key, "a whole number", self.values[key])
        return int(value)

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise wrong(key, "a text", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise wrong(key, "true or false", value)
        return value

    def texts(self, key: str) -> Sequence[str]:
        value = self.values.get(key, ())
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple) or not all(isinstance(each, str) for each in values):
            raise wrong(key, "a list of texts", value)
        return list(values)


def wrong(key: str, expected: str, value: object, hint: str = "") -> ConfigError:
    return ConfigError(Fault(key, expected, display(value), hint))


def convert(values: Values, *, base: str | None = None, data: str | None = None) -> Converted:
    """Return the recipe that a configuration is, and what became of each of its keys.

    Args:
        values: by dotted key; see `read_yaml`.
        base: in place of the model that it names.
        data: a file, in place of the data that it names.

    Raises:
        ConfigError: naming the key of a value that is none of its type, or whose meaning is not to be had.
    """
    for key in ARGUMENTS:
        if values.get(key) not in (None, [], {}):
            raise wrong(key, "a list of one table of arguments", values[key])
    given = Given(values)
    items = [item for part in PARTS for item in part(given)]
    settings = [item for item in items if isinstance(item, Setting)]
    if base is not None:
        settings = [Setting(s.path, base, s.of) if s.path == "model.base" else s for s in settings]
    if data is not None:
        others = [setting for setting in settings if setting.path != "data.source"]
        settings = [*others, Setting("data.source", data, ("data.type", "data.root"))]
    remarks = [item for item in items if isinstance(item, Remark)]
    entries = [entry_of(key, value, values, settings, remarks) for key, value in values.items()]
    defaults = [line(each) for each in settings if not any(key in values for key in each.of)]
    return Converted(tables_of(settings), entries, defaults)


def entry_of(key: str, value: Any, values: Values, settings: Sequence[Setting], remarks: Sequence[Remark]) -> Entry:
    """Return what became of one key."""
    own = [remark.text for remark in remarks if remark.key == key]
    if lines := [line(setting) for setting in settings if key in setting.of]:
        note = KEYS[key].note if key in KEYS else ""
        return Entry(key, value, lines, "; ".join([*own, *([note] if note else [])]))
    switch = next((table for table in SWITCHES if key.startswith(table)), None)
    if switch is not None and key != f"{switch}use" and values.get(f"{switch}use", False) is False:
        return Entry(key, value, (), f"no effect: {switch}use is false")
    if key in KEYS:
        usual = "nothing to write: this is what a recipe does without a key" if KEYS[key].ours else KEYS[key].note
        return Entry(key, value, (), "; ".join(own or [usual]))
    for start, why in GROUPS.items():
        if key.startswith(start):
            return Entry(key, value, (), "; ".join([*own, why]))
    near = nearest(key, KEYS)
    return Entry(
        key, value, (), f"no key of FederatedScope-LLM{f'; did you mean {near}?' if near else ''}", known=False
    )


def recipe_text(converted: Converted, source: str) -> str:
    """Return the recipe in TOML, with what has no counterpart as comments at its end."""
    lines = [f"# Imported from {source}, a configuration of FederatedScope-LLM"]
    tables = converted.tables
    lines += entries({key: value for key, value in tables.items() if not isinstance(value, Mapping)})
    for name, table in tables.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{name}]", *entries(table)]
    if converted.defaults:
        lines += ["", "# Not in the file; FederatedScope's defaults:", *comments(converted.defaults)]
    if left := [f"{entry.key} = {entry.value!r}: {entry.note}" for entry in converted.entries if not entry.ours]:
        lines += ["", "# Without a line here:", *comments(left)]
    if noted := [f"{entry.key}: {entry.note}" for entry in converted.entries if entry.ours and entry.note]:
        lines += ["", "# Read so:", *comments(noted)]
    return "\n".join(lines) + "\n"


def comments(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts as comments, without anything that would end one."""
    return (f"#   {' '.join(''.join(c if c.isprintable() else ' ' for c in text).split())}" for text in texts)


def line(setting: Setting) -> str:
    return f"{setting.path} = {toml(setting.value)}"


def tables_of(settings: Sequence[Setting]) -> dict[str, Any]:
    """Return settings as nested tables."""
    tables: dict[str, Any] = {}
    for setting in settings:
        *above, last = setting.path.split(".")
        node = tables
        for name in above:
            node = node.setdefault(name, {})
        node[last] = setting.value
    return tables


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


ROBUST: Mapping[str, str] = {"krum": "multikrum", "median": "median", "trimmedmean": "trimmed", "normbounding": "clip"}
SERVER: Mapping[str, str] = {"sgd": "none", "adam": "fedadam", "adamw": "fedadam", "yogi": "fedyogi"}


def method_part(given: Given) -> Iterator[Setting | Remark]:
    name = given.text("federate.method", "FedAvg").lower()
    if name not in ("fedavg", "fedopt", "fedprox", "global", "local", *PERSONAL):
        known = "FedAvg, FedOpt, FedProx, global, Ditto, pFedMe, FedRep or FedBN"
        raise wrong("federate.method", known, given.values["federate.method"])
    if name == "local":
        yield Remark("federate.method", "train each client alone: data.split.only = [its name], one run for each")
    frozen = given.flag("federate.freeze_A", False)
    yield Setting("method.name", "ffa" if frozen else "fedit", ("federate.method", "federate.freeze_A"))
    # Its clients weigh as many examples as they have seen in the round: alike, where all make the same steps.
    by_steps = given.text("train.batch_or_epoch", "batch") == "batch"
    uniform = given.flag("federate.ignore_weight", False) or (
        by_steps and not given.flag("federate.data_weighted_aggr", False)
    )
    of = ("federate.ignore_weight", "federate.data_weighted_aggr")
    yield Setting("method.weights", "uniform" if uniform else "examples", of)
    yield from wire_part(given)
    if given.flag("fedopt.use", False):
        rule = given.text("fedopt.optimizer.type", "SGD")
        if rule.lower() not in SERVER:
            raise wrong("fedopt.optimizer.type", "SGD, Adam or Yogi", rule)
        momentum = given.number("fedopt.optimizer.momentum", 0.0)
        chosen = "fedavgm" if rule.lower() == "sgd" and momentum else SERVER[rule.lower()]
        yield Setting("method.server_optimizer.name", chosen, ("fedopt.use", "fedopt.optimizer.type"))
        if chosen == "fedavgm":
            yield Setting("method.server_optimizer.momentum", momentum, ("fedopt.optimizer.momentum",))
        rate = given.number("fedopt.optimizer.lr", 0.01)
        yield Setting("method.server_learning_rate", rate, ("fedopt.use", "fedopt.optimizer.lr"))
    yield from robust_part(given)


def wire_part(given: Given) -> Iterator[Setting | Remark]:
    method, bits = given.text("quantization.method", "none").lower(), given.whole("quantization.nbits", 8)
    formats = {8: "int8", 16: "bf16"}
    if method == "uniform" and bits not in formats:
        raise wrong("quantization.nbits", "8 or 16", bits)
    of = ("quantization.method", "quantization.nbits")
    yield Setting("method.wire_dtype", formats[bits] if method == "uniform" else "fp32", of)


def robust_part(given: Given) -> Iterator[Setting | Remark]:
    rule = given.text("aggregator.robust_rule", "fedavg").lower()
    if rule == "fedavg":
        return
    if rule not in ROBUST:
        raise wrong("aggregator.robust_rule", f"fedavg, {', '.join(ROBUST)}", rule, "bulyan has no counterpart")
    settings = {"name": ROBUST[rule]}
    yield Setting("method.robust.name", ROBUST[rule], ("aggregator.robust_rule",))
    clients, _ = cohort(given)
    if rule in ("krum", "trimmedmean"):
        number = max(1, given.whole("aggregator.byzantine_node_num", 0))
        # Rounded down to clients again, so a little above the exact share.
        share = min(0.499, round((number + 0.01) / max(1, clients), 4))
        yield Setting("method.robust.attackers", share, ("aggregator.byzantine_node_num",))
        least = least_clients(RobustRule(**settings, attackers=share))  # type: ignore[arg-type]
    else:
        least = least_clients(RobustRule(**settings))  # type: ignore[arg-type]
    bound = "aggregator.BFT_args.normbounding_norm_bound"
    if rule == "normbounding" and bound in given.values:
        yield Setting("method.robust.bound", given.number(bound, 10.0), (bound,))
    if least > 1:
        yield Setting("rounds.min_clients", least, ("aggregator.robust_rule",))


PERSONAL: Mapping[str, str] = {"ditto": "ditto", "pfedme": "pfedme", "fedrep": "fedrep", "fedbn": "fedbn"}
LORA_NAMES: Mapping[str, str] = {"lora_a": "*.a", "lora_b": "*.b"}


def personal_part(given: Given) -> Iterator[Setting | Remark]:
    table, name = "personalization", given.text("federate.method", "FedAvg").lower()
    local = given.texts(f"{table}.local_param")
    keep = [LORA_NAMES.get(part.lower(), f"*{part}*") for part in local]
    if name in PERSONAL:
        yield Setting("personal.kind", PERSONAL[name], ("federate.method",))
    elif keep:
        yield Setting("personal.kind", "share-a" if keep == ["*.b"] else "fedbn", (f"{table}.local_param",))
    elif given.flag("finetune.before_eval", False):
        yield Setting("personal.kind", "finetune", ("finetune.before_eval",))
        steps = given.whole("finetune.local_update_steps", 1)
        yield Setting("personal.steps", steps, ("finetune.local_update_steps",))
        yield Setting("personal.rate", given.number("finetune.optimizer.lr", 0.1), ("finetune.optimizer.lr",))
        return
    else:
        return
    if keep and name not in ("ditto", "pfedme"):
        yield Setting("personal.keep", keep, (f"{table}.local_param",))
    if name in ("ditto", "pfedme"):
        strength = given.number(f"{table}.regular_weight", 0.1)
        yield Setting("personal.strength", strength, (f"{table}.regular_weight",))
    if name in ("ditto", "pfedme", "fedrep"):
        key = f"{table}.lr_linear" if name == "fedrep" else f"{table}.lr"
        if (rate := given.number(key, 0.1 if name == "fedrep" else 0.0)) > 0:
            yield Setting("personal.rate", rate, (key,))
    if name == "pfedme":
        yield Setting("personal.steps", given.whole(f"{table}.K", 5), (f"{table}.K",))
    elif name == "ditto" and (steps := given.whole(f"{table}.local_update_steps", -1)) > 0:
        yield Setting("personal.steps", steps, (f"{table}.local_update_steps",))


TRIGGERS: Mapping[str, str] = {"goal_achieved": "goal", "time_up": "time"}
MANNERS: Mapping[str, str] = {"after_aggregating": "after-aggregating", "after_receiving": "after-receiving"}


def asynchronous_part(given: Given) -> Iterator[Setting | Remark]:
    if not given.flag("asyn.use", False):
        return
    ending, manner = (
        given.text("asyn.aggregator", "goal_achieved"),
        given.text("asyn.broadcast_manner", "after_aggregating"),
    )
    if ending not in TRIGGERS:
        raise wrong("asyn.aggregator", "goal_achieved or time_up", ending)
    if manner not in MANNERS:
        raise wrong("asyn.broadcast_manner", "after_aggregating or after_receiving", manner)
    yield Setting("asynchronous.trigger", TRIGGERS[ending], ("asyn.use", "asyn.aggregator"))
    if given.text("federate.mode", "standalone") == "standalone":
        yield Setting("fleet.name", "lognormal", ("asyn.use",))
        yield Remark(
            "asyn.use", "a simulation takes the order of updates from its fleet's clock: choose the devices there"
        )
    if ending == "time_up":
        yield Setting("asynchronous.budget_s", given.number("asyn.time_budget", 0), ("asyn.time_budget",))
    else:
        share, (clients, _) = given.number("asyn.min_received_rate", -1.0), cohort(given)
        number = max(1, int(share * clients)) if 0 < share <= 1 else given.whole("asyn.min_received_num", 2)
        of = ("asyn.use", "asyn.min_received_rate" if 0 < share <= 1 else "asyn.min_received_num")
        yield Setting("asynchronous.buffer", number, of)
    discount = given.number("asyn.staleness_discount_factor", 1.0)
    yield Setting("asynchronous.staleness_exponent", discount, ("asyn.staleness_discount_factor",))
    stale = given.whole("asyn.staleness_toleration", 0)
    yield Setting("asynchronous.max_staleness", stale, ("asyn.staleness_toleration",))
    yield Setting("asynchronous.send", MANNERS[manner], ("asyn.broadcast_manner",))
    if (timeout := given.number("asyn.timeout", 0)) > 0:
        yield Setting("rounds.deadline_s", timeout, ("asyn.timeout",))


PARTS: Sequence[Part] = (
    run_part,
    model_part,
    method_part,
    client_part,
    rounds_part,
    data_part,
    personal_part,
    asynchronous_part,
)
