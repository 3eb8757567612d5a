"""Fixed recipes on the embedded model, and what a run directory says apart from times and the machine's memory."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

Tables: TypeAlias = dict[str, Any]

SOURCE = "/proc/self/cwd/data.jsonl"
"""The working folder's file, by an absolute path that is the same everywhere: so bound recipes are too."""
CLIENTS = ("client-0", "client-1", "client-2")
ROUNDS = 3

TIMED = {"seconds", "peak_bytes"}
"""Keys whose values depend on the machine."""
MACHINE = {"versions", "machine"}
CLOCKED = {"compute_s", "transfer_s", "overhead_s"}
"""Keys whose values depend on the machine unless a fleet's clock is simulated."""
DIGESTED = ("test", "held_out", "deployed", "modules")
"""Parts of a round's line that are kept by their SHA-256."""


def write_data(folder: Path) -> None:
    """Write the rows that every recipe here trains on: 24 short texts, eight for each of three clients."""
    text = "the quick brown fox jumps over the lazy dog and the dog sleeps while the fox runs"
    words = text.split()
    rows = [
        {"text": " ".join(words[(3 * i + j) % len(words)] for j in range(6 + i % 5)), "who": CLIENTS[i % 3]}
        for i in range(24)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny(name: str = "tiny") -> Tables:
    """Return three clients of ranks 4, 2 and 8 on the embedded model; a round takes a quarter of a second."""
    return {
        "name": name,
        "seed": 7,
        "model": {"base": "embedded", "device": "cpu", "threads": 1},
        "adapter": {"rank": 4, "targets": ["q_proj", "v_proj"]},
        "method": {"name": "flora"},
        "client": {"steps": 2, "batch": 3, "learning_rate": 0.02, "dropout": 0.1},
        "rounds": {"count": ROUNDS},
        "data": {"source": SOURCE, "split": {"kind": "key", "by": "who"}, "max_tokens": 32, "held_out": 0.25},
        "evaluate": {"batch": 8, "prompt": "the quick", "new_tokens": 4},
        "report": {"plots": False},
        "override": [{"clients": ["client-1"], "rank": 2}, {"clients": ["client-2"], "rank": 8}],
    }


def equal(method: str) -> Tables:
    """Return the recipe of a method for which every client has one rank."""
    return {**tiny(), "method": {"name": method}, "override": []}


def mixed(method: str, **settings: Any) -> Tables:
    """Return the recipe of a method that takes clients of any rank."""
    return {**tiny(), "method": {"name": method, **settings}}


def optimized(tables: Tables, **optimizer: Any) -> Tables:
    """Return a recipe whose server steps by an optimiser, on modules_to_save as well."""
    method = {**tables["method"], "server_learning_rate": 0.05, "server_optimizer": optimizer}
    return {**tables, "method": method, "adapter": {**tables["adapter"], "modules_to_save": ["norm"]}}


def seeded(bank: str, **settings: Any) -> Tables:
    """Return the recipe with seeds and scalars in place of adapters."""
    rest = {key: value for key, value in tiny().items() if key not in ("adapter", "override")}
    method = {"name": "fedkseed", "bank": bank, "seeds": 64, "scalar_step": 1e-4, "perturbation": 1e-3, **settings}
    return {**rest, "method": method, "client": {"steps": 4, "batch": 3, "learning_rate": 2e-3}}


def descending(bank: str, **settings: Any) -> Tables:
    """Return the recipe whose clients take first-order steps on the numbers of seeds."""
    tables = seeded(bank, **settings)
    alone = settings["verb"] == "descend"
    client = {"batch": 3} if alone else tables["client"]
    return {**tables, "client": client, "descend": {"steps": 3, "learning_rate": 0.02}}


def pruned(policy: str, **planner: Any) -> Tables:
    """Return flora with pruning by a policy; the planner draws ratios and ranks, or is the one that is named."""
    rest = {key: value for key, value in tiny().items() if key != "override"}
    return {
        **rest,
        "adapter": {"rank": 4, "targets": ["all-linear"]},
        "pruning": {"policy": policy, "target": 0.5, "multiple": 8, "batches": 2, "refresh": 2},
        "planner": {"name": "random", "ratios": [0.0, 0.25, 0.5], "ranks": [2, 4], **planner},
        "client": {"steps": 2, "batch": 3, "learning_rate": 0.02},
    }


def adaptive(planner: str, **settings: Any) -> Tables:
    """Return flora on a simulated fleet of devices, with pruning, under a planner that learns."""
    return {**pruned("nested", name=planner, **settings), "fleet": {"name": "orin8"}}


def recipes() -> Mapping[str, Tables]:
    """Return every recipe that is run in process, by name."""
    return {
        "flora": mixed("flora"),
        "flora-reinit": mixed("flora", mode="reinit", weights="uniform", wire_dtype="fp32"),
        "flora-svt": mixed("flora", mode="svt", tau=0.9, server_learning_rate=0.5, wire_dtype="fp16"),
        "fedit": equal("fedit"),
        "ffa": equal("ffa"),
        "zeropad": mixed("zeropad"),
        "fedit-fedavgm": optimized(equal("fedit"), name="fedavgm"),
        "ffa-fedadam": optimized(equal("ffa"), name="fedadam", beta1=0.8),
        "zeropad-fedyogi": optimized(mixed("zeropad"), name="fedyogi"),
        "hetlora": mixed("hetlora", rank_decay=0.5, rank_penalty=0.1),
        "flexlora": mixed("flexlora"),
        "fedex": equal("fedex"),
        "fedkseed-hadamard": seeded("hadamard"),
        "fedkseed-gaussian": seeded("gaussian", sampling="distinct"),
        "fedkseed-kron": seeded("kron", sampling="pro"),
        "fedkseed-one-sided": seeded(
            "hadamard", estimator="one-sided", queries=2, normalise=True, scalar_step="auto", public_log=True
        ),
        "fedkseed-descend": descending("hadamard", verb="descend", groups=2, scalar_bits=4),
        "fedkseed-kron-mixed": descending("kron", verb="auto", groups="tensor")
        | {"override": [{"clients": ["client-0"], "verb": "probe"}]},
        "flora-nested": pruned("nested"),
        "flora-vote": pruned("vote"),
        "flora-local": pruned("local"),
        "flora-stages": adaptive("deadline")
        | {"pruning": {"target": 0.5, "multiple": 8, "batches": 2, "stages": 2, "steps_between": 1, "score": "lora"}},
        "planner-deadline": adaptive("deadline", explore=1),
        "planner-s-ucb": adaptive("s-ucb"),
        "planner-ucb": adaptive("ucb"),
        "planner-thompson": adaptive("thompson", reward="fedmp"),
        "fleet-drop": adaptive("deadline", deadline_s=1.0) | {"fleet": {"name": "lognormal", "late": "drop"}},
        "cohort": {**tiny(), "rounds": {"count": ROUNDS, "cohort": 2, "over_select": 1.5, "max_norm": 2.0}},
        "sgd": {
            **equal("fedit"),
            "client": {
                "epochs": 1,
                "batch": 2,
                "accumulation": 2,
                "learning_rate": 0.05,
                "optimizer": "sgd",
                "momentum": 0.9,
                "schedule": "cosine",
                "warmup": 0.5,
                "weight_decay": 0.01,
            },
        },
        "saved": {**equal("fedit"), "adapter": {"rank": 4, "targets": ["q_proj"], "modules_to_save": ["norm"]}},
    }


def described(run: Path, *, simulated_clock: bool) -> Mapping[str, Any]:
    """Return what a finished run's directory says."""
    dropped = TIMED if simulated_clock else TIMED | CLOCKED
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "rounds": [line_of(line, dropped) for line in lines],
        "journal": journal(run / "journal"),
        "summary": without({k: v for k, v in summary.items() if k not in MACHINE}, dropped),
        "recipe": sha((run / "recipe.toml").read_bytes()),
        "files": files(run),
    }


