"""What fedtune, Flower, NVFlare and FederatedScope-LLM ask for one job, each cell with the command or file it is from.

    python -m venv beside && beside/bin/pip install -e . 'flwr[simulation]==1.42.0' nvflare==2.9.0 trl
    beside/bin/python benchmarks/frameworks.py                # files, packages, imports, ranks
    beside/bin/python benchmarks/frameworks.py --run BASE     # and the job itself, three times; minutes

The job: three clients fine-tune LoRA factors of one causal model on their own files, four steps in each of two rounds,
and a PEFT folder comes out. `frameworks/` holds it once for each framework, as short as we could write it. A package
that is not installed leaves its cells "not measured". FederatedScope-LLM is on no registry and asks for Python 3.9
with numpy below 1.23: its cells are read from its files.
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
APPS = Path(__file__).parent / "frameworks"
NOT_MEASURED = "not measured"

FILES = {
    "fedtune": ["fedtune/recipe.toml"],
    "Flower": ["flower/pyproject.toml", "flower/app/client_app.py", "flower/app/server_app.py"],
    "NVFlare": ["nvflare/train.py", "nvflare/model.py", "nvflare/job.py"],
}
TRAINING = ["trl", "peft", "torch"]
ROOTS = {"Flower": ["flwr[simulation]", *TRAINING], "NVFlare": ["nvflare", *TRAINING]}
IMPORTS = {"fedtune": "fedtune", "Flower": "flwr.clientapp, flwr.serverapp", "NVFlare": "nvflare.client"}
PROGRAMS = {"fedtune": "fedtune", "Flower": "flwr", "NVFlare": "nvflare"}
FS_LLM = "alibaba/FederatedScope, branch llm"
READ = [
    (
        "lines to write",
        "a YAML of 37 lines, and 3 more for LoRA",
        f"{FS_LLM}, federatedscope/llm/baseline/testcase.yaml, README.md",
    ),
    ("Python", ">=3.9; 3.9 in its text", f"{FS_LLM}, setup.py and federatedscope/llm/README.md"),
    ("torch, transformers", "torch 2.0.0, transformers==4.29.2, peft==0.4.0", f"{FS_LLM}, the same two files"),
    ("ranks 8 and 1", "a mean of tensors, added in place", f"{FS_LLM}, core/aggregators/clients_avg_aggregator.py"),
    ("result", "torch.save of round and state_dict", f"{FS_LLM}, core/aggregators/clients_avg_aggregator.py"),
]
"""What the files of FederatedScope-LLM say: row, cell, source."""

RANKS = {
    "Flower": """
import numpy
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
def mean(*ranks):
    content = [RecordDict({"arrays": ArrayRecord({"lora_A": Array(numpy.ones((rank, 16), "float32"))}),
                           "metrics": MetricRecord({"num-examples": 1})}) for rank in ranks]
    return next(iter(aggregate_arrayrecords(content, "num-examples").values())).numpy()
""",
    "NVFlare": """
import numpy
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
def mean(*ranks):
    helper = WeightedAggregationHelper()
    for number, rank in enumerate(ranks):
        helper.add({"lora_A": numpy.ones((rank, 16), "float32")}, 1.0, f"site-{number}", 0)
    return helper.get_result()["lora_A"]
""",
}
ASKED = """
for ranks in ((8, 4), (8, 1)):
    try:
        print(*ranks, "gives", *mean(*ranks).shape)
    except ValueError as error:
        print(*ranks, "raises ValueError")
