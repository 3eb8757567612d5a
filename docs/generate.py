"""The pages of the site that are read from the code: settings, commands, messages and errors.

mkdocs loads this file as a hook (`mkdocs.yml`). Run it as `python -m mkdocs` from the repository's root, where it finds
the modules beside it. Nothing that it generates is committed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.command_pages import command_page, commands
from docs.data_pages import preset_table
from docs.edge_pages import edge_page
from docs.guarantees import guarantees_page, marked_tests, read_record
from docs.import_pages import import_table
from docs.notebook_pages import notebook_page
from docs.schema_pages import enum_table, exception_table, message_blocks, record_table
from docs.settings_pages import RECIPE_INTRODUCTIONS, settings_page
from fedtune.config.key_tables import recipe_tables, server_tables, site_tables

ROOT = Path(__file__).parents[1]

MARKERS: Mapping[str, Any] = {
    "enum": enum_table,
    "messages": message_blocks,
    "exceptions": exception_table,
    "record": record_table,
    "presets": preset_table,
    "import": import_table,
}
"""What a line `[[generated NAME ARGUMENTS]]` of a page becomes."""


def generated_pages() -> Mapping[str, str]:
    """Return the content of every generated page by its path below docs/."""
    pages = {}
    for name, tables in recipe_tables().items():
        title = "Recipe: top level" if name == "top-level" else f"Recipe: {name}"
        introduction = RECIPE_INTRODUCTIONS.get(name, "")
        pages[f"reference/recipe/{name}.md"] = settings_page(title, introduction, tables)
    site = "What a client says of itself, for `fedtune join site.toml`. The file never leaves the client's machine."
    pages["reference/site.md"] = settings_page("Site file", site, site_tables())
    server = "How `fedtune serve recipe.toml --config server.toml` listens. Nothing in it changes what a run computes."
    pages["reference/server.md"] = settings_page("Server file", server, server_tables())
    pages["explanation/guarantees.md"] = guarantees_page(read_record(), marked_tests())
    pages["reference/fedtune-edge.md"] = edge_page()
    pages["notebooks/first-federation.md"] = notebook_page()
    for name, command in commands():
        pages[f"reference/commands/{command_file(name)}"] = command_page(name, command)
    return pages


def changelog() -> str:
    """Return the changelog of the repository, with its links to pages as they are from within docs/."""
    return (ROOT / "CHANGELOG.md").read_text().replace("](docs/", "](")


def command_file(name: str) -> str:
    return name.removeprefix("fedtune ").replace(" ", "-") + ".md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages where the navigation names a folder of them."""
    recipe = [{name.replace("-", " "): f"reference/recipe/{name}.md"} for name in recipe_tables()]
    by_command = [{name: f"reference/commands/{command_file(name)}"} for name, _ in commands()]
    lists = {"reference/recipe/*": recipe, "reference/commands/*": by_command}
    config.nav = expanded(config.nav, lists)
    return config


def expanded(nav: Any, lists: Mapping[str, Sequence[Any]]) -> Any:
    if isinstance(nav, dict):
        return {title: expanded(part, lists) for title, part in nav.items()}
    if isinstance(nav, list):
        return [
            entry
            for part in nav
            for entry in (lists.get(part, [part]) if isinstance(part, str) else [expanded(part, lists)])
        ]
    return nav


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the changelog of the repository."""
    for path, content in generated_pages().items():
        files.append(File.generated(config, path, content=content))
    files.append(File.generated(config, "changelog.md", content=changelog()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace every line `[[generated NAME ARGUMENTS]]`."""

    def replacement(match: re.Match[str]) -> str:
        name, *arguments = match.group(1).split()
        return str(MARKERS[name](*arguments))

    return re.sub(r"^\[\[generated (.+)\]\]$", replacement, markdown, flags=re.MULTILINE)
