"""What each command leaves: exit status, machine-readable output, and the files that it writes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import fedtune
from fedtune.cli.main import app
from tests.golden import recipes
from tests.golden.recipes import CLOCKED, MACHINE, TIMED, Tables

VARYING = {
    *TIMED,
    *CLOCKED,
    *MACHINE,
    "run",
    "head",
    "num_bytes",
    "records",
    "key",
    "serials",
    "not_before",
    "not_after",
    "valid_until",
    "forward_ms",
}
"""Keys of output whose values differ from one run to the next, or from machine to machine."""
PACKAGE = Path(fedtune.__file__).parent
HASHED = (".safetensors", ".ftks")
"""Kinds of written files whose bytes are compared."""


def toml(tables: Tables) -> str:
    """Return a recipe as TOML."""
    plain = {key: value for key, value in tables.items() if not isinstance(value, dict | list)}
    lines = [f"{key} = {inline(value)}" for key, value in plain.items()]
    for name, table in tables.items():
        for one in table if isinstance(table, list) else [table] if isinstance(table, dict) else []:
            lines += ["", f"[[{name}]]" if isinstance(table, list) else f"[{name}]"]
            lines += [f"{key} = {inline(value)}" for key, value in one.items()]
    return "\n".join(lines) + "\n"


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {inline(part)}" for key, part in value.items()) + " }"
    return "[" + ", ".join(map(inline, value)) + "]" if isinstance(value, list) else json.dumps(value)


class Terminal:
    """Runs commands in a folder and notes what they leave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, Any] = {}

    def __call__(self, line: str, *, words: Sequence[str] = ()) -> str:
        """Run a command, note it under its line, and return its output."""
        before = dict(self.contents())
        result = CliRunner(env={"COLUMNS": "110", "FEDTUNE_DEBUG": ""}).invoke(app, [*line.split(), *words])
        noted: dict[str, Any] = {"exit": result.exit_code, "stdout": self.output(result.stdout)}
        noted["stderr"] = "text" if result.stderr.strip() else "empty"
        if "Traceback" in result.output or not isinstance(result.exception, SystemExit | None):
            noted["error"] = type(result.exception).__name__
        after = dict(self.contents())
        changed = {name: content for name, content in after.items() if before.get(name) != content}
        if changed:
            noted["written"] = {name: content[1] for name, content in sorted(changed.items())}
        if removed := sorted(before.keys() - after.keys()):
            noted["removed"] = removed
        assert line not in self.values, line
        self.values[line] = noted
        return str(result.stdout)

    def contents(self) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yield the name of each file with its digest, and what of that is kept."""
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if path.is_file():
                digest = sha256(path.read_bytes()).hexdigest()
                name = re.sub(r"events\.out\.tfevents.*", "events.out.tfevents*", name)  # a time, a host, a process
                name = name.partition("/blobs/")[0] + "/blobs/*" if "/blobs/" in name else name
                yield name, (digest, digest if path.suffix in HASHED else shape(path))

    def output(self, text: str) -> Any:
        """Return output as its JSON, or else say that there is some."""
        try:
            parts = [json.loads(line) for line in text.splitlines()]
        except ValueError:
            return "text"
        text = json.dumps(parts).replace(str(self.folder), "<folder>").replace(str(PACKAGE), "<package>")
        plain = json.loads(text)
        return without_values(plain) if plain else "empty"


def without_values(value: Any) -> Any:
    if isinstance(value, list):
        return [without_values(part) for part in value]
    if isinstance(value, Mapping):
        return {key: "varies" if key in VARYING else without_values(part) for key, part in value.items()}
    return value


def shape(path: Path) -> str:
    """Return the keys of a JSON file, the first line of a text of ours, or that there is a file."""
    if path.suffix != ".json":
        return "file"
    content = json.loads(path.read_text())
    return "keys " + " ".join(content) if isinstance(content, dict) else "list"


def values(folder: Path) -> Mapping[str, Any]:
    """Return what every command leaves, run one after the other in a folder that holds the data."""
    run = Terminal(folder)
    tiny = recipes.tiny() | {"rounds": {"count": 2}, "report": {"plots": False, "tensorboard": False}}
    (folder / "tiny.toml").write_text(toml(tiny))
    (folder / "fedit.toml").write_text(toml({**tiny, "name": "fedit", "method": {"name": "fedit"}, "override": []}))
    (folder / "seeds.toml").write_text(toml({**recipes.seeded("hadamard"), "name": "seeds"}))
    (folder / "pruned.toml").write_text(toml({**recipes.pruned("nested"), "name": "pruned"}))
    general(run)
    simulations(run)
    results(run)
    runs(run)
    identities(run)
    link(run)
    return run.values


def general(run: Terminal) -> None:
    for line in ("--version", "--help", "nonsense", "simulate --nonsense", "runs", "ca", "enroll", "roster"):
        run(line)
    run("demo --write written/demo.toml")
    run("demo --write written/demo.toml --json")


def simulations(run: Terminal) -> None:
    run("simulate")
    run("simulate none.toml")
    run("simulate tiny.toml --out run --json")
    run("simulate tiny.toml --out run")
    run("simulate tiny.toml --out run --fresh --quiet")
    run("simulate tiny.toml --out run --resume run")
    run("simulate tiny.toml --set client.stpes=3")
    run("simulate tiny.toml --set client.steps=0")
    run("simulate tiny.toml --set nonsense")
    run("simulate tiny.toml --set data.source=nowhere.jsonl --out nowhere")
    run("simulate tiny.toml --set model.base=nowhere --out nowhere")
    run("simulate tiny.toml --engine nonsense")
    run("simulate tiny.toml --set rounds.min_clients=4 --out few --json")
    run("simulate tiny.toml --set rounds.min_clients=3 --set rounds.max_norm=1e-6 --out far --json")
    run("simulate --resume nowhere")
    run("simulate --resume run --json")
    run("simulate --resume run --set seed=8")
    run("simulate --resume run --set rounds.count=3 --json")
    run("simulate --resume run --set rounds.count=1 --json")
    run("simulate seeds.toml --out seeds --json")
    run("simulate pruned.toml --out pruned --json")


def results(run: Terminal) -> None:
    for line in (
        "evaluate nowhere",
        "evaluate run --json",
        "evaluate run",
        "evaluate run --json --examples 3",
        "evaluate run --json --data data.jsonl",
        "evaluate run --data nowhere.jsonl",
        "evaluate run --ratio 0.5",
        "evaluate seeds --json",
        "evaluate pruned --json --ratio 0.25 --ratio 0.5",
        "export nowhere",
        "export run",
        "export run --form uniform --max-rank 2",
        "export run --form merged --dtype bfloat16",
        "export run --form nonsense",
        "export run --form ledger",
        "export run --ratio 0.5",
        "export run --deploy",
        "export run --form peft --deploy",
        "export seeds --out merged",
        "export seeds --form ledger --out ledger",
        "export seeds --form peft",
        "export pruned --deploy --ratio 0.5 --out deployed",
        "replay embedded seeds/seeds --json",
        "replay embedded ledger --out replayed --json",
        "replay embedded run/adapter",
        "replay nowhere seeds/seeds",
        "report nowhere",
        "report run",
        "report run --tensorboard",
        "compare run fedit.toml --seeds 0;1",
        "compare fedit.toml --seeds 0,1 --out compare --quiet --set rounds.count=1",
        "compare run run-2 --out compared",
        "compare nowhere",
    ):
        run(line)


def runs(run: Terminal) -> None:
    run("runs list . --json")
    run("runs list .")
    run("runs list nowhere --json")
    run("runs status run --json")
    run("runs status run")
    run("runs status nowhere")
    run("runs verify run --json")
    run("runs verify run")
    run("runs verify nowhere")
    shutil.copytree(run.folder / "run", run.folder / "damaged")
    lines = (run.folder / "damaged" / "rounds.jsonl").read_text().splitlines(keepends=True)
    (run.folder / "damaged" / "rounds.jsonl").write_text("".join(lines[:-1]))
    run("runs verify damaged --json")
    journal = run.folder / "damaged" / "journal"
    journal.write_bytes(journal.read_bytes()[:200].replace(b"inputs", b"Inputs") + journal.read_bytes()[200:])
    run("runs status damaged --json")
    run("runs verify damaged")
    run("simulate --resume damaged")


def identities(run: Terminal) -> None:
    run("ca init ca --federation care")
    run("ca init ca --federation care --years 5")
    run("enroll request --name server --org centre --role coordinator --host localhost --identity server")
    run("enroll request --name site-a --org clinic --identity site-a")
    run("enroll request --name site-b --org clinic --role nonsense --identity site-b")
    run("enroll sign nowhere.request.json")
    run("enroll sign site-a.request.json")
    run("enroll sign site-a.request.json --fingerprint", words=["0000"])
    for name in ("server", "site-a"):
        told = (run.folder / f"{name}.request.json").read_bytes()
        digits = sha256(told).hexdigest()[:32]
        run(f"enroll sign {name}.request.json --ca ca --fingerprint", words=[digits])
        run(f"enroll accept {name}.bundle.json --identity {name}")
    run("enroll accept nowhere.bundle.json")
    run("enroll accept site-a.bundle.json --identity server")
    run("roster list --ca ca --json")
    run("roster list --identity server --json")
    run("roster list --identity nowhere")
    run("roster install ca/roster --identity server")
    run("roster renew --ca ca --days 60")
    run("roster revoke nobody --ca ca")
    run("roster revoke site-a --ca ca")
    shutil.copy(run.folder / "server" / "roster", run.folder / "older")
    run("roster install ca/roster --identity site-a")
    run("roster install older --identity site-a")
    run("roster install nowhere")


def link(run: Terminal) -> None:
    (run.folder / "site.toml").write_text(
        'name = "site-a"\n[model]\nbase = "embedded"\n[adapter]\ntargets = ["q_proj"]\n'
        '[data]\nsource = "data.jsonl"\n[link]\naddress = "localhost:1"\nidentity = "site-a"\n'
    )
    (run.folder / "wrong.toml").write_text((run.folder / "site.toml").read_text().replace("address", "adress"))
    for line in (
        "serve",
        "serve none.toml",
        "serve tiny.toml",
        "serve tiny.toml --log nonsense --identity server",
        "serve tiny.toml --listen nonsense --identity server",
        "serve --resume nowhere",
        "join",
        "join none.toml",
        "join wrong.toml",
        "join site.toml --dry-run",
        "join site.toml --dry-run --json",
        "join site.toml --log nonsense",
        "status nowhere",
        "status run",
        "status run --json",
        "audit nowhere",
        "audit run",
        "audit run --json",
    ):
        run(line)
