from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import fedtune
from fedtune import api
from fedtune.config import bind, render
from fedtune.errors import ConfigError, RoundError, StoreError
from fedtune.messages import TrainLora
from fedtune.methods import METHODS
from fedtune.methods.fedkseed_state import FedKSeedSettings
from fedtune.report.reader import read_run
from fedtune.rounds.events import Note, RoundFinished
from fedtune.store import manifest
from tests.conftest import Simulated, base_of, kseed

# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

Tables = dict[str, Any]


def test_a_run_says_what_it_did_and_the_report_can_read_it(ran: api.Run) -> None:
    assert {path.name for path in ran.path.iterdir()} == {
        "recipe.toml",
        "rounds.jsonl",
        "partition.jsonl",
        "summary.json",
        "adapter",
        "journal",
        "blobs",
        "lock",
    }
    assert ran.summary["state"] == "finished"
    assert ran.summary["rounds"] == 2
    assert {name: client["rank"] for name, client in ran.summary["clients"].items()} == {
        "client-0": 4, "client-1": 2, "client-2": 8,
    }  # fmt: skip
    assert ran.summary["after"]["test"]["loss"] < ran.summary["before"]["test"]["loss"]
    assert ran.summary["sample"]["prompt"] == "the quick"
    lines = [json.loads(line) for line in (ran.path / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert ran.summary["bytes_up"] == sum(line["bytes_up"] for line in lines) > 0
    record = read_run(ran.path)
    assert record.summary is not None
    assert len(record.rounds) == 3


def test_the_same_recipe_and_seed_give_the_same_bits(tables: Tables, tmp_path: Path, ran: api.Run) -> None:
    again = fedtune.simulate(tables, out=tmp_path / "again")
    assert again.summary["adapter_digest"] == ran.summary["adapter_digest"]
    other = fedtune.simulate({**tables, "seed": 1}, out=tmp_path / "other")
    assert other.summary["adapter_digest"] != ran.summary["adapter_digest"]


def test_the_bound_recipe_of_a_run_gives_the_run_again(tmp_path: Path, ran: api.Run) -> None:
    again = fedtune.simulate(ran.path / "recipe.toml", out=tmp_path / "again")
    assert again.summary["adapter_digest"] == ran.summary["adapter_digest"]


@pytest.mark.parametrize("method", [name for name, method in sorted(METHODS.items()) if method.task is TrainLora])
def test_every_method_with_adapters_learns(method: str, tables: Tables, tmp_path: Path) -> None:
    """A few rounds must clearly lower the loss: a wrong scale anywhere on the way would not."""
    one_rank = METHODS[method].ranks == "equal"
    run = fedtune.simulate(
        {
            **tables,
            "method": {"name": method},
            "override": [] if one_rank else tables["override"],
            "adapter": {"rank": 4, "targets": ["q_proj", "v_proj", "up_proj", "down_proj"]},
            "client": {"steps": 8, "batch": 6, "learning_rate": 0.05},
            "rounds": {"count": 3},
            "evaluate": {"every": 0},
        },
        out=tmp_path / "run",
    )
    assert run.summary["after"]["test"]["loss"] < 0.9 * run.summary["before"]["test"]["loss"]


@pytest.mark.parametrize("mode", ["reinit", "svt", "continue"])
def test_stock_peft_gives_the_runs_own_scores(mode: str, tables: Tables, tmp_path: Path, simulated: Simulated) -> None:
    run = simulated({**tables, "method": {"name": "flora", "mode": mode}}, tmp_path / "run")
    from fedtune.config import bind
    from fedtune.model.batches import collate
    from fedtune.model.loss import summed_loss
    from fedtune.runs.local import prepare

    experiment = prepare(bind(run.path / "recipe.toml"))
    batch = replace(collate(experiment.federation.test, experiment.base), fused=False)  # of stock peft's own logits
    stock = AutoModelForCausalLM.from_pretrained(tables["model"]["base"])
    model = PeftModel.from_pretrained(stock, run.adapter).eval()
    with torch.inference_mode():
        loss = summed_loss(model, batch, task="causal").item() / batch.count
    assert loss == pytest.approx(run.summary["after"]["test"]["loss"], abs=1e-5)


def test_evaluate_gives_the_runs_own_scores(ran: api.Run) -> None:
    scores = fedtune.evaluate(ran.path)
    assert scores["before"]["loss"] == pytest.approx(ran.summary["before"]["test"]["loss"], abs=1e-6)
    assert scores["after"]["loss"] == pytest.approx(ran.summary["after"]["test"]["loss"], abs=1e-5)


def test_evaluate_takes_other_data(ran: api.Run, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "the lazy dog sleeps and the lazy dog sleeps"}\n')
    scores = fedtune.evaluate(ran.path, data=other)
    assert scores["after"]["examples"] == 1


def test_a_run_whose_data_lie_at_the_sites_is_scored_on_a_file_and_merged(ran: api.Run, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "the lazy dog sleeps and the lazy dog sleeps"}\n')
    expected = fedtune.evaluate(ran.path, data=other)
    tables = tomllib.loads((ran.path / "recipe.toml").read_text())
    served = {key: value for key, value in tables["data"].items() if key not in ("test", "source", "split")}
    served |= {"source": "at the sites", "split": {"kind": "files"}}
    overrides = [{"clients": ["no-one"], "rank": 1}]
    run = tmp_path / "served"
    shutil.copytree(ran.path, run)
    (run / "recipe.toml").write_text(render(bind({**tables, "data": served, "override": overrides})))
    assert fedtune.evaluate(run, data=other) == expected
    merged = fedtune.export(run, form="merged")
    weights = [path.read_bytes() for path in sorted(merged.glob("*.safetensors"))]
    assert weights == [
        path.read_bytes() for path in sorted(fedtune.export(ran.path, form="merged").glob("*.safetensors"))
    ]
    with pytest.raises(ConfigError, match=r"data\.test: expected data to score on; got a run whose.*--data FILE"):
        fedtune.evaluate(run)


def test_an_adapter_of_another_base_is_refused(ran: api.Run, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    model.save_pretrained(other)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (other / file).write_bytes((checkpoints["llama"] / file).read_bytes())
    recipe = ran.path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(str(checkpoints["llama"]), str(other)))
    with pytest.raises(ConfigError, match=r"model\.base: expected the base that .* was trained on .*got another one"):
        fedtune.evaluate(ran.path)
    with pytest.raises(ConfigError, match="got another one"):
        fedtune.export(ran.path, form="merged")


@pytest.mark.usefixtures("unrendered")
def test_a_run_that_was_killed_can_be_used(ran: api.Run) -> None:
    (ran.path / "summary.json").unlink()
    assert fedtune.evaluate(ran.path)["after"]["loss"] == pytest.approx(ran.summary["after"]["test"]["loss"], abs=1e-5)
    assert fedtune.export(ran.path).is_dir()
    assert "the run has not finished" in api.report(ran.path).read_text()


def test_a_comparison_refuses_a_folder_that_is_no_run_before_it_runs_anything(tables: Tables, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="expected a run directory"):
        fedtune.compare([tmp_path], out=tmp_path / "compare")
    assert not (tmp_path / "compare").exists()


@pytest.mark.parametrize(("copies", "seeds"), [(1, [0, 0]), (2, [0])])
def test_a_comparison_refuses_twins_before_it_runs_anything(
    copies: int, seeds: list[int], ran: api.Run, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="got tiny with seed 0 more than once"):
        fedtune.compare([ran.path / "recipe.toml"] * copies, seeds=seeds, out=tmp_path / "compare")
    assert not (tmp_path / "compare").exists()


def test_a_client_whose_loss_is_nan_is_left_out_by_name_and_the_run_goes_on(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.client.perform import perform as honest
    from fedtune.errors import ClientError
    from fedtune.runs import local

    def poisoned(base: Any, examples: Any, assignment: Any, **options: Any) -> Any:
        if assignment.plan.client == "client-1":
            with torch.no_grad():
                weight = base.model.lm_head.weight
                kept = weight.clone()
                weight.fill_(float("nan"))
            try:
                return honest(base, examples, assignment, **options)
            finally:
                with torch.no_grad():
                    weight.copy_(kept)
        return honest(base, examples, assignment, **options)

    monkeypatch.setattr(local, "perform", poisoned)
    run = fedtune.simulate(tables, out=tmp_path / "run")
    assert [failure["client"] for failure in run.summary["failures"]] == ["client-1", "client-1"]
    assert "expected a finite loss; got nan" in run.summary["failures"][0]["reason"]
    assert run.summary["state"] == "finished"
    assert ClientError.__name__ not in run.summary["failures"][0]["reason"]


def test_a_round_that_cannot_be_completed_leaves_the_rounds_before_it(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.client.perform import perform as honest
    from fedtune.errors import ClientError
    from fedtune.runs import local

    def tired(base: Any, examples: Any, assignment: Any, **options: Any) -> Any:
        if assignment.round == 2:
            raise ClientError(f"{assignment.plan.client}: no power")
        return honest(base, examples, assignment, **options)

    monkeypatch.setattr(local, "perform", tired)
    with pytest.raises(RoundError, match="round 2: expected at least 1 usable updates"):
        fedtune.simulate(tables, out=tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["state"], summary["rounds"]) == ("interrupted", 1)
    assert "round 2" in summary["reason"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_ctrl_c_leaves_the_rounds_before_it_and_says_where(tables: Tables, tmp_path: Path) -> None:
    notes: list[str] = []

    def watch(event: Any) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        if isinstance(event, RoundFinished) and event.record.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedtune.simulate(tables, out=tmp_path / "run", watch=watch)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["state"], summary["rounds"]) == ("interrupted", 1)
    assert read_run(tmp_path / "run").summary is not None
    assert str(tmp_path / "run") in notes[-1]


Break = Callable[[Tables], Any]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t["adapter"].update(targets=["c_attn"]), r"adapter\.targets: .*'c_attn', which matches nothing"),
        (lambda t: t["adapter"].update(rank=17), r"adapter\.rank: expected at most 16, the smaller side of .*v_proj"),
        (lambda t: t["override"].append({"clients": ["nobody"], "rank": 1}), r"override\.clients: .*match none"),
        (lambda t: t["data"]["split"].update(by="whom"), r"data\.split\.by: .*whom"),
        (lambda t: t["data"].update(source="gone.jsonl"), r"data\.source"),
        (lambda t: t["model"].update(base="gone"), r"model\.base: expected a folder"),
    ],
)  # fmt: skip
def test_bad_input_gives_one_clear_error_and_leaves_nothing(
    damage: Break, message: str, tables: Tables, tmp_path: Path
) -> None:
    damage(tables)
    with pytest.raises(ConfigError, match=message):
        fedtune.simulate(tables, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_killed_run_goes_on_with_its_own_recipe_or_with_one_for_more_rounds(
    tables: Tables, tmp_path: Path, simulated: Simulated
) -> None:
    def killed(event: Any) -> None:
        if isinstance(event, RoundFinished) and event.record.round == 1:
            raise SystemExit  # nothing is tidied up, as with a kill

    with pytest.raises(SystemExit):
        fedtune.simulate(tables, out=tmp_path / "run", watch=killed)
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed = fedtune.simulate(resume=tmp_path / "run")
    assert resumed.summary["adapter_digest"] == simulated(tables, tmp_path / "whole").summary["adapter_digest"]
    longer = fedtune.simulate(tables, overrides=["rounds.count=3"], resume=tmp_path / "run")
    assert longer.summary["rounds"] == 3
    assert bind(tmp_path / "run" / "recipe.toml").rounds.count == 3
    assert [record.round for record in read_run(tmp_path / "run").rounds] == [0, 1, 2, 3]


def test_another_recipe_is_refused_with_the_difference_and_leaves_the_runs_own(tables: Tables, ran: api.Run) -> None:
    before = (ran.path / "recipe.toml").read_text()
    with pytest.raises(ConfigError, match=r"client.steps: 3 -> 4"):
        fedtune.simulate(tables, overrides=["client.steps=4"], resume=ran.path)
    assert (ran.path / "recipe.toml").read_text() == before


def test_an_edited_recipe_of_a_run_is_held_against_its_journal(ran: api.Run) -> None:
    recipe = ran.path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("seed = 0", "seed = 7"))
    with pytest.raises(ConfigError, match=r"seed: 0 -> 7"):
        fedtune.simulate(resume=ran.path)


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="expected a run directory"):
        fedtune.simulate(resume=tmp_path)
    with pytest.raises(ConfigError, match="a recipe, or a run to resume"):
        fedtune.simulate()


