"""The process of a device: a profile and the words of errors, over the same pipes as that of a client with torch."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from fedtune.cli.edge_options import train_command
from tests.edge.bundles import write_bundle


def test_the_process_answers_and_ends_when_the_one_that_started_it_has_gone(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    (bundle / "graph.onnx").write_bytes(b"another")
    site = tmp_path / "site.toml"
    site.write_text('name = "ann"\n[model]\nbase = "bundle"\n[data]\nsource = "rows.txt"\n')
    theirs, requests = os.pipe()
    replies, theirs_out = os.pipe()
    their_life, life = os.pipe()
    given = (theirs, theirs_out, their_life)
    process = subprocess.Popen([*train_command(), str(site), *map(str, given)], pass_fds=given)
    for descriptor in given:
        os.close(descriptor)
    os.write(requests, json.dumps({"do": "profile", "into": str(tmp_path / "profile")}).encode() + b"\n")
    reply = json.loads(os.read(replies, 65536))
    assert "graph.onnx" in reply["failed"]
    assert "\n" not in reply["failed"]
    os.close(life)
    assert process.wait(60) == 0
    os.close(requests)
    os.close(replies)
