"""A device and a client with torch say and send the same, byte for byte, where their losses are the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.client import site as torch_site
from fedtune.directions.bank import BANKS
from fedtune.directions.downlink import encode_whole
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.edge import base as edge_base
from fedtune.edge import site as edge_site
from fedtune.edge.current_model import read_model
from fedtune.edge.site import EdgeSite
from fedtune.errors import ClientError, ConfigError, WireError
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    ClientUpdate,
    DescendSeeds,
    Plan,
    PlannedClient,
    ProbeResult,
    ProbeSeeds,
    ScoreRequest,
    SeedState,
    Training,
    TrainLora,
)
from fedtune.methods import fedkseed
from fedtune.methods.fedkseed_state import FedKSeedSettings, FedKSeedState
from fedtune.model.base import Base, load, load_tokenizer
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.probing.replica import Replicas
from fedtune.wire.codec import decode_assignment, decode_update, encode_assignment, encode_update
from fedtune.wire.profile import difference, encode_profile
from tests.edge.torch_runtime import TorchRuntime, base_bundle

DATA = """
[data]
source = "rows.jsonl"
held_out = 0.25
max_tokens = 24
[policy]
min_examples = 1
unsigned_base = true
"""
ROWS = "".join(json.dumps({"text": f"the quick fox {'and ' * (i % 5)} over the dog {i}"}) + "\n" for i in range(16))
SIZE, KEY, E = 64, 5, 12


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Load anew in each test what a process keeps."""
    yield
    torch_site.from_file.cache_clear()
    edge_site.from_file.cache_clear()


@pytest.fixture(scope="module")
def base(checkpoints: dict[str, Path]) -> Base:
    settings = ModelSettings(base=str(checkpoints["llama"]), dtype="float32", device="cpu")
    tokenizer = load_tokenizer(settings, Path())
    adapter = AdapterSettings(rank=1)
    return load(settings, adapter, tokenizer=tokenizer, root=Path(), seed=0, labels=())


@pytest.fixture
def files(tmp_path: Path, base: Base, checkpoints: dict[str, Path]) -> tuple[Path, Path]:
    """The files of one client, for torch and for a device, over the same rows."""
    (tmp_path / "rows.jsonl").write_text(ROWS)
    base_bundle(tmp_path / "bundle", base)
    front = 'name = "ann"\n[model]\nbase = "{}"\n{}'
    full, small = tmp_path / "full.toml", tmp_path / "small.toml"
    full.write_text(front.format(checkpoints["llama"], '[adapter]\ntargets = ["all-linear"]\n') + DATA)
    small.write_text(front.format("bundle", "") + DATA)
    return full, small


@pytest.fixture
def device(files: tuple[Path, Path], base: Base, monkeypatch: pytest.MonkeyPatch) -> EdgeSite:
    monkeypatch.setattr(edge_base, "load_runtime", lambda bundle, *, threads: TorchRuntime(base))
    return edge_site.from_file(str(files[1]))


@pytest.fixture
def full(files: tuple[Path, Path]) -> torch_site.Site:
    return torch_site.from_file(str(files[0]))


def ledger(base: Base, round: int) -> SeedLedger:
    sums = np.random.default_rng(round).integers(-40, 41, SIZE).astype(np.int32) * (round > 0)
    return SeedLedger(BANKS["kron"](SIZE, KEY), E, round, base.manifest.digest, sums.astype(np.int32))


def order(base: Base, round: int = 1, **changes: Any) -> Assignment:
    """Return an order of FedKSeed as it arrives."""
    sent = ledger(base, round - 1)
    state = SeedState("whole", 0, encode_whole(sent.accumulators), round - 1, sent.digest)
    task = ProbeSeeds("kron", SIZE, KEY, exponent=E, shift=3, perturbation=32, state=state)
    training = Training(batch=3, learning_rate=0.02, steps=6)
    made = Assignment("fedkseed", round, 9, Plan("ann", 1, 1.0, training), replace(task, **changes), base=base.digest)
    encoded = encode_assignment(made)
    return decode_assignment(encoded.header, encoded.blobs)


