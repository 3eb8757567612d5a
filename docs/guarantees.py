"""The table of guarantees: what each states, which tests show it, and how many cases of them ran.

Tests are read from their marks, counts from `guarantees.json`, which `make guarantees` writes.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
RECORD = Path(__file__).with_name("guarantees.json")


@dataclass(frozen=True)
class Guarantee:
    """A row of the table."""

    title: str
    statement: str
    """What a test of it must show."""
    goal: str
    """Cases wanted; `full` means the full tier, the rest is wanted of every change."""
    built: bool = True


GUARANTEES: Mapping[str, Guarantee] = {
    "G1": Guarantee(
        "Received bytes never execute code",
        "No module imports or calls what can run code from data; changed messages cause no import, no compilation, no "
        "process and no connection.",
        "10,000; full: 1,000,000",
    ),
    "G2": Guarantee(
        "Memory and time of a message are bounded",
        "Messages that promise or hold too much grow the memory by no more than twice the limit and end in a refusal.",
        "40 classes",
    ),
    "G3": Guarantee(
        "A refused update has no effect",
        "The state after valid and refused updates equals, bit for bit, the state after the valid ones alone.",
        "each reason, 200 times",
    ),
    "G4": Guarantee(
        "Influence is bounded",
        "With a fifth of attackers the aggregate stays within 2 f C of the honest one; impossible weights are refused.",
        "6 attacks, 50 seeds each",
    ),
    "G5": Guarantee(
        "Repeated, swapped and late replies are safe",
        "In any order of calls, restarts included, each client's update counts at most once in a round.",
        "10,000",
    ),
    "G6": Guarantee(
        "Only enrolled parties take part, as themselves",
        "Wrong, missing, ended and revoked certificates, names of others, changed and captured calls are refused.",
        "10 cases for each call",
    ),
    "G7": Guarantee("The secure sum is exact", "", "1,000", built=False),
    "G8": Guarantee("A deviating server gains nothing", "", "19 deviations, 20 times", built=False),
    "G9": Guarantee("Masks are cryptographic", "", "test vectors and 4 statistics", built=False),
    "G10": Guarantee("Modes are honest", "", "12 refusals and 30 sketches", built=False),
    "G11": Guarantee("Differential privacy holds as claimed", "", "30, 100,000 and 1,000", built=False),
    "G12": Guarantee(
        "Crash safe, bit for bit",
        "A run that is killed at any step that touches the disk, also while it recovers, ends in the same bytes.",
        "192; full: each step, 200 real kills",
    ),
    "G13": Guarantee(
        "A client's crash costs nothing twice",
        "A client that was killed sends the same bytes again, and trains nothing twice.",
        "5 stages, 20 times",
    ),
    "G14": Guarantee(
        "Partitions and stragglers",
        "Over a network that cuts, delays, changes and swallows bytes a run ends with the right state.",
        "full: 50",
    ),
    "G15": Guarantee(
        "A full disk",
        "A run whose disk is full at any write stops clearly, with a valid journal, and goes on when there is space.",
        "each write",
    ),
    "G16": Guarantee("Clocks that differ", "A run completes where clocks differ by an hour, each way.", "4"),
    "G17": Guarantee(
        "A wrong base is refused",
        "A base that differs by one bit of its weights, or in their format, is refused before training. Tokenizer and "
        "chat template are no part of the digest.",
        "5",
    ),
    "G18": Guarantee(
        "Logs show tampering",
        "Flipped bits, and entries that are left out, moved or cut off, are found.",
        "1,000",
    ),
    "G19": Guarantee(
        "Provenance",
        "Any flipped byte of a result, its manifest or its signature is found, and so is a signer who may not sign.",
        "1,000 and 3 signers",
    ),
    "G20": Guarantee("One writer", "A second server is refused, and one that was overtaken cannot commit.", "2"),
    "G21": Guarantee(
        "Endurance",
        "Under kills, partitions and bad clients memory does not grow, and every committed round can be verified.",
        "full: 20 minutes",
    ),
}


def marked_tests(folder: Path = TESTS) -> Mapping[str, set[str]]:
    """Return the tests by guarantee, as their marks say: `path::name`, the path from the folder of tests."""
    result: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("test_*.py")):
        for test, names in marks(ast.parse(path.read_text())):
            for name in names:
                result.setdefault(name, set()).add(f"{path.relative_to(folder).as_posix()}::{test}")
    return result


def marks(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """Yield each marked test of a module with the guarantees that it shows, by its own marks or by `pytestmark`."""
    common = [node.value for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            names = [name for mark in [*node.decorator_list, *common] for name in names_of(mark)]
            if names:
                yield node.name, names


def names_of(part: ast.AST) -> Iterator[str]:
    """Yield what the marks `guarantee` in a part of a source name."""
    for node in ast.walk(part):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.guarantee":
            yield from map(ast.literal_eval, node.args)


def read_record(path: Path = RECORD) -> Mapping[str, Any]:
    """Return what the last runs of marked tests counted."""
    record: Mapping[str, Any] = json.loads(path.read_text())
    return record


def guarantees_page(record: Mapping[str, Any], tests: Mapping[str, set[str]]) -> str:
    """Return the page: a table of all guarantees, then the tests of each."""
    lines = [
        "# Guarantees",
        "",
        "What the [security model](security.md) promises, and the tests that show it. A count is of cases that ran and "
        f"passed in the runs of release {record['release']}, commit `{record['commit']}`: of kills, of "
        "changed messages, of orders of calls, and so on. *Wanted* is what the design asks for; where a count is below "
        "it, the guarantee is shown for these cases only.",
        "",
        "| | Guarantee | Wanted | Every change | Full tier in all | Tests |",
        "|---|---|---|---|---|---|",
    ]
    for name, guarantee in GUARANTEES.items():
        counts = [record["guarantees"].get(name, {}).get(test, {}) for test in sorted(tests.get(name, ()))]
        fast = sum(count.get("fast", 0) for count in counts)
        full = fast + sum(count.get("full", 0) for count in counts)
        cells = (
            [f"{fast:,}", f"{full:,}", f"[{len(counts)}](#{name.lower()})"] if guarantee.built else ["not built"] * 3
        )
        lines.append(f"| {name} | {guarantee.title} | {' | '.join([guarantee.goal, *cells])} |")
    for name, guarantee in GUARANTEES.items():
        if guarantee.built:
            counts = record["guarantees"].get(name, {})
            rows = [test_row(test, counts.get(test)) for test in sorted(tests.get(name, ()))]
            lines += ["", f"## {name}", "", f"{guarantee.title}. {guarantee.statement}", ""]
            lines += ["| Test | Every change | Full tier in all |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def test_row(test: str, counts: Mapping[str, int] | None) -> str:
    """Return the row of one test."""
    path, _, name = test.partition("::")
    cell = f"{name.removeprefix('test_').replace('_', ' ')}<br>`tests/{path}`"
    if counts is None:
        return f"| {cell} | not measured yet | not measured yet |"
    fast = counts.get("fast", 0)
    return f"| {cell} | {fast:,} | {fast + counts.get('full', 0):,} |"
