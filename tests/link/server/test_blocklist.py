from __future__ import annotations

from pathlib import Path

from fedtune.link.rejections import rejection
from fedtune.link.server.blocklist import Blocklist, RefusalCounter, read_blocklist
from fedtune.wire.v1 import link_pb2 as pb


def test_a_block_lasts_and_the_operator_may_edit_the_file(tmp_path: Path) -> None:
    time, path = [0.0], tmp_path / "barred"
    bars = Blocklist(path, clock=lambda: time[0])
    assert bars.reason("anna") == ""
    bars.block("anna", "3 refusals,\nthe last SIGNATURE")
    assert bars.reason("anna").startswith("3 refusals")
    assert Blocklist(path).reason("anna") == "3 refusals, the last SIGNATURE"
    path.write_text("# nobody\nbob\ncarl too loud\n")
    time[0] += 1
    assert [bars.reason(name) for name in ("anna", "bob", "carl")] == ["", "by the operator", "too loud"]
    path.unlink()
    time[0] += 1
    assert bars.reason("bob") == ""


def test_a_block_keeps_what_the_operator_wrote_meanwhile(tmp_path: Path) -> None:
    bars = Blocklist(tmp_path / "barred", clock=lambda: 0.0)
    bars.block("anna", "x")
    (tmp_path / "barred").write_text("bob y\n")
    bars.block("carl", "z")
    assert read_blocklist(tmp_path / "barred") == {"bob": "y", "carl": "z"}


def test_refusals_of_ten_rounds_count_and_begin_anew_after_the_limit() -> None:
    counter, refusal = RefusalCounter(), rejection(pb.SIGNATURE, "", "", "").refusal
    assert [counter.count("anna", refusal, number, limit=3) for number in (0, 1, 10)] == ["", "", ""]  # 0 is too old
    assert counter.count("bob", refusal, 10, limit=3) == ""
    assert counter.count("anna", refusal, 10, limit=3) == "3 refusals within 10 rounds, the last SIGNATURE"
    assert counter.count("anna", refusal, 10, limit=3) == ""
