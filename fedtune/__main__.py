"""`python -m fedtune`: the command line."""

from __future__ import annotations

from fedtune.cli.main import main

if __name__ == "__main__":
    main()
