from __future__ import annotations

import subprocess
import sys


def test_settings_are_read_without_torch() -> None:
    """A recipe that is wrong says so at once, so its settings may load nothing heavy."""
    code = "import sys, fedtune.model.settings; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "set()\n"
