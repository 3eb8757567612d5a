"""Write the digests of the packages that lock/*.txt name with their versions: for x86-64 and aarch64.

python lock.py: after a version in a file of lock/ was changed; what a file is built from is then the same everywhere.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

LOCKS = Path(__file__).with_name("lock")
PLATFORMS = {arch: [f"manylinux_2_{minor}_{arch}" for minor in (28, 17)] for arch in ("x86_64", "aarch64")}
"""Both tags: with the newer one alone pip takes older releases of packages that are built for the older one."""


def digests(package: str) -> list[str]:
    """Return the digests of a package's wheels for every architecture, sorted."""
    result = set()
    for tags in PLATFORMS.values():
        with tempfile.TemporaryDirectory() as folder:
            platforms = [word for tag in [*tags, tags[0].replace("_2_28", "2014")] for word in ("--platform", tag)]
            options = ["--no-deps", "--only-binary", ":all:", "--python-version", "3.11", *platforms]
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", folder, package], check=True
            )
            (wheel,) = Path(folder).iterdir()
            result.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
    return sorted(result)


def main() -> None:
    for path in sorted(LOCKS.glob("*.txt")):
        packages = [line.split(" ")[0] for line in path.read_text().splitlines() if "==" in line]
        lines = [" \\\n    ".join([one, *(f"--hash=sha256:{value}" for value in digests(one))]) for one in packages]
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