def timeless(update: ClientUpdate) -> bytes:
    """Return what is sent but for the time and memory that the work took."""
    return encode_update(replace(update, measured=replace(update.measured, seconds=1.0, peak_bytes=2**20)))


def test_a_device_says_the_same_of_base_and_data_as_a_client_with_torch(
    device: EdgeSite, full: torch_site.Site
) -> None:
    ours, theirs = device.profile(), full.profile()
    assert difference(theirs.foundation, ours.foundation) == ""
    assert difference(ours.foundation, theirs.foundation) == ""
    assert (ours.client, ours.num_examples, ours.held_out) == (theirs.client, theirs.num_examples, theirs.held_out)
    assert ours.methods == ("fedkseed",)
    same = replace(ours, methods=theirs.methods, device=theirs.device)
    assert encode_profile(same).header == encode_profile(theirs).header


def test_both_train_and_hold_out_the_same_rows(device: EdgeSite, full: torch_site.Site) -> None:
    for ours, theirs in ((device.examples, full.examples), (device.held_out, full.held_out)):
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one.input_ids, other.input_ids)
            np.testing.assert_array_equal(one.labels, other.labels)
            assert (one.prompt_tokens, one.characters) == (other.prompt_tokens, other.characters)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"calibrate": True},
        {"estimator": "one-sided", "queries": 3},
        {"estimator": "one-sided", "queries": 3, "normalise": True, "clip": 0.0},
        {"trainable": ("*q_proj*", "*mlp*")},
        {"sampling": "distinct"},
    ],
    ids=str,
)
def test_the_same_losses_give_the_same_bytes(
    changes: dict[str, Any], device: EdgeSite, full: torch_site.Site, base: Base
) -> None:
    for round in (1, 3):
        ours, theirs = (one.perform(order(base, round, **changes)) for one in (device, full))
        assert timeless(ours) == timeless(theirs)
        assert isinstance(ours.result, ProbeResult)
        assert ours.result.rms or ours.result.scalars.any()
        assert ours.measured.loss_before is not None


def test_scores_of_a_global_model_and_of_the_base_are_those_of_torch(
    device: EdgeSite, full: torch_site.Site, base: Base
) -> None:
    trainable = tuple(base.manifest.ordinals[name] for name in sorted(base.matrices))
    for seeds in (b"", ledger(base, 4).encode()):
        request = ScoreRequest(
            "ann",
            "fedkseed",
            4,
            base.digest,
            batch=2,
            ledger=seeds,
            trainable=tuple(sorted(trainable)) if seeds else (),
        )
        ours, theirs = device.score(request), full.score(request)
        assert ours.metrics.keys() == theirs.metrics.keys()
        assert ours.metrics == pytest.approx(theirs.metrics, rel=2e-6)
    assert device.score(replace(request, examples=1)).metrics["examples"] == 1


def test_a_device_that_missed_rounds_catches_up_with_one_message_and_stores_the_model(
    device: EdgeSite, base: Base
) -> None:
    assert read_model(device.state) is None
    device.perform(order(base, 1))
    assert read_model(device.state) is None  # the base itself
    device.perform(order(base, 8))
    stored = read_model(device.state)
    assert stored is not None
    assert stored.ledger.digest == ledger(base, 7).digest
    assert stored.trainable == tuple(sorted(base.manifest.ordinals[name] for name in base.matrices))


def test_a_device_that_restarts_knows_the_last_state_that_it_was_sent(
    device: EdgeSite, base: Base, files: tuple[Path, Path]
) -> None:
    device.perform(order(base, 8))
    edge_site.from_file.cache_clear()
    again = edge_site.from_file(str(files[1]))
    known = again.replicas.get(BANKS["kron"](SIZE, KEY), base.manifest.digest, 7)
    assert known is not None
    assert known.tolist() == ledger(base, 7).accumulators.tolist()


