"""FederatedScope's aggregation, personal models, asynchronous rounds and search as keys of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedtune.config.fs_given import Given, Remark, Setting, wrong
from fedtune.config.fs_parts import cohort
from fedtune.methods.robust import least_clients
from fedtune.methods.settings import RobustRule

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


SEARCHES: Mapping[str, str] = {
    "rs": "random",
    "wrap_rs": "random",
    "bruteforce": "grid",
    "sha": "sha",
    "wrap_sha": "sha",
    "pbt": "pbt",
}
SEARCHED: Mapping[str, str] = {
    "train.optimizer.lr": "client.learning_rate",
    "train.optimizer.weight_decay": "client.weight_decay",
    "train.optimizer.momentum": "client.momentum",
    "train.local_update_steps": "client.steps",
    "dataloader.batch_size": "client.batch",
    "fedprox.mu": "client.proximal",
}
"""Keys of a search space, and here."""


def search_part(given: Given) -> Iterator[Setting | Remark]:
    """Yield the table `search`, where the file of its space is here."""
    if "hpo.ss" in given.values and not given.space:
        text = "its file is not here: write [search] with a space of this recipe's keys, or put the file in place"
        yield Remark("hpo.ss", text)
    if not given.space:
        return
    kind = given.text("hpo.scheduler", "rs")
    if kind not in SEARCHES:
        raise wrong("hpo.scheduler", f"one of {', '.join(SEARCHES)}", kind)
    yield Setting("search.kind", SEARCHES[kind], ("hpo.scheduler",))
    if SEARCHES[kind] != "grid":
        yield Setting("search.trials", given.whole("hpo.init_cand_num", 16), ("hpo.init_cand_num",))
    if SEARCHES[kind] == "sha":
        yield Setting("search.reduction", given.whole("hpo.sha.elim_rate", 3), ("hpo.sha.elim_rate",))
        budgets = given.values.get("hpo.sha.budgets", [])
        if isinstance(budgets, list) and budgets and isinstance(budgets[0], int):
            yield Setting("search.first_rung", budgets[0], ("hpo.sha.budgets",))
    if SEARCHES[kind] == "pbt":
        rounds = given.whole("federate.total_round_num", 50)
        step = max(1, rounds // max(1, given.whole("hpo.pbt.max_stage", 5)))
        yield Setting("search.interval", step, ("hpo.pbt.max_stage",))
    for key, dimension in given.space.items():
        if key not in SEARCHED:
            yield Remark("hpo.ss", f"{key} is not searched here: write it by hand if it has a key")
        elif "choices" in dimension:
            yield Setting(f"search.space.{SEARCHED[key]}", list(dimension["choices"]), ("hpo.ss",))
        else:
            ends = Given({f"hpo.ss {key}.{name}": dimension.get(name) for name in ("lower", "upper")})
            number = ends.whole if dimension.get("type") == "int" else ends.number
            low, high = (number(f"hpo.ss {key}.{name}", 0) for name in ("lower", "upper"))
            spread = {"log": True} if dimension.get("log") is True else {}
            yield Setting(f"search.space.{SEARCHED[key]}", {"low": low, "high": high, **spread}, ("hpo.ss",))
