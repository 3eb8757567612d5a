from __future__ import annotations

from pathlib import Path

import pytest

from fedtune import api
from fedtune.errors import ConfigError
from fedtune.runs.task_target import is_adapter, open_target
from tests.store.test_peft_import import foreign

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_a_run_and_an_adapter_have_a_before_and_a_base_has_none(
    ran: api.Run, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    foreign(checkpoints["llama"], tmp_path / "a", r=2, lora_alpha=2, target_modules=["q_proj"])
    tuned, other, plain = (
        open_target(str(source), base=None, watch=lambda event: None)
        for source in (ran.path, tmp_path / "a", checkpoints["llama"])
    )
    assert tuned.views == other.views == {"before": False, "after": True}
    assert plain.views == {"base": False}
    assert tuned.facts()["base_digest"] == other.facts()["base_digest"] == plain.facts()["base_digest"]


def test_any_file_of_an_adapter_makes_a_folder_one(tmp_path: Path) -> None:
    assert not is_adapter(tmp_path)
    assert not is_adapter(tmp_path / "gone")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert is_adapter(tmp_path)
    with pytest.raises(ConfigError, match="a PEFT adapter"):
        open_target(str(tmp_path), base=None, watch=lambda event: None)
