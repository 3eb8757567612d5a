"""The code lines that a reader follows in one FedAvg round (method `fedit`), found by running one and watching it.

    python benchmarks/round_lines.py [--json | --check]

Runs two rounds of two clients over the embedded model in this process and notes every function of fedtune that is
entered between the start of round 1 and the start of round 2. Each counts with all its code lines: decorators,
signature and body, with branches not taken and functions inside it; docstrings, comments and blank lines do not count.

- "method and client training": functions of `methods/`, of the messages' module, and of all that is entered while
  `perform` works on a client's assignment.
- "whole": those, and functions and definitions of the loop, of the engine that hands messages over, of the wire format
  and of the admission of updates. "Definitions" are the classes and constants that the functions counted name
  themselves; a class counts without its methods, which count where they are entered, a protocol with them.

In neither: the vocabulary (seeds, tensors, adapters, errors, the base model's accessors), which is read once and not
in each round, and the modules around a round (planning, devices, config, journal, records, scores); see `AROUND`.
Nor what a round's record alone enters while it is written, after the round: the global model and the method's figures.
A file in no list counts, so new files do. `--check` exits with 1 above the limits. Of release 0.2.0 this counts 402 and
1291 lines; a count by hand of that release gave 415 and 1317.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import sys
import tempfile
import threading
import tokenize
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

RECORDERS = ("record_round",)
LIMITS = {"method and client training": 250, "whole": 900}

MINE = ("method", "client")
METHOD = ("methods/", "round.py", "tasks.py", "messages.py")
LOOP = (
    ("loop", ("rounds.py", "rounds/", "schedule.py", "timing.py", "transport.py", "simulation/inprocess.py")),
    ("admission", ("admit.py", "rounds/admission.py")),
    ("wire", ("wire/",)),
)
"""Groups beside the method's and the client's own: the longest prefix decides."""
AROUND = (
    # The vocabulary.
    *("errors.py", "seeds.py", "tensors.py", "adapter.py", "lowrank.py", "lora/", "keep.py", "ranking.py", "pruning/"),
    *("model/base.py", "model/libraries.py", "model/evaluate.py", "model/torch_seed.py"),
    # Around a round.
    *("methods/state.py", "methods/serialization.py", "planning/", "device.py", "cost.py", "devices/", "fleet.py"),
    *("config/", "conduct.py", "experiment.py", "runs/", "api.py", "data/", "store/", "report/", "site.py"),
)


@dataclass
class File:
    """What was entered of one file."""

    group: str
    functions: set[str] = field(default_factory=set)
    lines: set[int] = field(default_factory=set)
    definitions: dict[str, int] = field(default_factory=dict)
    """Code lines by name."""


class Watcher:
    """Notes the code that is entered, and whether `perform` was on the stack then; for `sys.settrace`."""

    def __init__(self, package: Path) -> None:
        self.folder, self.on, self.depth = f"{package}{os.sep}", False, 0
        self.entered: dict[CodeType, bool] = {}

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if not self.on or not code.co_filename.startswith(self.folder):
            return None
        if self.depth == 0 and recording(frame):
            return None
        performs = code.co_name == "perform"
        self.entered[code] = self.entered.get(code, False) or performs or self.depth > 0
        if not performs:
            return None
        self.depth += 1
        return self.left

    def left(self, frame: FrameType, event: str, arg: object) -> Any:
        self.depth -= event == "return"
        return self.left


def recording(frame: FrameType | None) -> bool:
    """Return whether a round's record is being written: `record_round`, in 0.2.0 `recorded`."""
    while frame is not None:
        if frame.f_code.co_name in RECORDERS:
            return True
        frame = frame.f_back
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is exceeded")
    args = parser.parse_args()
    package, entered = watched()
    files = counted(package, entered)
    mine = {name: file for name, file in files.items() if file.group in MINE}
    if not any(file.group == "client" for file in mine.values()):
        raise SystemExit("expected `perform` to be entered; got no client's work; name its entry point in `Watcher`")
    functions = sum(len(file.lines) for file in files.values())
    of_loop = sum(sum(file.definitions.values()) for file in files.values() if file.group not in MINE)
    totals = {
        "method and client training": total(sum(len(file.lines) for file in mine.values()), len(mine)),
        "whole": total(functions + of_loop, len(files)) | {"functions": functions},
    }
    for name, numbers in totals.items():
        numbers["limit"] = LIMITS[name]
    if args.json:
        listed = {
            name: {"group": f.group, "lines": len(f.lines), "functions": sorted(f.functions), **defined(f)}
            for name, f in files.items()
        }
        print(json.dumps({"totals": totals, "files": listed}, indent=2))
    else:
        show(files, totals)
    return int(args.check and any(numbers["lines"] > numbers["limit"] for numbers in totals.values()))


def total(lines: int, files: int) -> dict[str, int]:
    return {"lines": lines, "files": files}


def show(files: Mapping[str, File], totals: Mapping[str, Mapping[str, int]]) -> None:
    print(f"{'group':<10} {'file':<26} functions definitions")
    for name, file in sorted(files.items(), key=lambda item: (order(item[1].group), item[0])):
        print(f"{file.group:<10} {name:<26} {len(file.lines):>9} {sum(file.definitions.values()):>11}")
        print(f"{'':<11}{', '.join(sorted(file.functions) + sorted(file.definitions))}")
    for name, numbers in totals.items():
        print(f"{name}: {numbers['lines']} code lines in {numbers['files']} files (limit {numbers['limit']})")


