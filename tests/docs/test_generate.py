"""The generated pages say everything about every key and command, and no document has a broken link."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import pytest
from annotated_types import Ge, Interval

import fedtune
from docs import command_pages, edge_pages, generate, import_pages, schema_pages
from fedtune.config import fs_keys, key_facts, key_tables, units
from fedtune.config.key_facts import Key, Table
from fedtune.config.link import bind_link
from fedtune.config.reading import read
from fedtune.config.recipe import SECTIONS
from fedtune.config.rows import bind_device
from fedtune.errors import Fault
from fedtune.methods import METHODS
from fedtune.methods.method import LinearMethod, Method
from fedtune.methods.settings import LinearSettings
from fedtune.planning import PLANNERS
from fedtune.planning.planner import ClientObservation, PlannerInputs, PlannerType
from fedtune.rounds import record

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "site", "build", "dist", "node_modules"} & set(path.relative_to(ROOT).parts)
)

TABLES: dict[str, Sequence[Table]] = {
    **{f"recipe: {name}": tables for name, tables in key_tables.recipe_tables().items()},
    "site": key_tables.site_tables(),
    "server": key_tables.server_tables(),
}
KEYS = [
    pytest.param(key, id=f"{page}: {key.name}") for page, tables in TABLES.items() for t in tables for key in t.keys
]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_type_default_unit_and_text(key: Key) -> None:
    assert key.kind
    assert key.default
    assert len(key.text) > 5, f"{key.name}: expected a docstring under its field"
    assert ("number" in key.kind) == bool(key.unit), key


def test_every_key_that_a_recipe_binds_is_documented() -> None:
    documented = {key.name for tables in key_tables.recipe_tables().values() for table in tables for key in table.keys}
    tables = [*SECTIONS.items()]
    tables += [("method", method.settings) for method in METHODS.values()]
    tables += [("planner", kind.settings) for kind in PLANNERS.values()]
    expected = {f"{name}.{field.name}" for name, cls in tables for field in fields(cls)}
    # Tables in tables, of which the keys are documented.
    expected -= {"data.split", "method.robust", "method.server_optimizer"}
    assert expected <= documented
    assert {"method.name", "method.server_optimizer.name", "planner.name"} <= documented
    assert {"name", "seed", "data.split.kind", "override.rank", "override.threads", "device.memory_gb"} <= documented


def test_every_key_of_a_real_recipe_is_documented() -> None:
    documented = {key.name for tables in key_tables.recipe_tables().values() for table in tables for key in table.keys}
    for path in sorted((ROOT / "simulations").rglob("*.toml")):
        _, _, _, tables = read(path)
        assert set(written(tables)) <= documented | {"planner", "method", "data.split"}, path


def recipe_keys() -> set[str]:
    return {key.name for page, tables in TABLES.items() if page.startswith("recipe") for t in tables for key in t.keys}


def written(tables: object, path: str = "") -> Iterator[str]:
    """Yield the dotted keys of a file's tables."""
    assert isinstance(tables, dict)
    for name, value in tables.items():
        where = f"{path}.{name}" if path else name
        if isinstance(value, dict) and where not in ("data.fields", "search.space"):
            yield from written(value, where)
        elif name in ("override", "device"):
            for row in value:
                yield from written(row, name)
        else:
            yield where


@pytest.mark.parametrize(("name", "bounds"), units.DEVICE_RANGES.items())
def test_the_ranges_shown_of_a_device_are_those_that_bind(name: str, bounds: str) -> None:
    def refused(value: float) -> bool:
        faults: list[Fault] = []
        shown = (value,) if name == "modes" else value
        bind_device({"clients": "a", name: shown}, "device", faults)
        return bool(faults)

    for bound in bounds.split(" and "):
        sign, limit = bound.split()
        outside = -1e-6 if sign in ("≥", ">") else 1e-6
        assert refused(float(limit) + outside), bound
        assert refused(float(limit)) == (sign == ">"), bound


def test_the_defaults_shown_are_those_that_bind() -> None:
    settings, _ = bind_link(None)
    shown = {key.name: key.default for key in key_tables.server_tables()[0].keys}
    assert shown["link.hold_s"] == str(settings.hold_s)
    assert shown["link.metrics_names"] == "false"
    assert shown["link.listen"] == f'"{settings.listen}"'


def test_types_and_ranges_are_put_into_words() -> None:
    assert key_facts.kind_of(Annotated[int, Ge(1)] | None) == "whole number or none"
    assert key_facts.range_of(Annotated[float, Interval(ge=0, lt=1)] | None) == "≥ 0 and < 1"
    assert units.unit_of("timeout_s", float) == "seconds"
    with pytest.raises(KeyError, match="expected a unit"):
        units.unit_of("furlongs", float)


def test_every_command_has_a_page_with_all_its_options() -> None:
    pages = generated_pages()
    commands = dict(command_pages.commands())
    assert {"fedtune simulate", "fedtune runs list", "fedtune enroll sign"} <= set(commands)
    for name, command in commands.items():
        page = pages[f"reference/commands/{generate.command_file(name)}"]
        assert page.startswith(f"# {name}\n")
        assert command.help
        for param in command.params:
            assert getattr(param, "help", None), f"{name}: expected a help text for {param.name}"
            assert all(option in page for option in param.opts if option.startswith("-"))


