from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.cli.edge import main
from fedtune.cli.edge_options import DONE, USAGE
from fedtune.store import peft
from tests.edge.speaking import tune, write_device


def test_the_tuned_model_is_written_for_peft_and_for_llama_cpp(
    tmp_path: Path, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    site, _ = write_device(tmp_path, checkpoints["llama"])
    out = tmp_path / "adapter"
    assert main(["export", str(out), "--site", str(site)]) == USAGE
    assert "got none yet" in capsys.readouterr().err
    assert not out.exists()
    tune(site)
    assert main(["export", str(out), "--site", str(site)]) == DONE
    assert "after round 3, without any of your data" in capsys.readouterr().out
    adapter, _, facts = peft.read(out)
    assert {factors.rank for factors in adapter.values()} == {2}
    assert facts["round"] == 3
    assert main(["export", str(out), "--site", str(site)]) == USAGE
    assert "choose another" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "g"), "--site", str(site), "--form", "gguf"]) == DONE
    assert f"--lora {tmp_path}/g/adapter.gguf" in capsys.readouterr().out
