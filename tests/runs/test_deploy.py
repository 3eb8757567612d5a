"""A run with pruning from its recipe to what devices get: planned, resumed, scored in three views, loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import fedtune
from fedtune import api
from fedtune.errors import ConfigError, RoundError, StoreError
from fedtune.rounds.events import Note
from fedtune.runs import trained_run
from tests.runs.conftest import Tables, spine

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def lines_of(run: api.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "rounds.jsonl").read_text().splitlines()]


def test_a_round_says_what_was_chosen_and_why_and_how_long_it_took(shrunk: api.Run) -> None:
    lines = lines_of(shrunk)
    assert {client["ratio"] for client in lines[1]["clients"].values()} == {0.0}  # nobody knows what to prune yet
    assert {client["ratio"] for client in lines[-1]["clients"].values()} == {0.5}  # what is deployed
    for line in lines[1:]:
        for client in line["clients"].values():
            assert client["why"]
            assert client["compute_s"] > 0
            assert client["importance"] > 0
        slowest = max(c["compute_s"] + c["transfer_s"] + c["overhead_s"] for c in line["clients"].values())
        assert line["clock_s"] == pytest.approx(lines[line["round"] - 1]["clock_s"] + slowest)
    devices = shrunk.summary["devices"]
    assert set(devices["clients"].values()) <= {"tx2", "xavier-nx", "agx-xavier"}
    assert "simulated" in devices["clock"]


@pytest.mark.parametrize(
    "planner",
    [
        "deadline",
        "s-ucb",
        "thompson",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ucb", "random", "oracle")),
    ],
)
def test_learning_survives_a_resume_to_the_bit(planner: str, tables: Tables, tmp_path: Path) -> None:
    recipe = spine(tables, planner={"name": planner}, fleet={"by": "round"}, evaluate={"every": 0}, rounds={"count": 4})
    whole = fedtune.simulate(recipe, out=tmp_path / "whole")
    seen = 0

    def killed(event: Any) -> None:
        nonlocal seen
        seen += type(event).__name__ == "ClientFinished"
        if seen == 8:  # within the third round
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedtune.simulate(recipe, out=tmp_path / "part", watch=killed)
    rest = fedtune.simulate(resume=tmp_path / "part")
    assert rest.summary["state_digest"] == whole.summary["state_digest"]
    assert rest.summary["clock_s"] == whole.summary["clock_s"]
    assert [line["clients"].keys() for line in lines_of(rest)] == [line["clients"].keys() for line in lines_of(whole)]
    for one, other in zip(lines_of(rest), lines_of(whole), strict=True):
        for name, client in one["clients"].items():
            assert (client["ratio"], client["rank"], client["why"]) == tuple(
                other["clients"][name][key] for key in ("ratio", "rank", "why")
            )


@pytest.mark.slow
def test_worker_processes_come_to_the_same_bits(shrunk: api.Run, tables: Tables, tmp_path: Path) -> None:
    again = fedtune.simulate(spine(tables, engine={"name": "processes", "workers": 2}), out=tmp_path / "again")
    assert again.summary["state_digest"] == shrunk.summary["state_digest"]
    assert again.summary["clock_s"] == shrunk.summary["clock_s"]


def test_what_devices_get_loads_and_gives_the_same_logits(shrunk: api.Run, tables: Tables) -> None:
    notes: list[Any] = []
    folder = fedtune.deploy(shrunk.path, watch=notes.append)
    told = json.loads((folder / "deploy.json").read_text())
    assert set(told["devices"].values()) == {"ratio-0.5"}
    assert told["ratios"]["0.5"]["forms"][:2] == ["recipe", "model"]
    place = folder / "ratio-0.5"
    model = fedtune.load_pruned(place / "model")
    trained = trained_run.load_run(shrunk.path)
    ids = torch.tensor([[5, 6, 7, 8]])
    from fedtune.model.lora import with_adapters
    from fedtune.model.pruned_training import with_pruned_model
    from fedtune.model.repair import repair_of
    from fedtune.pruning.structure import cuts, slice_adapter

    keep, body = trained.structure(0.5), trained.experiment.blueprint.anatomy
    assert keep is not None
    assert body is not None
    pruning = trained.experiment.recipe.pruning
    assert pruning is not None
    repair = repair_of(trained.experiment.base.model, trained.tuned.moments, pruning, body)
    assert repair is not None
    with with_pruned_model(trained.experiment.base, keep, body, repair) as small, torch.inference_mode():
        with with_adapters(small, frozen=slice_adapter(trained.tuned.adapter, cuts(keep, body))) as live:
            expected = live(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
    # From base, structure, moments and adapter.
    small_one = fedtune.load_pruned(place / "recipe")
    with torch.inference_mode():
        torch.testing.assert_close(small_one(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
    # The recipe form: stock peft over the whole base.
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tables["model"]["base"]), place / "recipe")
    with with_adapters(trained.experiment.base, frozen=trained.tuned.adapter) as live, torch.inference_mode():
        torch.testing.assert_close(merged(input_ids=ids).logits, live(input_ids=ids).logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="fedtune-pruned-llama"):
        AutoModelForCausalLM.from_pretrained(place / "model")


def test_equal_widths_load_in_stock_transformers(tables: Tables, tmp_path: Path) -> None:
    run = fedtune.simulate(spine(tables, pruning={"allocation": "uniform"}, rounds={"count": 3}), out=tmp_path / "even")
    folder = fedtune.deploy(run.path) / "ratio-0.5"
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        stock = AutoModelForCausalLM.from_pretrained(folder / "stock")(input_ids=ids).logits
        torch.testing.assert_close(
            stock, fedtune.load_pruned(folder / "model")(input_ids=ids).logits, atol=1e-5, rtol=0
        )


def test_an_order_that_was_exported_starts_another_run(shrunk: api.Run, tables: Tables, tmp_path: Path) -> None:
    folder = fedtune.deploy(shrunk.path, out=tmp_path / "out")
    ranking = str(folder / "ratio-0.5" / "recipe" / "pruning.json")
    run = fedtune.simulate(spine(tables, pruning={"ranking": ranking}, rounds={"count": 1}), out=tmp_path / "next")
    # The only round is the last one as well, and needs no round before it that ranks heads and channels.
    assert {client["ratio"] for client in lines_of(run)[1]["clients"].values()} == {0.5}
    other = {**spine(tables), "model": {**tables["model"], "base": "embedded"}, "pruning": {"ranking": ranking}}
    with pytest.raises(ConfigError, match="to hold the base"):
        fedtune.simulate(other, out=tmp_path / "other")


@pytest.mark.parametrize("policy", ["local", "vote"])
def test_the_other_policies_run(policy: str, tables: Tables, tmp_path: Path) -> None:
    run = fedtune.simulate(spine(tables, pruning={"policy": policy}), out=tmp_path / policy)
    lines = lines_of(run)
    assert {c["status"] for line in lines[1:] for c in line["clients"].values()} == {"ok"}
    assert {c["ratio"] for c in lines[-1]["clients"].values()} == {0.5}
    assert trained_run.has_shared_ranking(run.path) == (policy == "vote")
    if policy == "local":
        with pytest.raises(ConfigError, match="one ranking for all"):
            fedtune.deploy(run.path)
    else:
        assert all(len({c["ratio"] for c in line["clients"].values()}) == 1 for line in lines[1:])


def test_stages_and_fixed_ratios_per_client_run(tables: Tables, tmp_path: Path) -> None:
    recipe = spine(
        tables,
        pruning={"stages": 2, "steps_between": 1},
        override=[{"clients": ["client-1"], "ratio": 0.25}, {"clients": ["client-2"], "ratio": 0.0, "rank": 2}],
    )
    recipe["planner"] = {"name": "fixed", "ratio": 0.5}
    run = fedtune.simulate(recipe, out=tmp_path / "staged")
    last = lines_of(run)[-1]["clients"]
    assert {name: client["ratio"] for name, client in last.items()} == {
        "client-0": 0.5,
        "client-1": 0.25,
        "client-2": 0.0,
    }
    ratios = trained_run.deployed_ratios(run.path, 0.0)
    assert set(ratios.values()) <= {0.0, 0.25, 0.5}


def test_a_budget_that_nothing_fits_is_refused_with_what_would(tables: Tables, tmp_path: Path) -> None:
    tiny = [{"clients": ["client-0"], "memory_gb": 0.1}]
    run = fedtune.simulate(spine(tables, device=tiny, rounds={"count": 1}), out=tmp_path / "one")
    out = lines_of(run)[-1]["clients"]["client-0"]
    assert out["status"] == "unfit"
    assert "expected at least" in out["reason"]
    assert "has 0.1 GB" in out["reason"]
    everybody = [{"clients": ["*"], "memory_gb": 0.1}]
    with pytest.raises(RoundError, match="round 1: expected a client that can do something; got none: client-0: "):
        fedtune.simulate(spine(tables, device=everybody), out=tmp_path / "none")


Change = Callable[[Tables], None]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pruning": {"target": 0.9}}, "pruning.target"),
        ({"pruning": {"stages": 0}}, "pruning.stages"),
        ({"method": {"coverage_floor": 0.0}}, "method.coverage_floor"),
        ({"planner": {"ratios": [0.0, 0.25]}}, "planner.ratios: expected pruning.target = 0.5 among them; got 0, 0.25"),
        ({"planner": {"ratios": [0.0, 0.75]}}, "planner.ratios: expected pruning.target = 0.5 among them"),
        ({"planner": {"ratios": [0.5]}}, r"planner.ratios: expected 0 among them .*the first round prunes no client"),
        ({"planner": {"name": "ucb", "explore": 2}}, "planner.explore: expected nothing with the planner 'ucb'"),
        ({"planner": {"reward": "fedmp"}}, "planner.reward: expected nothing with the planner 'deadline'"),
        ({"planner": {"name": "s-ucb", "deadline_s": 3.0}}, "planner.deadline_s: expected nothing"),
        ({"planner": {"name": "random"}, "fleet": {"late": "drop"}}, "fleet.late: expected 'wait' with the planner"),
        ({"rounds": {"over_select": 1.5}}, r"rounds.over_select: expected 1 with \[fleet\]"),
        ({"pruning": {"policy": "vote", "target": 0.0}}, "pruning.target: expected above 0 with 'vote'"),
        ({"pruning": {"stages": 65}}, "pruning.stages: expected"),
        ({"device": [{"clients": ["[ab"], "memory_gb": 4.0}]}, r"device.0.clients: expected a glob with every \["),
        ({"device": [{"clients": ["client-0"]}]}, "device.0: expected something that changes"),
        (
            {"device": [{"clients": ["client-0"], "mode_period_s": 1e-9}]},
            "device.0.mode_period_s: expected a finite",
        ),
        ({"planner": {"ratios": [0.0, 1.0, 0.5]}}, r"planner\.ratios: expected a list, each item a number"),
        ({"planner": {"ranks": [0, 2]}}, r"planner\.ranks: expected a list, each item a whole number"),
        ({"planner": {"ratios": []}}, "planner.ratios: expected at least one number"),
        ({"planner": {"ratios": [1.5]}}, "planner.ratios"),
        ({"pruning": {"score": "magnitude", "allocation": "global"}}, "pruning.allocation: expected uniform"),
        ({"override": [{"clients": ["client-0"], "rank": 2}]}, "override.0.rank: expected nothing with the planner"),
        ({"device": [{"clients": ["client-0"], "memory_gb": -1.0}]}, "device.0.memory_gb: expected a finite number"),
        ({"device": [{"clients": ["client-0"], "profile": "tx3"}]}, 'did you mean "tx2"'),
        ({"device": [{"clients": ["client-0"], "memory": 4}]}, "device.0.memory: unknown key"),
        ({"planner": {"name": "oracle"}}, r"planner: expected another, without fleet\.by = 'round'"),
        (
            {"planner": {"name": "oracle"}, "client": {"steps": None, "epochs": 1}},
            "client.epochs: expected none, but cl",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(changes: Tables, said: str, tables: Tables) -> None:
    with pytest.raises(ConfigError, match=said):
        fedtune.bind(spine(tables, **changes))


@pytest.mark.parametrize("method", ["fedit", "ffa", "zeropad", "hetlora", "flexlora", "fedex"])
def test_methods_that_cannot_take_pruned_clients_say_why(method: str, tables: Tables) -> None:
    recipe = spine(tables, planner={"name": "fixed"}, method={"name": method})
    recipe["planner"] = {"name": "fixed"}
    with pytest.raises(
        ConfigError, match=rf"pruning: expected no table with this method; got '{method}': .*use method"
    ):
        fedtune.bind(recipe)


def test_a_ratio_without_the_table_is_refused(tables: Tables) -> None:
    with pytest.raises(ConfigError, match=r"planner.ratio: expected 0 without the table pruning"):
        fedtune.bind({**tables, "planner": {"name": "fixed", "ratio": 0.5}})
    with pytest.raises(ConfigError, match=r"override.0.ratio: expected 0 without the table pruning"):
        fedtune.bind({**tables, "override": [{"clients": ["client-0"], "ratio": 0.5}]})


def test_runs_without_pruning_have_no_pruned_models(ran: api.Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected one with \[pruning\]"):
        fedtune.deploy(ran.path)
    with pytest.raises(ConfigError, match=r"expected one with \[pruning\]"):
        fedtune.views(ran.path)
    with pytest.raises(StoreError):
        fedtune.deploy(tmp_path / "nowhere")


def test_a_folder_that_holds_files_is_left_alone(shrunk: api.Run, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    with pytest.raises(StoreError, match="a new or an empty folder"):
        fedtune.deploy(shrunk.path, out=full)
    with pytest.raises(ConfigError, match=r"numbers from 0 to 0.875"):
        fedtune.deploy(shrunk.path, ratios=[0.95])
    assert not (shrunk.path / "deploy").exists()


def test_the_report_shows_the_choices(shrunk: api.Run) -> None:
    run = shrunk
    page = api.report(run.path).read_text()
    assert "What each client was asked" in page
    assert "Loss by time on the devices" in page
    assert "assumed" in page
    assert (run.path / "plots" / "choices.png").exists()


def test_notes_say_what_could_not_be_written(shrunk: api.Run) -> None:
    notes: list[Any] = []
    fedtune.deploy(shrunk.path, watch=notes.append)
    said = [note.text for note in notes if isinstance(note, Note)]
    stock = (shrunk.path / "deploy" / "ratio-0.5" / "stock").exists()
    assert stock != any("no folder stock: expected" in text for text in said)


def test_the_summary_tells_the_deployed_model_and_the_time_on_the_devices(shrunk: api.Run) -> None:
    from rich.console import Console

    from fedtune.terminal.summary import show_summary

    ran = shrunk
    lines = [json.loads(line) for line in (ran.path / "rounds.jsonl").read_text().splitlines()]
    assert ran.summary["deployed"] == lines[-1]["deployed"]
    console = Console(record=True, width=160)
    show_summary(console, ran.summary)
    said = console.export_text()
    assert "test data, as deployed" in said
    assert "on the devices" in " ".join(said.split())


def test_a_run_that_prunes_no_client_in_training_is_noted(tables: Tables, tmp_path: Path) -> None:
    said: list[str] = []
    watch = lambda event: said.append(event.text) if isinstance(event, Note) else None  # noqa: E731
    fedtune.simulate(
        spine(tables, planner={"name": "fixed", "goal": None, "ratios": None, "ranks": None}, rounds={"count": 1}),
        out=tmp_path / "run",
        watch=watch,
    )
    assert any("no client is pruned in training" in text for text in said)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5])
def test_a_recipe_and_its_base_give_the_model(ratio: float, shrunk: api.Run, tables: Tables, tmp_path: Path) -> None:
    out = fedtune.deploy(shrunk.path, out=tmp_path / "out", ratios=[ratio]) / f"ratio-{ratio:g}"
    ids = torch.arange(5, 17)[None]
    with torch.inference_mode():
        one, other = (fedtune.load_pruned(out / form)(input_ids=ids).logits for form in ("model", "recipe"))
        named = fedtune.load_pruned(out / "recipe", base=tables["model"]["base"], dtype="bfloat16")
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert next(named.parameters()).dtype == torch.bfloat16


def test_a_recipe_of_another_base_is_refused(shrunk: api.Run, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out = fedtune.deploy(shrunk.path, out=tmp_path / "out", ratios=[0.5]) / "ratio-0.5" / "recipe"
    with pytest.raises(ConfigError, match=r"pruning: expected .*to hold the base"):
        fedtune.load_pruned(out, base=checkpoints["gpt2"])
    with pytest.raises(ConfigError, match=r"model\.base|nowhere"):
        fedtune.load_pruned(out, base=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="dtype: expected one of"):
        fedtune.load_pruned(out, dtype="int3")


def test_a_recipe_that_is_damaged_is_refused(shrunk: api.Run, tmp_path: Path) -> None:
    out = fedtune.deploy(shrunk.path, out=tmp_path / "out", ratios=[0.5]) / "ratio-0.5" / "recipe"
    told = json.loads((out / "fedtune.json").read_text())
    for broken in ({k: v for k, v in told.items() if k != "seed"}, {**told, "base": None}):
        (out / "fedtune.json").write_text(json.dumps(broken))
        with pytest.raises(StoreError, match=r"fedtune\.json: expected"):
            fedtune.load_pruned(out)


def test_a_drawn_head_comes_along_with_a_recipe(tables: Tables, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Classification: the head that the run trained in full, over a base cut to half."""
    rows = tmp_path / "rows.jsonl"
    words = ("quick fox", "lazy dog")
    rows.write_text(
        "".join(
            json.dumps({"text": f"the {words[i % 2]} {i}", "label": f"l{i % 2}", "who": i % 3}) + "\n"
            for i in range(24)
        )
    )
    recipe = spine(tables, adapter={"targets": ["query", "value"]}, rounds={"count": 3})
    recipe["model"] |= {"base": str(checkpoints["bert"]), "task": "classification"}
    recipe["data"] = {"source": str(rows), "split": {"kind": "key", "by": "who"}, "max_tokens": 16}
    recipe["evaluate"] = {"batch": 8}
    ran = fedtune.simulate(recipe, out=tmp_path / "run")
    out = fedtune.deploy(ran.path, out=tmp_path / "out", ratios=[0.5]) / "ratio-0.5"
    ids = torch.arange(5, 17)[None]
    with torch.inference_mode():
        one, other = (fedtune.load_pruned(out / form)(input_ids=ids).logits for form in ("model", "recipe"))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
