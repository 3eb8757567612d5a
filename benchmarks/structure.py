"""The structure of the source tree, read from its syntax alone: rooms, floors, arrows, circles, sizes and comments.

    python benchmarks/structure.py [--root FOLDER] [--json]

A room is a folder of the package with its modules; a module directly below the package is a room of its own, the
package's `__init__` among them. A subfolder with fewer than three hand-written modules belongs to the folder above it.
`benchmarks/` is one room more, above all others; tests are left out. An arrow goes from one room to another if any
module of the first imports any of the second, wherever the import is: at the top, inside a function, or for type
checkers only (arrows that exist through the last two kinds alone are listed as "lazy"). Floors are the rooms on the
longest chain of arrows. A circle is a largest set of rooms, or of modules, each of which reaches all others.

A code line holds a token other than a comment, outside docstrings (of modules, classes, functions and fields).
A comment line holds a comment and nothing else; comments at the end of a code line are counted on their own.
A function runs from its first decorator to its last line, functions inside it included. Generated code counts in
no size.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

PACKAGE = "fedtune"
IDLE = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="folder that holds the package")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    numbers = structure(args.root)
    if args.json:
        print(json.dumps(numbers, indent=2))
        return
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            print(f"{name}:")
            for part, number in value.items():
                print(f"  {part:<44} {number:>8}")
        else:
            print(f"{name:<46} {json.dumps(value):>8}")


def structure(root: Path) -> Mapping[str, Any]:
    """Return every number by its name; see the module's docstring for what each counts."""
    files = {dotted(path, root): path for path in sorted((root / PACKAGE).rglob("*.py"))}
    scripts = {dotted(path, root): path for path in sorted((root / "benchmarks").glob("*.py"))}
    rooms = {name: room(path, root) for name, path in files.items()} | dict.fromkeys(scripts, "benchmarks")
    imports = {name: list(imported(path, rooms)) for name, path in (files | scripts).items()}
    arrows = {(rooms[a], rooms[b]) for a, names in imports.items() for b, _ in names} - {(r, r) for r in rooms.values()}
    eager = {(rooms[a], rooms[b]) for a, names in imports.items() for b, at_top in names if at_top}
    written = {name: path for name, path in files.items() if not path.stem.endswith("_pb2")}
    counts = {name: lines(path.read_text()) for name, path in written.items()}
    functions = [size for path in written.values() for size in function_sizes(path.read_text())]
    per_room = defaultdict[str, list[str]](list)
    for name in written:
        per_room[rooms[name] if rooms[name] not in files_below(root) else "(directly below)"].append(name)
    sizes = [len(code) for code, _ in counts.values() if code]
    return {
        "rooms": len(set(rooms.values())),
        "floors": max(depths(arrows).values()),
        "arrows between rooms": len(arrows),
        "of these lazy": len(arrows - eager),
        "rooms, floors, arrows of the package alone": package_alone(arrows, set(rooms.values())),
        "modules directly below the package": len(files_below(root)),
        "circles of rooms": circles(arrows),
        "circles of modules": circles({(a, b) for a, names in imports.items() for b, _ in names if a != b}),
        "files with code": len(sizes),
        "code lines": sum(sizes),
        "code lines of a file, median": median(sizes),
        "code lines of a file, maximum": max(sizes),
        "code lines of a function, median": median(functions),
        "code lines of a function, maximum": max(functions),
        "README kB": round((root / "README.md").stat().st_size / 1000, 1),
        "documentation pages": len(list((root / "docs").rglob("*.md"))),
        "comments at line ends per 100 code lines": per_100((code, notes & code) for code, notes in counts.values()),
        "comment lines per 100 code lines": per_100((code, notes - code) for code, notes in counts.values()),
        "comment lines per 100 code lines, by room": {
            name: per_100((counts[module][0], counts[module][1] - counts[module][0]) for module in modules)
            for name, modules in sorted(per_room.items())
        },
    }


def dotted(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def files_below(root: Path) -> set[str]:
    return {path.stem for path in (root / PACKAGE).glob("*.py")}


def room(path: Path, root: Path) -> str:
    """Return the folder that a module belongs to, or its own name directly below the package."""
    folder = path.parent
    if folder == root / PACKAGE:
        return path.stem
    while folder.parent != root / PACKAGE and len(modules_of(folder)) < 3:
        folder = folder.parent
    return folder.relative_to(root / PACKAGE).as_posix()


def modules_of(folder: Path) -> Sequence[Path]:
    return [path for path in folder.glob("*.py") if path.stem != "__init__" and not path.stem.endswith("_pb2")]


def imported(path: Path, known: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """Yield the modules of this tree that a file imports, and whether at the top and not for type checkers only."""
    tree = ast.parse(path.read_text(), str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        at_top = node in tree.body
        for name in names:
            # `from package.module import name` names the module, or something in it.
            target = name if name in known else name.rpartition(".")[0]
            if target in known:
                yield target, at_top


def depths(arrows: set[tuple[str, str]]) -> Mapping[str, int]:
    """Return by room the rooms on the longest chain of arrows down from it; rooms of a circle count as one floor."""
    reach = reachable(arrows)
    depth: dict[str, int] = {}

    def below(name: str) -> int:
        if name not in depth:
            circle = {name} | {other for other in reach[name] if name in reach[other]}
            depth[name] = 1 + max((below(b) for a, b in arrows if a in circle and b not in circle), default=0)
        return depth[name]

    for name in reach:
        below(name)
    return depth


def reachable(arrows: set[tuple[str, str]]) -> Mapping[str, set[str]]:
    """Return by node all that can be reached from it along at least one arrow."""
    ahead = defaultdict[str, set[str]](set)
    for a, b in arrows:
        ahead[a].add(b)
    reach: dict[str, set[str]] = {}
    for name in {node for arrow in arrows for node in arrow}:
        seen, todo = set[str](), [name]
        while todo:
            new = ahead[todo.pop()] - seen
            seen |= new
            todo += new
        reach[name] = seen
    return reach


def circles(arrows: set[tuple[str, str]]) -> Sequence[Sequence[str]]:
    reach = reachable(arrows)
    sets = {frozenset(other for other in reach[name] if name in reach[other]) for name in reach if name in reach[name]}
    return sorted(sorted(names) for names in sets)


def package_alone(arrows: set[tuple[str, str]], rooms: set[str]) -> Sequence[int]:
    inside = {(a, b) for a, b in arrows if a != "benchmarks"}
    return [len(rooms - {"benchmarks"}), max(depths(inside).values()), len(inside)]


def lines(text: str) -> tuple[set[int], set[int]]:
    """Return the numbers of a text's code lines, and of all its lines with a comment."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documented |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    code, comments = set[int](), set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in IDLE:
            code |= set(range(token.start[0], token.end[0] + 1))
    return code - documented, comments


def function_sizes(text: str) -> Iterator[int]:
    code, _ = lines(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield len(code & set(range(first, (node.end_lineno or first) + 1)))


def per_100(counts: Iterable[tuple[set[int], set[int]]]) -> float:
    pairs = list(counts)
    code = sum(len(lines) for lines, _ in pairs)
    return round(100 * sum(len(comments) for _, comments in pairs) / code, 1) if code else 0.0


if __name__ == "__main__":
    main()
