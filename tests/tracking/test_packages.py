from __future__ import annotations

import re
import sys
from importlib import metadata

import pytest

from fedtune.errors import ExtraError
from fedtune.tracking import packages
from fedtune.tracking.packages import INSTALL, check_packages


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    for name, install in INSTALL.items():
        with pytest.raises(ExtraError, match=rf"tracker '{name}'.*run: pip install {re.escape(install)}"):
            check_packages([name])
    check_packages([])


def test_looking_for_a_package_does_not_import_it() -> None:
    if "tensorboard" in {name.lower() for name in metadata.packages_distributions()}:
        before = set(sys.modules)
        check_packages(["tensorboard"])
        assert not {name for name in set(sys.modules) - before if name.startswith("tensorboard.")}
