"""The rules on words: field terms and plain English, in names, prose and pages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = sorted(path for path in (ROOT / "fedtune").rglob("*.py") if path.parent.name != "v1")
PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "site", "node_modules"} & set(path.parts))
BANNED = re.compile(r"\b(told|whoever|nobody|comes? to|came to|stands? for)\b", re.IGNORECASE)
VAGUE = {"found", "made", "each", "one", "held", "kept", "told"}
IRREGULAR = (
    r"told|made|held|kept|drawn|begun|spent|heard|known|shown|given|taken|sent|built|said|done|found|seen|written"
)
PARTICIPLE = re.compile(rf"_*({IRREGULAR}|(?!seed|speed|embed|need|feed|exceed|proceed)[a-z]+ed)")


def faults(path: Path) -> Iterator[str]:
    """Yield every name and text of a module that breaks a rule, with its line."""
    source = path.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(source)))
    loops = [node for node in nodes if isinstance(node, ast.comprehension)]
    inside = {id(name) for loop in loops for name in ast.walk(loop.target)}
    for node in nodes:
        match node:
            case ast.FunctionDef(name=name, decorator_list=marks) if PARTICIPLE.fullmatch(name):
                if not any("property" in ast.dump(mark) for mark in marks):
                    yield f"{path}:{node.lineno}: function {name!r}: expected a verb, or what it returns"
            case ast.Name(id=name, ctx=ast.Store()) if name in VAGUE and id(node) not in inside:
                yield f"{path}:{node.lineno}: variable {name!r}: expected a name that says what it is"
            case ast.Constant(value=str(text)) if word := BANNED.search(text):
                yield f"{path}:{node.lineno}: {word[0]!r}: expected plain present-day English"
    for number, line in enumerate(source.splitlines(), 1):
        if word := BANNED.search(line.partition("#")[2]):
            yield f"{path}:{number}: {word[0]!r} in a comment"


def test_names_and_prose_use_the_words_of_the_field() -> None:
    assert not (wrong := [fault for path in CODE for fault in faults(path)]), "\n".join(wrong)


def test_pages_are_plain_english() -> None:
    assert not [f"{page}: {word[0]!r}" for page in PAGES if (word := BANNED.search(page.read_text(encoding="utf-8")))]