def defined(file: File) -> Mapping[str, Any]:
    return {"definitions": dict(sorted(file.definitions.items()))}


def order(group: str) -> int:
    return [*MINE, "loop", "admission", "wire"].index(group)


def watched() -> tuple[Path, Mapping[CodeType, bool]]:
    """Run the small federation, and return the package's folder and what was entered: whether by a client."""
    from fedtune import api

    package = Path(api.__file__).parent
    watcher = Watcher(package)

    def watch(event: Any) -> None:
        if type(event).__name__ == "RoundStarted":
            watcher.on = event.round == 1

    with tempfile.TemporaryDirectory() as folder:
        rows = [{"text": f"def f{i}(x):\n    return x + {i}\n", "who": f"client-{i % 2}"} for i in range(8)]
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = {
            "name": "followed",
            "model": {"base": "embedded", "device": "cpu", "threads": 1},
            "adapter": {"rank": 2, "targets": ["q_proj", "v_proj"]},
            "method": {"name": "fedit"},
            "client": {"steps": 2, "batch": 2, "learning_rate": 0.01},
            "rounds": {"count": 2},
            "data": {"source": str(data), "split": {"kind": "key", "by": "who"}, "max_tokens": 32},
            "report": {"plots": False},
        }
        threading.settrace(watcher)
        sys.settrace(watcher)
        try:
            api.simulate(recipe, out=Path(folder) / "run", watch=watch)
        finally:
            sys.settrace(None)
            threading.settrace(None)
    return package, watcher.entered


def counted(package: Path, entered: Mapping[CodeType, bool]) -> Mapping[str, File]:
    """Return what counts, by file: functions that were entered, and the definitions that they name."""
    files: dict[str, File] = {}
    nodes: dict[str, list[ast.AST]] = defaultdict(list)
    for code, by_client in entered.items():
        path = Path(code.co_filename)
        name = path.relative_to(package).as_posix()
        function, group = function_of(path, code.co_firstlineno), group_of(name, by_client=by_client)
        if function is None or group is None:
            continue
        file = files.setdefault(name, File(group))
        file.functions.add(function.name)
        file.lines |= span(function) & code_lines(path)
        nodes[name].append(function)
    for name, functions in nodes.items():
        words = {node.id for function in functions for node in ast.walk(function) if isinstance(node, ast.Name)}
        words |= {node.attr for function in functions for node in ast.walk(function) if isinstance(node, ast.Attribute)}
        for word in words:
            for place in (name, imports(package / name).get(word)):
                if place in files and (node := definitions(package / place).get(word)) is not None:
                    size = len(span(node) & code_lines(package / place) - methods_of(node))
                    files[place].definitions[word] = size
    return files


def group_of(name: str, *, by_client: bool) -> str | None:
    """Return what a file counts as; None where it does not count. The longest prefix decides."""
    lists = (("method", METHOD), (None, AROUND), *LOOP)
    matches = [(len(prefix), group) for group, prefixes in lists for prefix in prefixes if name.startswith(prefix)]
    if matches:
        return max(matches, key=lambda match: match[0])[1]
    return "client" if by_client else "loop"


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def function_of(path: Path, line: int) -> ast.FunctionDef | None:
    """Return the innermost function that a line lies in; None for code of a module or class."""
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef) and line in span(node)]
    return min(functions, key=lambda node: len(span(node)), default=None)


def span(node: ast.AST) -> set[int]:
    """Return the numbers of a definition's lines, its decorators among them."""
    assert isinstance(node, ast.stmt)
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return set(range(first, (node.end_lineno or first) + 1))


def methods_of(node: ast.AST) -> set[int]:
    """Return the lines of a class's methods, which count where they are entered."""
    parts = node.body if isinstance(node, ast.ClassDef) else []
    protocol = isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "Protocol" for base in node.bases)
    return set().union(*(span(part) for part in parts if isinstance(part, ast.FunctionDef) and not protocol))


@cache
def definitions(path: Path) -> Mapping[str, ast.stmt]:
    """Return the classes and constants at the top of a module, by name."""
    named: dict[str, ast.stmt] = {}
    for node in tree(path).body:
        match node:
            case (
                ast.ClassDef(name=name)
                | ast.AnnAssign(target=ast.Name(id=name))
                | ast.Assign(targets=[ast.Name(id=name)])
            ):
                named[name] = node
    return named


@cache
def imports(path: Path) -> Mapping[str, str]:
    """Return the file, within the package, that each imported name comes from."""
    return {
        alias.asname or alias.name: "/".join(node.module.split(".")[1:]) + ".py"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


@cache
def code_lines(path: Path) -> frozenset[int]:
    """Return the numbers of the lines that hold code: no docstring, comment or blank line."""
    text = path.read_text()
    idle = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER}
    code = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in idle:
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code -= span(node)
    return frozenset(code)


if __name__ == "__main__":
    sys.exit(main())