"""
FACTS = {
    "telemetry, as installed": {
        "Flower": "from flwr.supercore import telemetry as t; print(t.FLWR_TELEMETRY_ENABLED, t.TELEMETRY_EVENTS_URL)",
    },
    "what a run can start from": {
        "fedtune": "import fedtune, inspect; print(*inspect.signature(fedtune.simulate).parameters)",
        "Flower": "from flwr.serverapp.strategy import Strategy as S; import inspect; "
        "print(*inspect.signature(S.start).parameters)",
        "NVFlare": "from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe as F; import inspect; "
        "print(*inspect.signature(F).parameters)",
    },
    "privacy": {
        "Flower": "import flwr.serverapp.strategy as s, pkgutil, flwr.client.mod as m; "
        "print(*[n for n in dir(s) if 'Differential' in n], *[p.name for p in pkgutil.iter_modules(m.__path__)])",
        "NVFlare": "import pkgutil, nvflare.app_opt.he as he, nvflare.app_common.filters as f; "
        "print(*[p.name for m in (he, f) for p in pkgutil.iter_modules(m.__path__)])",
    },
}
"""Questions to the installed packages, as a program of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", metavar="BASE", help="folder of a small causal model; runs the job in each framework")
    args = parser.parse_args()
    row("files to write", {name: str(len(files)) for name, files in FILES.items()}, "benchmarks/frameworks/")
    row("lines in them", {name: str(sum(map(lines, files))) for name, files in FILES.items()}, "benchmarks/frameworks/")
    scripts = {name: changed("trl/train.py", f"{name.lower()}/train.py") for name in ("fedtune", "NVFlare")}
    row("a trl script changes by", scripts, "a diff to benchmarks/frameworks/trl/")
    app = changed("flower/app/server_app.py", "fedtune/server_app.py")
    row("a Flower app changes by, for ranks that differ", {"fedtune": app}, "a diff to benchmarks/frameworks/flower/")
    row("packages, MB", {name: closure(name) for name in FILES}, "metadata of what is installed; without CUDA's")
    row("Python", {name: python(name) for name in FILES}, "metadata")
    for name in FILES:
        row(f"bounds of {name}", {name: bounds(name)}, "metadata")
    row("import, s", {name: seconds([sys.executable, "-c", f"import {IMPORTS[name]}"]) for name in FILES}, "least of 5")
    row("--help, s", {name: seconds([program(name), "--help"]) for name in FILES}, "least of 5")
    for name, code in RANKS.items():
        row("a mean of ranks", {name: printed(code + ASKED)}, "its own aggregation, called here")
    for label, programs in FACTS.items():
        for name, code in programs.items():
            row(label, {name: printed(code)}, code)
    for label, cell, source in READ:
        row(label, {"FS-LLM": cell}, source)
    if args.run:
        for name in FILES:
            row("the job", {name: job(name, Path(args.run).resolve())}, "run here; seconds with all imports")


def row(label: str, cells: dict[str, str], source: str) -> None:
    print(json.dumps({"row": label, **cells, "source": source}), flush=True)


def lines(file: str) -> int:
    """Return the lines of code of a file: not blank, no comment, no docstring."""
    text = (APPS / file).read_text()
    if not file.endswith(".py"):
        return sum(bool(line.strip()) and not line.startswith("#") for line in text.splitlines())
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    numbers, fresh = set[int](), True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped and not (fresh and token.type == tokenize.STRING):
            numbers |= set(range(token.start[0], token.end[0] + 1))
        fresh = token.type in {tokenize.NEWLINE, tokenize.INDENT, tokenize.NL, tokenize.COMMENT}
    return len(numbers)


def changed(before: str, after: str) -> str:
    """Return the lines that one script has more than another, and those that it lacks, without docstrings."""
    old, new = (code_lines(name) for name in (before, after))
    marks = [line[0] for line in difflib.ndiff(old, new)]
    return f"+{marks.count('+')} -{marks.count('-')} lines"


def code_lines(file: str) -> list[str]:
    """Return the lines of a script that are not blank, without its docstring of one line."""
    text = (APPS / file).read_text().splitlines()
    return [line for line in text[text[0].startswith('"""') :] if line.strip()]


def requirements(name: str) -> list[Requirement]:
    if name == "fedtune":
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        return [Requirement(text) for text in declared]
    return [Requirement(text) for text in ROOTS[name]]


def closure(name: str) -> str:
    """Return how many packages the job needs and their megabytes on disk, as far as they are installed here."""
    found, missing = dict[str, int](), set[str]()
    queue = [(need, "") for need in requirements(name)]
    seen = set[tuple[str, str]]()
    while queue:
        need, _ = queue.pop()
        for extra in ("", *need.extras):
            key = (canonicalize_name(need.name), extra)
            if key in seen or key[0].startswith(("nvidia-", "cuda-", "triton")):
                continue
            seen.add(key)
            try:
                package = distribution(key[0])
            except PackageNotFoundError:
                missing.add(key[0])
                continue
            found[key[0]] = sum(file.size or 0 for file in package.files or ())
            queue += [(inner, extra) for inner in wanted(package.requires or (), extra)]
    if missing:
        return f"{NOT_MEASURED}: {', '.join(sorted(missing))} not installed"
    return f"{len(found) + (name == 'fedtune')}, {sum(found.values()) / 1e6:.0f}"


def wanted(declared: Sequence[str], extra: str) -> Iterator[Requirement]:
    for text in declared:
        need = Requirement(text)
        if need.marker is None or need.marker.evaluate({"extra": extra}):
            yield need


