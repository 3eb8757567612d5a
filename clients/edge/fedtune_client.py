"""What the file fedtune-client starts: the command `fedtune`, and its own further processes."""

from __future__ import annotations

import runpy
import sys

MODULES = {"fedtune.client.site_process", "fedtune.client.share_process", "fedtune.client.worker_process"}
"""Which fedtune starts as `python -m MODULE`: here there is no Python, so that this file starts itself."""


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "-P"]
    if words[:1] == ["-m"] and words[1:2] and words[1] in MODULES:
        sys.argv[1:] = words[2:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        from fedtune.cli.main import main as command

        # `fedtune-client version` is what the file itself asks for, before it takes its first tree for whole.
        if sys.argv[1:] == ["version"]:
            sys.argv[1:] = ["--version"]
        command()


if __name__ == "__main__":
    main()