def test_the_first_page_of_commands_lists_every_one() -> None:
    index = (ROOT / "docs" / "reference" / "commands" / "index.md").read_text()
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", index))
    assert listed == {generate.command_file(name) for name in dict(command_pages.commands())}


def test_every_command_of_a_device_is_on_its_page_with_all_its_options() -> None:
    page = edge_pages.edge_page()
    for name, own in edge_pages.subparsers().items():
        part = page.split(f"## fedtune-edge {name}\n")[1].split("\n## ")[0]
        for action in edge_pages.options_of(own):
            assert action.help, f"{name} {action.dest}: expected a help text"
            assert action.help in part
            assert all(f"`{option}" in part for option in action.option_strings)


def test_every_number_of_the_schema_is_listed() -> None:
    table = schema_pages.enum_table("link.proto", "Reason")
    assert "| 33 | `RECIPE_DIFFERS` |" in table
    assert "UNSET" not in table
    blocks = schema_pages.message_blocks("round.proto")
    assert all(f"### {name}" in blocks for name in ("Assignment", "ClientUpdate", "ProbeUpdate"))
    assert "`RoundError`" in schema_pages.exception_table()


def test_every_key_of_a_round_is_listed() -> None:
    table = schema_pages.record_table("RoundRecord")
    assert "| `aside` | Replies" in table  # the key in the line, where the field has another name
    assert "|parameter" not in schema_pages.record_table("ClientRecord").replace("\\|", "")
    for name, cls in (("RoundRecord", record.RoundRecord), ("ClientRecord", record.ClientRecord)):
        assert schema_pages.record_table(name).count("\n") == len(fields(cls)) + 1


# ---- Python ----

PYTHON_PAGE = (ROOT / "docs" / "reference" / "python.md").read_text()


LISTED = {
    module: members.split(", ")
    for module, members in re.findall(
        r"^::: ([\w.]+)\n    options:\n      members: \[(.*)\]$", PYTHON_PAGE, re.MULTILINE
    )
}
"""Members by module, as the page lists them."""
NOT_EXPLAINED = {"Fault", "ModelStructure"}
"""Types of parts that few extensions use."""


def test_every_public_name_has_an_entry() -> None:
    shown = re.findall(r"^::: fedtune\.(\w+)$(?!\n    options)", PYTHON_PAGE, re.MULTILINE)
    assert sorted(shown) == sorted({*fedtune.__all__} - {"site"})
    assert "::: fedtune.client.site\n    options" in PYTHON_PAGE  # the module that fedtune.site is


@pytest.mark.parametrize("module", LISTED)
def test_listed_members_exist(module: str) -> None:
    assert not [name for name in LISTED[module] if not hasattr(import_module(module), name)]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("fedtune.methods.method", "Method"),
        ("fedtune.methods.method", "LinearMethod"),
        ("fedtune.planning.planner", "Planner"),
        ("fedtune.planning.planner", "ClientObservation"),
    ],
)
def test_what_an_extension_implements_is_listed_with_the_types_in_it(module: str, name: str) -> None:
    """A type in a signature that the page does not explain sends its reader to the source."""
    assert name in LISTED[module]
    cls = getattr(import_module(module), name)
    members = [*get_type_hints(cls).values()]
    members += [hint for _, function in inspect.getmembers(cls, inspect.isfunction) for hint in hints_of(function)]
    named = {cls.__name__ for hint in members for cls in classes_in(hint) if cls.__module__.startswith("fedtune.")}
    explained = {member for members in LISTED.values() for member in members}
    assert not named - explained - NOT_EXPLAINED


def hints_of(function: Any) -> list[Any]:
    return list(get_type_hints(function).values())


def classes_in(hint: Any) -> Iterator[type]:
    """Yield the classes that a type names, those inside it included."""
    if isinstance(hint, type):
        yield hint
    for part in get_args(hint):
        for inner in part if isinstance(part, list) else [part]:
            yield from classes_in(inner)


# ---- documents ----


@cache
def generated_pages() -> Mapping[str, str]:
    """Return the generated pages: made once, since each of sixty documents is held against all of them."""
    return generate.generated_pages()


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Return the anchors of a Markdown text's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles]
    return {re.sub(r"\s+", "-", title) for title in plain}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    pages = generated_pages()
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = Path(os.path.normpath(path.parent / name)) if name else path
        generated = str(target.relative_to(ROOT / "docs")) if target.is_relative_to(ROOT / "docs") else ""
        if generated in pages:
            text = pages[generated]
        elif generated == "changelog.md":
            text = (ROOT / "CHANGELOG.md").read_text()
        else:
            assert target.exists(), f"{path.relative_to(ROOT)}: {link} leads nowhere"
            text = target.read_text() if anchor else ""
        if anchor and not anchor.startswith("fedtune."):  # those mkdocstrings makes; the strict build checks them
            assert anchor in anchors(text), f"{path.relative_to(ROOT)}: {link}: no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_document_names_exist(path: Path) -> None:
    if path.name == "CHANGELOG.md":
        return  # names what was there at the time
    folders = "fedtune|tests|server|clients|simulations|proto|benchmarks|docs"
    names = re.findall(rf"`((?:{folders})/[\w./-]+)`", path.read_text())
    assert not [name for name in names if not (ROOT / name).exists() and not (path.parent / name).exists()], (
        path.relative_to(ROOT)
    )


