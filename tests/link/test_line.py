"""A large adapter over a line with delay that is cut in the middle, both ways: it arrives, and little is sent again."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from fedtune.link.server.assignments import ReceivedParts
from tests.link.link_server import SETTINGS, run_link_server
from tests.link.proxy import Fate, proxy
from tests.link.site import collect_one, expected_update, post, run_site

MB = 10**6
SLACK = 1.05
"""Times the bytes: what a cut may send again, and what TLS and gRPC add."""


@pytest.mark.guarantee("G14")
@pytest.mark.parametrize("size", [8 * MB, pytest.param(100 * MB, marks=pytest.mark.slow)])
def test_a_cut_in_the_middle_of_a_line_with_delay_sends_little_again(tmp_path: Path, size: int) -> None:
    body = np.random.Generator(np.random.Philox(key=1)).bytes(size)
    fates = [
        Fate("cut", after=size // 2, up=False),  # in the download
        Fate("cut", after=size // 2, up=True),  # in the upload
    ]
    settings = replace(SETTINGS, part_kib=64, window_mib=1 if size < 50 * MB else 4, stall_s=30)
    with (
        proxy(lambda number: fates[number] if number < len(fates) else Fate()) as between,
        run_link_server(tmp_path, settings) as link,
    ):
        between.target, between.pause_s, link.port = link.port, 0.002, between.port
        with run_site(link) as running:
            running.trainer.size = size
            result = collect_one(link, post(link, body=body))
            assert isinstance(result, ReceivedParts)
            assert (
                sha256(result.bodies["update"]).digest()
                == sha256(expected_update(running.trainer.done[0], size)).digest()
            )
            assert len(between.fates) == 3, "both cuts happened"
        up, down = between.carried
    budget = SLACK * size + (1 if size < 50 * MB else 0) * MB  # the window, where it is more than a twentieth
    assert size < down < budget
    assert size < up < budget