def python(name: str) -> str:
    if name == "fedtune":
        return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
    try:
        return distribution(Requirement(ROOTS[name][0]).name).metadata["Requires-Python"] or "any"
    except PackageNotFoundError:
        return NOT_MEASURED


def bounds(name: str) -> str:
    """Return what a framework itself asks of the packages that a user's environment has, too."""
    shared = {"torch", "transformers", "peft", "protobuf", "numpy", "click", "typer", "cryptography", "grpcio"}
    if name == "fedtune":
        needs = requirements(name)
    else:
        try:
            needs = list(wanted(distribution(Requirement(ROOTS[name][0]).name).requires or (), ""))
        except PackageNotFoundError:
            return NOT_MEASURED
    return ", ".join(sorted(f"{need.name}{need.specifier}" for need in needs if need.name in shared))


def program(name: str) -> str:
    return str(Path(sys.executable).with_name(PROGRAMS[name]))


def seconds(command: Sequence[str]) -> str:
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        try:
            subprocess.run(command, check=True, capture_output=True, env=quiet())
        except (subprocess.CalledProcessError, FileNotFoundError):
            return NOT_MEASURED
        taken.append(time.perf_counter() - start)
    return f"{min(taken):.2f} (most {max(taken):.2f})"


def printed(code: str) -> str:
    silent = {name: value for name, value in quiet().items() if name != "FLWR_TELEMETRY_ENABLED"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=silent, check=False)
    return "; ".join(done.stdout.split("\n")).strip("; ") if done.returncode == 0 else NOT_MEASURED


def quiet() -> dict[str, str]:
    silence = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    silence |= {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "OMP_NUM_THREADS": "1"}
    folder = str(Path(sys.executable).parent)
    return {**os.environ, **silence, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def job(name: str, base: Path) -> str:
    """Return whether the framework's job ran and peft loads what it wrote, and its seconds."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write_rows(folder / "data")
        here, out = folder / "app", folder / "out"
        shutil.copytree(APPS / name.lower(), here)
        start = time.perf_counter()
        done = subprocess.run(commands(name, base, folder), cwd=here, env=job_environment(folder), capture_output=True)
        taken = time.perf_counter() - start
        end_processes(f"FLWR_HOME={folder / 'flwr'}")
        result = out / "adapter" if name == "fedtune" else out
        files = {"adapter_config.json", "adapter_model.safetensors"}
        if done.returncode or not files <= {path.name for path in result.glob("*")}:
            return f"failed: {(done.stderr or done.stdout).decode()[-200:]}"
        code = (
            "import sys, transformers, peft; model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
            "peft.PeftModel.from_pretrained(model, sys.argv[2])"
        )
        loaded = subprocess.run(
            [sys.executable, "-c", code, base, result], env=quiet(), capture_output=True, check=False
        )
        return f"{taken:.0f} s, peft loads the result: {loaded.returncode == 0}"


def commands(name: str, base: Path, folder: Path) -> list[str]:
    data, out = folder / "data", folder / "out"
    if name == "fedtune":
        # The recipe reads data/ beside itself.
        (folder / "app" / "data").symlink_to(data)
        return [
            sys.executable,
            "-m",
            "fedtune",
            "simulate",
            "recipe.toml",
            "--set",
            f"model.base={base}",
            "--out",
            f"{out}",
        ]
    if name == "NVFlare":
        return [sys.executable, "job.py", str(base), str(data), str(out)]
    settings = f"base='{base}' data='{data}' out='{out}'"
    sites = "num-supernodes=3 client-resources-num-cpus=1"
    return [program(name), "run", ".", "--stream", "--federation-config", sites, "--run-config", settings]


def job_environment(folder: Path) -> dict[str, str]:
    # The SuperLink of Flower's simulation belongs to this folder.
    return {**quiet(), "FLWR_HOME": str(folder / "flwr"), "PYTHONPATH": f"{folder / 'app'}{os.pathsep}{ROOT}"}


def end_processes(variable: str) -> None:
    """End what still runs with a variable in its environment: the SuperLink that `flwr run` has started and left."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if variable.encode() in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGTERM)


def write_rows(folder: Path) -> None:
    folder.mkdir()
    for site in range(3):
        text = "Site {} notes that item {} of its list is in order and that nothing else happened today."
        rows = [json.dumps({"text": text.format(site, row)}) for row in range(24)]
        (folder / f"site-{site}.jsonl").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
