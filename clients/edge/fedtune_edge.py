"""What the files fedtune-edge and fedtune-edge-gguf start."""

from __future__ import annotations

import sys

from fedtune.cli.edge import main

if __name__ == "__main__":
    sys.exit(main())
