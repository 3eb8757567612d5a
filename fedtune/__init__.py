"""fedtune: federated fine-tuning of language models where the data lives.

import fedtune
run = fedtune.simulate("recipe.toml")
print(run.summary["after"]["test"]["loss"], run.adapter)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.api import Run, compare, evaluate, simulate
    from fedtune.client import site
    from fedtune.config import Recipe, bind
    from fedtune.deployment.patch import patch
    from fedtune.deployment.python_site import Site
    from fedtune.errors import ConfigError, FedtuneError
    from fedtune.runs.deploy import deploy, load_pruned
    from fedtune.runs.emulator import export_emulator
    from fedtune.runs.export import export, replay
    from fedtune.runs.merge import merge
    from fedtune.runs.plug_back import plug_back
    from fedtune.runs.pruned_scores import views

__all__ = [
    "ConfigError",
    "FedtuneError",
    "Recipe",
    "Run",
    "Site",
    "bind",
    "compare",
    "deploy",
    "evaluate",
    "export",
    "export_emulator",
    "load_pruned",
    "merge",
    "patch",
    "plug_back",
    "replay",
    "simulate",
    "site",
    "views",
]

_HOMES = {
    "ConfigError": "errors",
    "FedtuneError": "errors",
    "Recipe": "config",
    "bind": "config",
    "deploy": "runs.deploy",
    "load_pruned": "runs.deploy",
    "views": "runs.pruned_scores",
    "export": "runs.export",
    "export_emulator": "runs.emulator",
    "plug_back": "runs.plug_back",
    "merge": "runs.merge",
    "patch": "deployment.patch",
    "Site": "deployment.python_site",
    "replay": "runs.export",
}

_MODULES = {"site": "client.site"}
"""Names that are modules: `fedtune.site.from_file(path)` opens a client's own file."""


def __getattr__(name: str) -> Any:
    # Imported on first use: `import fedtune` stays quick, and a server that needs one noun loads no torch.
    if name not in __all__:
        raise AttributeError(f"module 'fedtune' has no attribute {name!r}")
    if name in _MODULES:
        return import_module(f"fedtune.{_MODULES[name]}")
    return getattr(import_module(f"fedtune.{_HOMES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return __all__
