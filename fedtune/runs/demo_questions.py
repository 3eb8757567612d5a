"""The demo's federation of questions: what functions of Python's standard library do, by their own documentation."""

from __future__ import annotations

import ast
import json
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.runs.demo_code import CLIENTS, rank_overrides

ASKED: Mapping[str, Sequence[str]] = {
    "random": ["Random.choice", "Random.shuffle"],
    "shutil": ["move", "copytree", "rmtree"],
    "queue": ["Queue.put_nowait", "Queue.get_nowait"],
}
"""By module, the functions that the model is asked about before and after: of each module the first that this Python
documents. No client holds a row of these modules."""

WORDS = range(3, 17)
"""Words of an answer."""
ARGUMENTS = 4
"""Arguments that a question names at most."""
RANK = 8
"""The recipe's default rank; clients of this rank need no override."""


@dataclass(frozen=True)
class Documented:
    """A function and what its documentation says first."""

    name: str
    """Dotted, from the module on, without submodules: `logging.Logger.setLevel`."""
    arguments: Sequence[str]
    sentence: str

    @property
    def question(self) -> str:
        """What a user might ask, in as few words as training can afford."""
        shown = [*self.arguments[:ARGUMENTS], *["..."] * (len(self.arguments) > ARGUMENTS)]
        return f"What does {self.name}({', '.join(shown)}) do?"


def write_questions(folder: Path) -> Path:
    """Write one file `<client>.jsonl` with rows {"instruction": ..., "output": ...} per client, and return the folder.

    No question and no answer stands in two rows, of one client or of two, nor in `questions_asked`: what is held out is
    not trained on under another name. The same Python writes the same rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seen = {key for item in questions_asked() for key in (item.question, plain(item.sentence))}
    for client in CLIENTS:
        rows = []
        for item in functions_of(client):
            keys = {item.question, plain(item.sentence)}
            if not keys & seen:
                row = {"instruction": item.question, "output": item.sentence}
                rows.append(json.dumps(row, ensure_ascii=False) + "\n")
            seen |= keys
        (folder / f"{client}.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


def questions_asked() -> Sequence[Documented]:
    """Return one function for each module of `ASKED`, as far as this Python documents one."""
    asked = []
    for module, names in ASKED.items():
        known = {item.name: item for item in functions_of(module)}
        asked += [known[f"{module}.{name}"] for name in names if f"{module}.{name}" in known][:1]
    return asked


def functions_of(module: str) -> Iterator[Documented]:
    """Yield the public functions and methods of a standard-library module that have a docstring to learn from.

    Nothing is imported: the files are read.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted((root / module).rglob("*.py")) or [root / f"{module}.py"]
    for file in files:
        if not {"test", "tests"} & {*file.relative_to(root).parts}:
            yield from functions(ast.parse(file.read_bytes()), module)


def functions(node: ast.AST, owner: str) -> Iterator[Documented]:
    r"""Yield the documented public functions below a module or class.

    >>> source = "def move(src, dst):\n    '''Move a file. Slowly.'''"
    >>> [(item.question, item.sentence) for item in functions(ast.parse(source), "shutil")]
    [('What does shutil.move(src, dst) do?', 'Move a file.')]
    """
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.ClassDef(name=name) if not name.startswith("_"):
                yield from functions(child, f"{owner}.{name}")
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) if not name.startswith("_"):
                if sentence := first_sentence(ast.get_docstring(child) or ""):
                    parts = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
                    names = [part.arg for part in parts if part.arg not in ("self", "cls") and part.arg[0] != "_"]
                    yield Documented(f"{owner}.{name}", names, sentence)


def first_sentence(docstring: str) -> str:
    r"""Return a docstring's first sentence, or nothing if it has no end, too few words or too many.

    >>> first_sentence("Return the number\n    of items. See also below.")
    'Return the number of items.'
    """
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.match(r".+?\.(?=\s|$)", paragraph)
    return sentence[0] if sentence and len(sentence[0].split()) in WORDS else ""


def plain(text: str) -> str:
    """Return a text without what two sentences may differ in and still be the same: case and marks.

    >>> plain("Return `x`.") == plain("return X")
    True
    """
    return " ".join(re.findall(r"\w+", text.lower()))


def recipe_text(base: Path) -> str:
    """Return the recipe for a base that speaks: TOML with a comment on every line that a user may want to change."""
    asked = questions_asked()
    lists = {
        "PROMPTS": [json.dumps(item.question) for item in asked],
        "REFERENCES": [json.dumps(item.sentence, ensure_ascii=False) for item in asked],
    }
    # Worker processes share the base's memory, which takes Linux.
    engine = '"processes"' if sys.platform == "linux" else '"inprocess"'
    text = RECIPE.replace("BASE", json.dumps(str(base))).replace("ENGINE", f"{engine:12}")
    for name, lines in lists.items():
        text = text.replace(name, "".join(f"\n    {line}," for line in lines) + "\n")
    return text + rank_overrides(CLIENTS, RANK)


RECIPE = f"""\
# A federation on one machine. Run it with: fedtune simulate <this file>
# Relative paths are relative to this file. Any value can be changed for one run: --set rounds.count=8

name = "demo"                        # the run is written to runs/<name>
seed = 0                             # same seed, same machine: same result, bit for bit

[model]
base = BASE
threads = 1                          # CPU threads of each client; another number changes the last bits

[adapter]
rank = {RANK}                             # of every client that no override below names
alpha = "2r"                         # LoRA scale alpha / rank: 2 for every rank
targets = ["q_proj", "v_proj"]       # or ["all-linear"]

[method]
name = "flora"                       # exact sums of mixed ranks; also: fedit, ffa, zeropad, hetlora, flexlora, fedex

[client]                             # what each client does in each round
steps = 3
batch = 2
learning_rate = 5e-3

[rounds]
count = 2

[data]
source = "data/*.jsonl"              # rows with instruction, input and output, or with text (map them with fields)
template = "auto"                    # the tokenizer's own chat template
max_tokens = 96                      # longer examples are cut
held_out = 0.03                      # share of each client's rows that is never trained on and scores the result
split = {{ kind = "files" }}           # one client per file; also: key, iid, dirichlet, sizes

[engine]
name = ENGINE              # inprocess: one client after the other; ray: Flower's simulation engine; same bits

[evaluate]
every = 0                            # score before the first round and after the last; 1: after every round too
new_tokens = 32                      # longest answer
# Questions that are answered before and after, and good answers to score these by; no client has a row about them.
prompts = [PROMPTS]
references = [REFERENCES]

# Clients of other ranks: what each can carry.
"""