def after_rounds(base: Base, sites: dict[str, Any]) -> FedKSeedState:
    """Return the state after four rounds, the first of which measures the step: bob misses two, cara comes late."""
    settings = FedKSeedSettings(bank="kron", seeds=SIZE, perturbation=2.0**-7)
    state = fedkseed.init(base.blueprint(max_rank=1, seed=0, whole=True), settings)
    training = Training(batch=3, learning_rate=0.01, steps=4)
    for absent in (["cara"], ["bob", "cara"], ["bob", "cara"], []):
        updates = []
        for name in sorted(sites.keys() - set(absent)):
            encoded = encode_assignment(fedkseed.assign(state, 0, PlannedClient(Plan(name, 1, 1.0, training))))
            asked = decode_assignment(encoded.header, encoded.blobs)
            data = encode_update(sites[name].perform(asked))
            update = AdmittedUpdate(decode_update(data, client=name, limit_bytes=10**6, task=ProbeSeeds))
            # A client that missed rounds has caught up with this one message, and holds the state that the server has.
            assert not update.probe.lost
            assert fedkseed.refuse(state, update) == ""
            assert len(data) <= 260
            updates.append(update)
        state = fedkseed.aggregate(state, updates)
    return state


def test_rounds_of_devices_and_torch_end_at_the_bits_of_rounds_of_torch_alone(
    device: EdgeSite, full: torch_site.Site, base: Base, tmp_path: Path
) -> None:
    devices = {
        name: replace(device, client=name, replicas=Replicas(), state=tmp_path / name) for name in ("bob", "cara")
    }
    clients = {name: replace(full, client=name, replicas=Replicas()) for name in ("ann", "bob", "cara")}
    mixed = after_rounds(base, {"ann": clients["ann"], **devices})
    clients["ann"] = replace(full, replicas=Replicas())
    alone = after_rounds(base, clients)
    assert mixed.round == 4
    assert mixed.sums.any()
    assert mixed.digest == alone.digest
    for name in devices:
        stored = read_model(tmp_path / name)
        assert stored is not None
        assert stored.ledger.round == 3


