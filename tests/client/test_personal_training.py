"""What a client does for its own model: what it stores, what it sends, and that it can be done again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.client import perform as perform_module
from fedtune.client.personal_state import StateFolder, client_folder
from fedtune.client.site import Site
from fedtune.client.worker_process import payload, prepare
from fedtune.data.encode import Example
from fedtune.errors import ClientError
from fedtune.lora.adapter import draw_a
from fedtune.messages import (
    Assignment,
    ClientUpdate,
    Personal,
    PersonalRequest,
    Plan,
    ScoreRequest,
    Training,
    TrainLora,
)
from fedtune.model.base import Base, digest, load, load_tokenizer
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.model.shares import Shares
from fedtune.pruning.ranking import PruningSettings
from fedtune.seeds import derive
from fedtune.tasks import Pruning
from fedtune.tensors import Tensors
from fedtune.wire.codec import decode_assignment, decode_update, encode_assignment, encode_update

NORMS = ["input_layernorm", "lm_head"]
KINDS = {
    "ditto": Personal("ditto", strength=0.5, steps=3),
    "pfedme": Personal("pfedme", steps=2, rate=0.01),
    "fedrep": Personal("fedrep", keep=["*.0.*q_proj.*", "lm_head*"], steps=2),
    "share-a": Personal("share-a"),
    "fedbn": Personal("fedbn"),
}
TRAINING = Training(batch=2, learning_rate=0.02, steps=3)

perform = partial(perform_module.perform, threads=1)


@pytest.fixture
def base(loaded: Any) -> Base:
    base: Base = loaded(saved=NORMS)
    return base


@pytest.fixture
def rows(examples: Any) -> list[Example]:
    rows: list[Example] = examples(5)
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    return StateFolder(tmp_path / "own")


def order(base: Base, personal: Personal | None, round: int = 1, **changes: Any) -> Assignment:
    keeps = personal.in_full().keeps if personal else lambda name: False
    local: dict[str, Any] = {}
    for name, (m, n) in base.modules.items():
        local |= {f"{name}.a": draw_a(7, name, 4, n), f"{name}.b": np.zeros((m, 4), np.float32)}
    blobs: Mapping[str, Tensors] = {
        "local": {name: tensor for name, tensor in local.items() if not keeps(name)},
        "saved": {name: tensor for name, tensor in base.saved_tensors().items() if not keeps(name)},
    }
    task = TrainLora(a_key=7, upload="difference", wire_dtype="fp32", blobs=blobs)
    task = replace(task, personal=personal.in_full() if personal else None, **changes)
    return Assignment("fedit", round, 11 + round, Plan("ann", 4, 2.0, TRAINING), task, base.digest)


def sent(update: ClientUpdate) -> dict[str, Any]:
    return {**update.lora.tensors, **update.lora.saved}


@pytest.mark.parametrize("kind", KINDS)
def test_what_stays_is_in_no_byte_and_the_base_is_as_before(
    kind: str, base: Base, rows: list[Example], folder: StateFolder
) -> None:
    personal = KINDS[kind]
    asked = order(base, personal)
    encoded = encode_assignment(asked)
    data = encode_update(perform(base, rows, asked, personal=folder))
    assert digest(base.model) == base.digest
    stored = folder.load("ann", before=2)
    assert stored is not None
    own = {**stored.state.factors, **stored.state.saved}
    assert own
    assert all(tensor.dtype == np.float32 for tensor in own.values())
    messages = [encoded.header, *encoded.blobs.values(), data]
    for name, tensor in own.items():
        assert not any(tensor.tobytes() in message for message in messages), name
        if personal.keep or kind in ("share-a", "fedbn"):
            assert personal.in_full().keeps(name)
            assert not any(name.encode() in message for message in messages), name
    trace = decode_update(data, client="ann", limit_bytes=10**7).lora.personal
    assert trace is not None
    assert (trace.before, trace.after) == (b"", stored.digest)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_round_goes_on_from_the_state_and_can_be_done_again(
    kind: str, base: Base, rows: list[Example], folder: StateFolder
) -> None:
    personal, first = KINDS[kind], perform(base, rows, order(base, KINDS[kind]), personal=folder)
    asked = decode_assignment(*astuple(encode_assignment(order(base, personal, round=4))))
    second, again = (perform(base, rows, asked, personal=folder) for _ in range(2))
    assert second.lora.personal == again.lora.personal
    assert second.lora.personal is not None
    assert first.lora.personal is not None
    assert second.lora.personal.before == first.lora.personal.after
    for name, tensor in sent(second).items():
        assert tensor.tobytes() == sent(again)[name].tobytes()
    # From the server's values it comes out otherwise, but for pFedMe, which starts from them in every round.
    fresh = perform(base, rows, asked, personal=StateFolder(folder.path / "other"))
    assert fresh.lora.personal is not None
    assert (fresh.lora.personal.after == second.lora.personal.after) == (kind == "pfedme")


def astuple(encoded: Any) -> tuple[Any, Any]:
    return encoded.header, encoded.blobs


def test_the_global_part_of_ditto_is_the_plain_one_to_the_bit(
    base: Base, rows: list[Example], folder: StateFolder
) -> None:
    plain = perform(base, rows, order(base, None))
    ours = perform(base, rows, order(base, KINDS["ditto"]), personal=folder)
    assert sent(ours).keys() == sent(plain).keys()
    assert all(tensor.tobytes() == sent(plain)[name].tobytes() for name, tensor in sent(ours).items())
    assert ours.measured.loss_after == plain.measured.loss_after
    assert ours.measured.side_tokens > plain.measured.side_tokens  # the personal steps are no free ones


def test_ditto_without_a_pull_is_local_training(base: Base, rows: list[Example], folder: StateFolder) -> None:
    perform(base, rows, order(base, Personal("ditto", strength=0.0)), personal=folder)
    asked = order(base, None)
    local = perform(base, rows, replace(asked, seed=derive(asked.seed, "personal")))
    stored = folder.load("ann", before=2)
    assert stored is not None
    start = asked.lora.blobs["local"]
    for name, tensor in stored.state.factors.items():
        moved = tensor - start[name] if name.endswith(".a") else 2.0 * tensor
        np.testing.assert_allclose(moved, sent(local)[name], atol=1e-6)
    for name, tensor in stored.state.saved.items():
        assert tensor.tobytes() == sent(local)[name].tobytes()


def test_a_state_that_does_not_fit_is_left_and_the_update_says_so(
    base: Base, rows: list[Example], folder: StateFolder
) -> None:
    perform(base, rows, order(base, KINDS["ditto"]), personal=folder)
    asked = order(base, KINDS["ditto"], round=2)
    other_scale = replace(asked, plan=replace(asked.plan, scale=4.0))
    for changed in (other_scale, order(base, KINDS["share-a"], round=2)):
        update = perform(base, rows, changed, personal=folder)
        assert update.lora.personal is not None
        assert update.lora.personal.before == b""


def test_what_a_client_cannot_do_is_refused(base: Base, rows: list[Example], folder: StateFolder) -> None:
    asked = order(base, KINDS["ditto"])
    with pytest.raises(ClientError, match="this client has no folder for a state"):
        perform(base, rows, asked)
    with pytest.raises(ClientError, match="a personal model that several processes share"):
        perform(base, rows, asked, personal=folder, shares=Shares(place=0, size=2))
    pruned = replace(asked, task=replace(asked.lora, pruning=Pruning(PruningSettings())))
    with pytest.raises(ClientError, match="a personal model of a pruned one"):
        perform(base, rows, pruned, personal=folder)
    with pytest.raises(ClientError, match="scores of the modules beside a personal model"):
        perform(base, rows, replace(asked, plan=replace(asked.plan, importance="gain")), personal=folder)
    assert not folder.path.exists()


def test_a_worker_process_stores_in_the_client_s_own_folder(
    checkpoints: dict[str, Path], rows: list[Example], tmp_path: Path
) -> None:
    settings, adapter = (
        ModelSettings(base=str(checkpoints["llama"]), device="cpu"),
        AdapterSettings(rank=4, targets=["q_proj", "v_proj"], modules_to_save=NORMS),
    )
    spec, parts = payload(settings, adapter, {"ann": rows}, root=Path(), seed=0, personal=tmp_path / "run" / "personal")
    work = prepare(json.loads(json.dumps(spec)), {name: memoryview(part) for name, part in parts.items()}).make_worker(
        0
    )
    base = load(settings, adapter, tokenizer=load_tokenizer(settings, Path()), root=Path(), seed=0)
    update = work(order(base, KINDS["ditto"]), 1)
    stored = client_folder(tmp_path / "run" / "personal", "ann").load("ann", before=2)
    assert stored is not None
    assert update.lora.personal is not None
    assert update.lora.personal.after == stored.digest


def test_a_site_stores_in_the_folder_of_the_run_and_scores_from_there(
    base: Base, rows: list[Example], tmp_path: Path
) -> None:
    site = Site("ann", base, rows[:3], (), 1, held_out=rows[3:])
    here = site.in_run(tmp_path / "runs" / "ab12")
    asked = order(base, KINDS["share-a"])
    before = here.perform(asked)
    again = site.in_run(tmp_path / "runs" / "ab12").perform(asked)  # killed between training and sending
    assert before.lora.personal == again.lora.personal
    assert [path.parent.name for path in tmp_path.rglob("*.safetensors")] == ["personal"]
    zeros: Tensors = {f"{name}.b": np.zeros((m, 4), np.float32) for name, (m, _) in base.modules.items()}
    blobs: Mapping[str, Tensors] = {"global": {**asked.lora.blobs["local"], **zeros}}
    request = ScoreRequest("ann", "fedit", 1, base.digest, batch=2, blobs=blobs)
    request = replace(request, personal=PersonalRequest(KINDS["share-a"].in_full()))
    scores = here.score(request)
    assert scores.personal["examples"] == scores.metrics["examples"] == 2
    assert scores.personal["loss"] != scores.metrics["loss"]
    elsewhere = site.in_run(tmp_path / "runs" / "cd34").score(request)  # of another run it has none
    assert elsewhere.personal == elsewhere.metrics
