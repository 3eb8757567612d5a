"""The demo's federation of source code: packages of Python's standard library as clients, for the embedded model."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

CLIENTS: Mapping[str, int] = MappingProxyType(
    {
        "asyncio": 32,
        "email": 16,
        "multiprocessing": 16,
        "unittest": 8,
        "xml": 8,
        "http": 4,
        "logging": 4,
        "json": 2,
    }
)
"""LoRA rank by client. Each is a package that every CPython has and that the embedded model was not trained on."""

CHUNK = 600
"""Characters of an example at most, unless one paragraph of code is longer; about 190 tokens of the embedded model."""
STRIDE = 3
"""Every third chunk is an example: the clients' sizes keep their proportions, and the demo stays quick."""
RANK = 8
"""The recipe's default rank; clients of this rank need no override."""


def write_data(folder: Path) -> Path:
    """Write one file `<client>.jsonl` with rows {"text": ...} per client into the folder, and return the folder.

    The rows are source code of the running interpreter's own library: unequal in number (about 30 to 300), different
    in kind from client to client, and the same whenever the same Python writes them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for client in CLIENTS:
        rows = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in examples(client)]
        (folder / f"{client}.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


def examples(package: str) -> Sequence[str]:
    """Return every `STRIDE`th chunk of a standard-library package's source, in the order of its files."""
    root = Path(sysconfig.get_path("stdlib")) / package
    files = sorted(file for file in root.rglob("*.py") if not {"test", "tests"} & {*file.relative_to(root).parts})
    texts = [chunk for file in files for chunk in chunks(file.read_text(encoding="utf-8"))]
    # Without repeats, such as licence headers: held-out rows must not be among the training rows.
    return list(dict.fromkeys(texts))[::STRIDE]


def chunks(source: str) -> Sequence[str]:
    """Cut a text at its empty lines into parts of at most `CHUNK` characters; a longer paragraph is a part of its own.

    >>> chunks("import os" + chr(10) * 3 + "x = 1") == ["import os" + chr(10) * 2 + "x = 1"]
    True
    """
    parts: list[str] = []
    for paragraph in (part.rstrip() for part in source.split("\n\n")):
        if not paragraph:
            continue
        if parts and len(parts[-1]) + len(paragraph) + 2 <= CHUNK:
            parts[-1] += "\n\n" + paragraph.lstrip("\n")
        else:
            parts.append(paragraph.lstrip("\n"))
    return parts


def recipe_text() -> str:
    """Return the demo's recipe: TOML with a comment on every line that a user may want to change."""
    return RECIPE + rank_overrides(CLIENTS, RANK)


def rank_overrides(ranks: Mapping[str, int], default: int) -> str:
    """Return the recipe's tables `override` for the clients whose rank is not the default one."""
    ranked = sorted(ranks, key=lambda client: -ranks[client])
    return "\n".join(
        f"[[override]]\nclients = {json.dumps(list(group))}\nrank = {rank}\n"
        for rank, group in groupby(ranked, key=lambda client: ranks[client])
        if rank != default
    )


RECIPE = f"""\
# A federation on one machine. Run it with: fedtune simulate <this file>
# Relative paths are relative to this file. Any value can be changed for one run: --set rounds.count=8

name = "demo"                        # the run is written to runs/<name>
seed = 0                             # same seed, same machine: same result, bit for bit

[model]
base = "embedded"                    # the small model inside fedtune; or a folder or a hub name of your own
threads = 1                          # CPU threads a client trains with; a large model gains from more

[adapter]
rank = {RANK}                             # of every client that no override below names
alpha = "2r"                         # LoRA scale alpha / rank: 2 for every rank
targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]   # or ["all-linear"]

[method]
name = "flora"                       # exact sums of mixed ranks; also: fedit, ffa, zeropad, hetlora, flexlora, fedex

[client]                             # what each client does in each round
steps = 6
batch = 4
learning_rate = 1e-2

[rounds]
count = 4

[data]
source = "data/*.jsonl"              # rows with text, or with instruction, input and output (map them with fields)
max_tokens = 160                     # longer examples are cut
held_out = 0.1                       # share of each client's rows that is never trained on and scores the result
split = {{ kind = "files" }}           # one client per file; also: key, iid, dirichlet, sizes

[engine]
name = "inprocess"                   # processes: several clients at once; ray: Flower's simulation engine; same bits

[evaluate]
prompt = "class Handler:\\n    def "   # continued before and after

# Clients of other ranks: what each can carry.
"""
