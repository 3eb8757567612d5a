"""What pyproject.toml asks for, and how the answers of a solver are read; nothing here asks an index."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.resolution import read_reason, read_versions
from tests.test_environment import LAZY, OPTIONAL, core_packages

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BOUNDED = {"protobuf", "flwr", "click", "xllamacpp", "typer", "grpcio-tools"}
"""Packages that break something above a version; a comment beside each bound says what."""


def test_nothing_has_an_upper_bound_but_what_breaks_above_it() -> None:
    texts = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    bounded = {one.name for one in map(Requirement, texts) if any(bound.operator != ">=" for bound in one.specifier)}
    assert bounded <= BOUNDED


def test_the_core_brings_no_package_of_an_extra() -> None:
    absent = {"flwr", "ray", "prometheus-client", "matplotlib", "datasets", "pandas", "scikit-learn", "rouge-score"}
    assert not absent & core_packages()
    assert len(core_packages()) <= 95


def test_all_names_every_extra_that_is_no_tool_of_development() -> None:
    extras = PROJECT["optional-dependencies"]
    (everything,) = map(Requirement, extras["all"])
    assert everything.extras == extras.keys() - {"all", "docs", "test"}


def test_the_page_of_installation_has_a_row_for_every_extra() -> None:
    rows = re.findall(r"^\| `fedtune\[(\w[\w-]*)\]` \| .+ \| .* \|$", (ROOT / "docs" / "install.md").read_text(), re.M)
    assert PROJECT["optional-dependencies"].keys() <= set(rows)


def test_no_module_imports_the_package_of_an_extra_at_its_top() -> None:
    """Else a site that joins might need that extra."""
    homes, core, faults = packages_distributions(), core_packages(), []
    for path in sorted((ROOT / "fedtune").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module in LAZY or module in OPTIONAL or module.startswith(("fedtune.flower", "fedtune.edge")):
            continue
        for node in ast.parse(path.read_text()).body:
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for top in {name.partition(".")[0] for name in names} - {"fedtune", *sys.stdlib_module_names}:
                if not core & {canonicalize_name(one) for one in homes.get(top, [top])}:
                    faults.append(f"{module}: {top}")
    assert not faults


def test_versions_and_reasons_are_read_from_what_the_solver_says() -> None:
    assert read_versions("torch==2.15.0\n    # via fedtune\nfedtune @ file:///x\nml-dtypes==0.6.0 ; x\n") == {
        "torch": "2.15.0",
        "ml-dtypes": "0.6.0",
    }
    # As uv 0.13 prints it for axolotl 0.21 beside fedtune[flower].
    text = """error: No solution found when resolving dependencies
  cause: Because flwr>=1.41.0 depends on packaging>=24.0,<26.0 and axolotl>=0.21.0 depends on packaging==26.0, we can
         conclude that axolotl>=0.21.0 and flwr>=1.41.0 are incompatible."""
    assert (
        read_reason(text) == "flwr>=1.41.0 asks for packaging>=24.0,<26.0 and axolotl>=0.21.0 asks for packaging==26.0"
    )
    assert read_reason("no answer within 300 s") == "no answer within 300 s"