def command_lines(text: str) -> Iterator[list[str]]:
    """Yield the calls of fedtune in the code blocks of a document, as words."""
    for block in re.findall(r"^```(?:bash|)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(("fedtune ", "fedtune-edge ")):
                yield shlex.split(line, comments=True)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_a_document_shows_exist_with_their_options(path: Path) -> None:
    if path.name == "CHANGELOG.md":
        return
    known = dict(command_pages.commands())
    for words in command_lines(path.read_text()):
        if words[0] == "fedtune-edge":
            own = edge_pages.subparsers().get(words[1])
            assert own, f"{path.relative_to(ROOT)}: {' '.join(words)}: no such command"
            options = {option for action in own._actions for option in action.option_strings}
            unknown = [word for word in words if word.startswith("--") and word not in options]
            assert not unknown, f"{path.relative_to(ROOT)}: {' '.join(words)}: no option {unknown}"
            continue
        name = next((" ".join(words[:size]) for size in (3, 2) if " ".join(words[:size]) in known), None)
        if words[1].startswith("-"):
            continue  # `fedtune --version` and its like
        assert name, f"{path.relative_to(ROOT)}: {' '.join(words)}: no such command"
        options = {option for param in known[name].params for option in param.opts} | {"--help"}
        unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in options]
        assert not unknown, f"{path.relative_to(ROOT)}: {' '.join(words)}: no option {unknown}"


def test_the_recipes_of_robust_rules_bind() -> None:
    readme = re.search(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert readme
    tables = {**tomllib.loads(readme.group(1)), "override": []}
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "how-to" / "robust.md").read_text(), re.DOTALL)
    methods = [fedtune.bind(tables | tomllib.loads(block)).method for block in blocks]
    assert [method.robust.name for method in methods if isinstance(method, LinearSettings)] == ["clip", "multikrum"]


def test_the_recipes_of_server_optimizers_bind() -> None:
    readme = re.search(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert readme
    tables = tomllib.loads(readme.group(1))
    page = (ROOT / "docs" / "how-to" / "server-optimizers.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        recipe = {**tables, "override": [], "method": "fedit"} | tomllib.loads(block)
        bound = fedtune.bind(recipe)
        assert isinstance(bound.method, LinearSettings)
        assert (bound.client.proximal, bound.method.server_optimizer.name) in (
            (0.1, "none"),
            (0.0, "fedadam"),
            (0.0, "none"),
        )
    assert bound.rounds.schedule == "cosine"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def test_pictures_are_small() -> None:
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert pictures
    assert all(picture.stat().st_size <= 150_000 for picture in pictures)


def test_the_recipe_of_the_readme_binds() -> None:
    block = re.search(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    assert fedtune.bind(block.group(1)).rounds.count > 0


def test_the_site_builds_strictly_and_asks_nothing_of_other_hosts(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        foreign = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*", page.read_text()
        )
        assert not foreign, f"{page.relative_to(site)}: {foreign}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text()), sheet.name
    for name in ("reference/recipe/client.html", "reference/commands/simulate.html", "search/search_index.js"):
        assert (site / name).is_file()
    python = (site / "reference" / "python.html").read_text()
    assert "fedtune.simulate" in python
    for cls in (Method, LinearMethod, PlannerType, PlannerInputs, ClientObservation):
        own = [field.name for field in fields(cls) if field.name in vars(cls).get("__annotations__", ())]
        missing = [name for name in own if f'id="{cls.__module__}.{cls.__name__}.{name}"' not in python]
        assert not missing, f"docs/reference/python.md: expected every field of {cls.__name__}; missing {missing}"
    assert all(f'id="fedtune.planning.planner.Planner.{name}"' in python for name in ("start", "plan", "observe"))
    for topic, name in (("method", "MedianSettings"), ("planner", "ByExamplesSettings"), ("data", "proverbs")):
        # ruff formats code blocks of documents, and would turn an included file into an expression.
        assert name in re.sub(r"<[^>]*>", "", (site / "tutorials" / f"own-{topic}.html").read_text())


def test_the_page_of_federatedscopes_keys_has_each_key_of_the_converter() -> None:
    shown = re.findall(r"^\| `([^`]+)` \|", import_pages.import_table(), flags=re.MULTILINE)
    groups = [f"{start}*" if start.endswith(".") else start for start in fs_keys.GROUPS]
    assert shown == [*(key for keys in import_pages.SECTIONS.values() for key in keys), *groups]
    assert {key for keys in import_pages.SECTIONS.values() for key in keys} == fs_keys.KEYS.keys()
