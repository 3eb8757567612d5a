from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_the_process_ends_when_the_one_that_started_it_has_gone(tmp_path: Path) -> None:
    theirs, requests = os.pipe()
    replies, theirs_out = os.pipe()
    their_life, life = os.pipe()
    given = (theirs, theirs_out, their_life)
    command = [sys.executable, "-m", "fedtune.client.site_process", str(tmp_path / "none.toml"), *map(str, given)]
    process = subprocess.Popen(command, pass_fds=given)
    for descriptor in given:
        os.close(descriptor)
    os.write(requests, json.dumps({"do": "profile", "into": str(tmp_path)}).encode() + b"\n")
    assert b"none.toml" in os.read(replies, 65536)
    os.close(life)  # not the requests: they may be open in a child of the parent's
    assert process.wait(60) == 0
    os.close(requests)
    os.close(replies)