def test_a_damaged_model_file_costs_no_round(
    device: EdgeSite, base: Base, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    device.perform(order(base, 8))
    path = device.state / "model.ftks"
    path.write_bytes(path.read_bytes()[:-1])
    edge_site.from_file.cache_clear()
    again = edge_site.from_file(str(files[1]))
    again.perform(order(base, 8))
    stored = read_model(device.state)
    assert stored is not None
    assert stored.ledger.round == 7


def test_an_order_to_train_lora_is_refused_in_one_sentence(device: EdgeSite, base: Base) -> None:
    lora = replace(order(base), task=TrainLora(a_key=0))
    with pytest.raises(ClientError, match="run fedtune-client, or ask for method = 'fedkseed'") as caught:
        device.perform(lora)
    assert "\n" not in str(caught.value)


def test_rows_with_a_rejected_answer_are_refused_when_they_are_read(
    files: tuple[Path, Path], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = files[1].parent / "rows.jsonl"
    rows.write_text("".join(f'{{"chosen": "the fox {row}", "rejected": "the dog {row}"}}\n' for row in range(8)))
    monkeypatch.setattr(edge_base, "load_runtime", lambda bundle, *, threads: TorchRuntime(base))
    with pytest.raises(ConfigError, match=r"data\.fields\.rejected: expected rows of one answer for a device"):
        edge_site.from_file(str(files[1]))


def test_an_order_to_descend_is_done_by_probing_where_it_says_how(device: EdgeSite, base: Base) -> None:
    asked = order(base)
    descending = replace(asked.plan, training=replace(asked.plan.training, steps=7, learning_rate=0.5))
    task = DescendSeeds(asked.probe, asked.probe.seeds, 9, fallback=asked.plan.training)
    instead = device.perform(replace(asked, plan=descending, task=task))
    alone = device.perform(asked)
    assert instead.probe.scalars.tolist() == alone.probe.scalars.tolist()
    with pytest.raises(ClientError, match=r"one to descend and not to probe; .* method.verb = 'auto'$") as caught:
        device.perform(replace(asked, plan=descending, task=replace(task, fallback=None)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bank": "hadamard"}, "the bank 'hadamard'"),
        ({"vectors": True}, "method.vectors"),
        ({"embeddings": True}, "method.embeddings"),
        ({"groups": "tensor"}, "method.groups"),
        ({"earlier": (1,)}, "method.redraw"),
    ],
)
def test_an_order_that_the_bundle_has_no_graph_for_is_refused(
    changes: dict[str, Any], named: str, device: EdgeSite, base: Base
) -> None:
    with pytest.raises(ClientError, match=r"method.bank = 'kron' alone") as caught:
        device.perform(order(base, **changes))
    assert named in str(caught.value).replace("'hadamard'", "'hadamard'")


def test_orders_for_others_and_of_other_states_are_refused(device: EdgeSite, base: Base) -> None:
    asked = order(base)
    with pytest.raises(ClientError, match="an assignment of its own; got one for 'bob'"):
        device.perform(replace(asked, plan=replace(asked.plan, client="bob")))
    assert isinstance(asked.task, ProbeSeeds)
    wrong = replace(asked.task, state=replace(asked.task.state, digest=bytes(32)))
    with pytest.raises(WireError, match="expected the state"):
        device.perform(replace(asked, task=wrong))
    request = ScoreRequest("ann", "fedkseed", 4, "ab" * 32, batch=2)
    with pytest.raises(ClientError, match="expected base ab"):
        device.score(request)
    with pytest.raises(ClientError, match="a request of its own"):
        device.score(replace(request, client="bob"))
    tensors = {"global": {"x": np.zeros(1, np.float32)}}
    with pytest.raises(ClientError, match="got LoRA factors"):
        device.score(replace(request, base=base.digest, blobs=tensors))


def test_losses_and_scores_stay_where_the_policy_refuses_them(
    device: EdgeSite, base: Base, files: tuple[Path, Path]
) -> None:
    files[1].write_text(files[1].read_text().replace("[policy]", '[policy]\nscores = "refuse"'))
    edge_site.from_file.cache_clear()
    strict = edge_site.from_file(str(files[1]))
    assert strict.profile().held_out == 0
    update = strict.perform(order(base))
    assert (update.measured.loss_before, update.measured.loss_after) == (None, None)
    with pytest.raises(ClientError, match=r"policy.scores refuses them"):
        strict.score(ScoreRequest("ann", "fedkseed", 4, base.digest, batch=2))


def test_an_update_of_too_few_examples_is_never_made(device: EdgeSite, base: Base, files: tuple[Path, Path]) -> None:
    files[1].write_text(files[1].read_text().replace("min_examples = 1", "min_examples = 400"))
    edge_site.from_file.cache_clear()
    with pytest.raises(ClientError, match=r"policy.min_examples: an update of at least 400 examples"):
        edge_site.from_file(str(files[1])).perform(order(base))


def test_a_step_that_does_not_fit_is_declined_in_the_words_that_planners_read(
    device: EdgeSite, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(device, opened=replace(device.opened, max_bytes=2**20))
    with pytest.raises(ClientError, match=r"ran out.*policy.max_memory_gib.*lower client.batch"):
        small.perform(order(base))
    with pytest.raises(ClientError, match=r"ran out.*policy.max_memory_gib.*lower evaluate.batch"):
        small.score(ScoreRequest("ann", "fedkseed", 0, base.digest, batch=2))
    with pytest.raises(ConfigError, match=r"policy\.max_memory_gib"):
        _ = small.opened.runtime