def line_of(line: Mapping[str, Any], dropped: set[str]) -> Mapping[str, Any]:
    plain = without(line, dropped)
    return {key: sha(value) if key in DIGESTED and value else value for key, value in plain.items()}


def without(value: Any, dropped: set[str]) -> Any:
    """Return a JSON value in which the numbers of some keys, at any depth, are replaced by the word `varies`."""
    if isinstance(value, Mapping):
        return {
            key: "varies" if key in dropped and not isinstance(part, Mapping) else without(part, dropped)
            for key, part in value.items()
        }
    return [without(part, dropped) for part in value] if isinstance(value, list) else value


def sha(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def records(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield a journal's records, read by their layout alone: u32 length, u32 crc32, JSON."""
    data, offset = path.read_bytes(), 0
    while offset < len(data):
        length, _ = struct.unpack_from("<II", data, offset)
        yield json.loads(data[offset + 8 : offset + 8 + length])
        offset += 8 + length


def journal(path: Path) -> Mapping[str, Any]:
    """Return what a journal notes of each round: cohort, digests of the assignments, states, and whose updates came.

    In how many records the updates stand, and their digests, depend on the time that the clients took, and so do the
    digests of a round's line and of the summary, in which there are seconds.
    """
    rounds: dict[str, Any] = {}
    starts, kinds, keys = [], [], dict[str, list[str]]()
    for record in records(path):
        keys[record["kind"]] = sorted(record)
        if record["kind"] != "accept":
            kinds.append(record["kind"])
        varying = ("n", "prev", "epoch", "kind", "unix_ms", "run", "blob", "line", "summary")
        own = {key: value for key, value in record.items() if key not in varying}
        if record["kind"] == "start":
            inputs = {k: v for k, v in own.pop("inputs").items() if k not in ("versions", "platform", "threads")}
            inputs["recipe"] = sha(inputs["recipe"].encode())
            starts.append({**own, **inputs})
            continue
        noted = rounds.setdefault(str(own.pop("round")), {"updates": {}})
        noted["updates"] |= {client: length for client, _, length in own.pop("updates", ())}
        noted |= {f"{record['kind']}.{key}": value for key, value in own.items()}
    keys.pop("accept", None)
    for noted in rounds.values():
        noted["updates"] = dict(sorted(noted["updates"].items()))
    return {"starts": starts, "kinds": kinds, "keys": keys, "rounds": rounds}


def files(folder: Path) -> list[str]:
    """Return the names of all files below a folder; of content-addressed ones that there are some."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return sorted({"blobs/*" if name.startswith("blobs/") else name for name in names})