def test_a_taken_run_directory_is_refused_unless_fresh(tables: Tables, tmp_path: Path, ran: api.Run) -> None:
    with pytest.raises(StoreError, match="--fresh"):
        fedtune.simulate(tables, out=ran.path)
    assert fedtune.simulate(tables, out=ran.path, fresh=True).path == tmp_path / "run-2"


def test_one_client_and_one_round_work(tables: Tables, tmp_path: Path) -> None:
    tables["data"]["split"] = {"kind": "iid", "clients": 1}
    tables["rounds"] = {"count": 1}
    del tables["override"]
    assert fedtune.simulate(tables, out=tmp_path / "run").summary["state"] == "finished"


def test_a_classifier_is_tuned_with_its_head(tables: Tables, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"text": f"the {'quick' if i % 2 else 'lazy'} dog {i}", "label": f"l{i % 2}"} for i in range(40)]
    data = tmp_path / "labels.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables["model"] |= {"base": str(checkpoints["bert"]), "task": "classification"}
    tables["adapter"] = {"rank": 4, "targets": ["query", "value"]}
    tables["data"] |= {"source": str(data), "split": {"kind": "dirichlet", "by": "label", "alpha": 5.0, "clients": 3}}
    tables["client"] = {"steps": 10, "batch": 8, "learning_rate": 0.02}
    tables["evaluate"] = {"batch": 8}
    run = fedtune.simulate(tables, out=tmp_path / "run")
    assert run.summary["after"]["test"]["loss"] < run.summary["before"]["test"]["loss"]
    assert {"accuracy", "macro_f1"} <= run.summary["after"]["test"].keys()
    assert "base_model.model.classifier.weight" in (run.adapter / "adapter_model.safetensors").read_bytes().decode(
        "latin1"
    )
    assert fedtune.evaluate(run.path)["after"]["loss"] == pytest.approx(run.summary["after"]["test"]["loss"], abs=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_reports_and_comparisons_are_drawn_from_real_runs(tables: Tables, tmp_path: Path, ran: api.Run) -> None:
    assert api.report(ran.path).read_text().startswith("<!doctype html>")
    other = fedtune.simulate({**tables, "name": "other", "method": {"name": "zeropad"}}, out=tmp_path / "other")
    page = fedtune.compare([ran.path, other.path], out=tmp_path / "compare")
    assert "zeropad" in page.read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("unrendered")
def test_seeds_on_simulated_phones_cost_joules_and_compare_by_them(tables: Tables, tmp_path: Path) -> None:
    run = fedtune.simulate({**kseed(tables, bank="kron"), "fleet": {"name": "phones"}}, out=tmp_path / "phones")
    rounds = read_run(run.path).rounds[1:]
    asked = [client for record in rounds for client in record.clients.values()]
    assert asked
    for client in asked:
        assert client.joules is not None
        assert client.compute_s is not None
        assert client.joules > 2.9 * client.compute_s  # watts of the weakest phone
    page = fedtune.compare([run.path], out=tmp_path / "compare", budgets=["1MJ"])
    parts = json.loads(page.with_name("comparison.json").read_text())["protocols"]["under_budget"]
    assert {part["resource"]: part["budget"] for part in parts}["joules"] == 1e6


def test_the_public_names_are_all_there() -> None:
    assert sorted(dir(fedtune)) == sorted(fedtune.__all__)
    for name in fedtune.__all__:
        assert getattr(fedtune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        fedtune.train  # noqa: B018


@pytest.mark.usefixtures("unrendered")
def test_a_model_that_diverges_is_recorded_and_reported(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.runs import local
    from fedtune.runs.context import ModelScores

    lost = {"loss": float("nan"), "perplexity": float("inf")}
    monkeypatch.setattr(local, "score", lambda *a, **k: ModelScores(test=lost, held_out={"client-0": lost}))
    run = fedtune.simulate(tables, out=tmp_path / "run")
    lines = [json.loads(line) for line in (run.path / "rounds.jsonl").read_text().splitlines()]
    assert lines[-1]["test"] == {"loss": None, "perplexity": None}
    assert api.report(run.path).exists()


def test_an_example_longer_than_the_bases_positions_is_refused(tables: Tables, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    row = json.dumps({"text": 90 * "fox dog ", "who": "client-1"})
    data.write_text(Path(tables["data"]["source"]).read_text() + row + "\n")
    tables["data"] |= {"source": str(data), "max_tokens": 500}
    message = r"data\.max_tokens: expected examples of at most 128 tokens.*set data\.max_tokens = 128"
    with pytest.raises(ConfigError, match=message):
        fedtune.simulate(tables, out=tmp_path / "run")


@pytest.mark.usefixtures("unrendered")
def test_a_comparison_goes_on_without_the_recipe_that_broke_off(tables: Tables, tmp_path: Path) -> None:
    from fedtune.config import bind, render

    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(render(bind({**tables, "name": "good"})))
    # No norm is below a millionth of the median, so every round lacks updates.
    bad.write_text(render(bind({**tables, "name": "bad", "rounds": {"count": 1, "min_clients": 3, "max_norm": 1e-6}})))
    notes: list[str] = []
    page = fedtune.compare(
        [bad, good],
        out=tmp_path / "compare",
        watch=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert "good" in page.read_text()
    assert any("bad, seed 0: left out of the comparison: round 1" in note for note in notes)


@pytest.mark.usefixtures("unrendered")
def test_a_comparison_goes_on_without_the_recipe_whose_data_are_refused(tables: Tables, tmp_path: Path) -> None:
    from fedtune.config import bind, render

    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(render(bind({**tables, "name": "good"})))
    # Which clients there are is known once the data are read.
    bad.write_text(render(bind({**tables, "name": "bad", "override": [{"clients": ["other"], "rank": 2}]})))
    notes: list[str] = []
    page = fedtune.compare(
        [bad, good],
        out=tmp_path / "compare",
        watch=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert "good" in page.read_text()
    assert any("bad, seed 0: left out of the comparison: override.clients: " in note for note in notes)
    with pytest.raises(RoundError, match="expected at least one run to compare; none was finished"):
        fedtune.compare([bad], out=tmp_path / "none", watch=lambda event: None)


@pytest.mark.usefixtures("unrendered")
def test_a_run_of_seeds_says_what_it_did_and_can_be_read_scored_and_reported(seeded: api.Run) -> None:
    method = bind(seeded.path / "recipe.toml").method
    assert isinstance(method, FedKSeedSettings)
    kron = method.bank == "kron"
    assert seeded.adapter == seeded.path / "seeds"
    assert not (seeded.path / "adapter").exists()
    assert (seeded.adapter / "ledger.ftks").stat().st_size == 60 + 4 * 64
    model = AutoModelForCausalLM.from_pretrained(base_of(seeded))
    weights = {name: p.numel() for name, p in model.named_parameters() if not kron or name.endswith("proj.weight")}
    assert seeded.summary["trainable"] == sum(weights.values())
    assert seeded.summary["before"]["test"]["loss"] != seeded.summary["after"]["test"]["loss"]
    assert set(seeded.summary["sample"]) == {"prompt", "before", "after"}
    found = read_run(seeded.path)
    assert [record.round for record in found.rounds] == [0, 1, 2, 3]
    lines = [json.loads(line) for line in (seeded.path / "rounds.jsonl").read_text().splitlines()]
    assert lines[0]["figures"] == {}
    assert lines[1]["figures"]["sum_abs"] > 0
    assert lines[3]["figures"]["rounds_left"] > 1000
    assert {client["rank"] for line in lines for client in line["clients"].values()} == {None}
    assert all(client["bytes_up"] < 120 for line in lines for client in line["clients"].values())
    scores = fedtune.evaluate(seeded.path)
    assert scores["before"]["loss"] == pytest.approx(seeded.summary["before"]["test"]["loss"], abs=1e-6)
    assert scores["after"]["loss"] == pytest.approx(seeded.summary["after"]["test"]["loss"], abs=1e-6)
    assert "fedkseed" in api.report(seeded.path).read_text()
    assert api.status(seeded.path).committed == 3


@pytest.mark.parametrize("bank", [pytest.param("hadamard", marks=pytest.mark.slow), "kron"])
def test_seeds_alone_learn(bank: str, tables: Tables, tmp_path: Path) -> None:
    """Scalars along seeds must clearly lower the loss, by a step that the first round measures."""
    recipe = kseed(tables, bank, seeds=256, scalar_step="auto")
    recipe |= {"client": {"steps": 24, "batch": 6, "learning_rate": 3e-3}, "rounds": {"count": 5}}
    run = fedtune.simulate(recipe | {"evaluate": {"every": 0}}, out=tmp_path / "run")
    assert run.summary["after"]["test"]["loss"] < 0.97 * run.summary["before"]["test"]["loss"]
    lines = [json.loads(line) for line in (run.path / "rounds.jsonl").read_text().splitlines()]
    assert [line["figures"]["seeds_moved"] > 0 for line in lines[1:]] == [False, True, True, True, True]


@pytest.mark.parametrize("seeded", ["hadamard"], indirect=True)
def test_the_same_recipe_and_seed_give_the_same_integers(seeded: api.Run, tables: Tables, tmp_path: Path) -> None:
    again, other = (
        fedtune.simulate({**kseed(tables), "seed": seed}, out=tmp_path / str(seed)).adapter / "ledger.ftks"
        for seed in (0, 1)
    )
    assert (seeded.adapter / "ledger.ftks").read_bytes() == again.read_bytes() != other.read_bytes()


@pytest.mark.parametrize(("sampling", "rounds"), [("uniform", (1, 3)), ("pro", (2,))])
def test_a_run_of_seeds_that_is_killed_goes_on_to_the_same_bits(
    sampling: str, rounds: tuple[int, ...], tables: Tables, tmp_path: Path, simulated: Simulated
) -> None:
    recipe = kseed(tables, sampling=sampling, scalar_step="auto") | {"rounds": {"count": 4}}
    whole = simulated(recipe, tmp_path / "whole")
    for round in rounds:

        def killed(event: Any, round: int = round) -> None:
            if isinstance(event, RoundFinished) and event.record.round == round:
                raise SystemExit  # nothing is tidied up, as with a kill

        run = tmp_path / f"killed-{round}"
        with pytest.raises(SystemExit):
            fedtune.simulate(recipe, out=run, watch=killed)
        resumed = fedtune.simulate(resume=run)
        assert digests(run) == digests(whole.path)
        assert (resumed.adapter / "ledger.ftks").read_bytes() == (whole.adapter / "ledger.ftks").read_bytes()
        api.verify(run)


def digests(run: Path) -> list[str]:
    return [json.loads(line)["state_digest"] for line in (run / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("seeded", ["hadamard"], indirect=True)
def test_a_ledger_that_was_edited_is_noticed_and_written_again_by_a_resume(seeded: api.Run) -> None:
    run = seeded.path
    assert api.verify(run).committed == 3
    ledger = run / "seeds" / "ledger.ftks"
    kept = ledger.read_bytes()
    edited = bytearray(kept)
    edited[60] ^= 1
    ledger.write_bytes(edited)
    with pytest.raises(StoreError, match=r"ledger\.ftks: expected the digest .*--resume"):
        api.verify(run)
    # A manifest that was written anew for it, too: the state is what counts.
    manifest.write(run / "seeds", manifest.parse((run / "seeds" / "fedtune.json").read_bytes(), run / "seeds").facts)
    with pytest.raises(StoreError, match=r"expected the seeds of round 3's state; got other integers; .*--resume"):
        api.verify(run)
    ledger.write_bytes(kept[:-1])
    with pytest.raises(StoreError, match=r"ledger\.ftks: expected the 316 bytes"):
        api.verify(run)
    fedtune.simulate(resume=run)
    assert ledger.read_bytes() == kept
    api.verify(run)


@pytest.mark.parametrize("seeded", ["hadamard"], indirect=True)
def test_a_trainable_tensor_that_was_left_out_of_the_seeds_is_noticed(seeded: api.Run) -> None:
    """The ledger alone does not say which tensors it moves: the folder does, and that counts as well."""
    run = seeded.path
    origin = run / "seeds" / "fedtune.json"
    told = json.loads(origin.read_text())
    origin.write_text(json.dumps({**told, "trainable": told["trainable"][1:]}))
    with pytest.raises(StoreError, match="seeds"):
        api.verify(run)


@pytest.mark.usefixtures("unrendered")
def test_runs_of_seeds_and_of_adapters_are_set_side_by_side(ran: api.Run, tables: Tables, tmp_path: Path) -> None:
    other = fedtune.simulate({**kseed(tables), "name": "seeds"}, out=tmp_path / "other")
    page = fedtune.compare([ran.path, other.path], out=tmp_path / "compare")
    assert "fedkseed" in page.read_text()


def test_a_run_has_its_rounds_as_a_table_and_a_view_for_notebooks(ran: api.Run) -> None:
    rounds = ran.rounds
    assert [row["round"] for row in rounds] == [0, 1, 2]
    assert rounds[-1]["test_loss"] == ran.summary["after"]["test"]["loss"]
    assert sum(row["bytes_up"] for row in rounds) == ran.summary["bytes_up"]
    frame = ran.to_pandas()
    assert frame.loc[2, "test_loss"] == rounds[2]["test_loss"]
    assert list(frame.columns) == [key for key in rounds[-1] if key != "round"]
    assert "tiny" in ran._repr_html_()


@pytest.mark.usefixtures("unrendered")
def test_the_page_is_drawn_when_it_is_asked_for_and_once(ran: api.Run) -> None:
    page = ran.path / "report.html"
    assert not page.exists()
    assert ran.report == page
    assert not (ran.path / "plots").exists()  # pictures for a paper are drawn by `fedtune report`
    drawn = page.stat().st_mtime_ns
    assert ran.report.stat().st_mtime_ns == drawn
    os.utime(page, ns=(0, 0))  # as if the run went on since
    assert ran.report.stat().st_mtime_ns > 0


def test_python_shows_progress_and_remarks_as_the_command_line_does(
    tables: Tables, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables |= {"data": {**tables["data"], "max_tokens": 8}, "rounds": {"count": 1}}
    run = fedtune.simulate(tables, out=tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["reading the data, tokenizing ...", "loading the base ..."]
    assert any("their ends were cut" in line for line in lines)
    assert any(line.startswith("round 1/1") for line in lines)
    assert run.summary["seconds"] > sum(row["seconds"] for row in run.rounds)  # loading included
    fedtune.simulate(tables, out=tmp_path / "silent", watch=lambda event: None)
    assert capsys.readouterr() == ("", "")


def test_a_taken_folder_is_refused_before_anything_is_loaded(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("fedtune.api.load", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(StoreError, match="expected a new or an empty folder"):
        fedtune.simulate(tables, out=tmp_path)
