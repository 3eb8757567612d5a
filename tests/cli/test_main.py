from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedtune.api import Run
from fedtune.cli.main import app
from fedtune.config import bind, render
from fedtune.errors import ConfigError, Fault, RoundError, StoreError
from fedtune.rounds.events import Event, Note
from fedtune.runs.export import ReplayResult
from tests.terminal.conftest import HOSTILE

COMMANDS = ("demo", "simulate", "evaluate", "export", "replay", "report", "compare")


RECIPE = """\
model = { base = "embedded" }
adapter = { rank = 8, targets = ["q_proj", "v_proj"] }
method = "flora"
client = { steps = 20, batch = 4, learning_rate = 3e-4 }
rounds = { count = 10 }
data = { source = "train.jsonl", split = { kind = "iid", clients = 4 } }
"""


class Scripted:
    """Stands for a function of `fedtune.api`: keeps how it was called, tells some events, and answers or raises."""

    def __init__(self, answer: Any, events: Sequence[Event] = ()) -> None:
        self.answer = answer
        self.events = events
        self.positional: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}

    def __call__(self, *positional: Any, watch: Callable[[Event], None] = lambda event: None, **named: Any) -> Any:
        self.positional, self.named = positional, named
        for event in self.events:
            watch(event)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scripted]:
    def put(name: str, answer: Any, events: Sequence[Event] = ()) -> Scripted:
        scripted = Scripted(answer, events)
        home = "runs.export" if name in ("export", "replay") else "api"
        monkeypatch.setattr(f"fedtune.{home}.{name}", scripted)
        return scripted

    return put


@pytest.fixture
def run(tmp_path: Path, summary: Mapping[str, Any]) -> Run:
    return Run(path=tmp_path / "run", summary=summary)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return str(path)


def fedtune(*arguments: str | Path, **environment: str) -> Result:
    return CliRunner(env={"COLUMNS": "110", "FEDTUNE_DEBUG": "", **environment}).invoke(app, [*map(str, arguments)])


def process(code: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_in_its_help(command: str) -> None:
    shown = fedtune(command, "--help")
    assert shown.exit_code == 0
    assert f"fedtune {command}" in shown.stdout


def test_the_help_of_every_argument_is_shown() -> None:
    assert "The experiment, in TOML." in fedtune("simulate", "--help").stdout
    assert "Run directory, e.g. runs/demo." in fedtune("evaluate", "--help").stdout
    assert "Folder of run directories; runs without it." in fedtune("runs", "list", "--help").stdout


def test_help_names_every_command_and_the_first_step() -> None:
    shown = fedtune("--help").stdout
    assert all(command in shown for command in COMMANDS)
    assert "First time here?" in shown


@pytest.mark.parametrize("arguments", [["--help"], ["simulate", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    # typer itself may load pydantic to read options; fedtune's own use of it is in fedtune.config
    heavy = "{'torch', 'transformers', 'numpy', 'matplotlib', 'datasets', 'peft', 'fedtune.config'}"
    code = (
        f"import sys; sys.argv = ['fedtune', *{arguments}]\nfrom fedtune.cli.main import main\n"
        f"try: main()\nfinally: print('heavy', *({heavy} & set(sys.modules)))"
    )
    with process(code) as child:
        out, err = child.communicate()
    assert out.splitlines()[-1].strip() == "heavy", err


def test_the_version_is_one_line() -> None:
    assert fedtune("--version").stdout == f"fedtune {version('fedtune')}\n"


def test_simulate_hands_its_options_on(script: Any, run: Run, recipe: str, tmp_path: Path) -> None:
    simulate = script("simulate", run)
    fedtune("simulate", recipe, "--set", "rounds.count=3", "--set", "method=ffa", "--out", tmp_path / "o", "--fresh")
    (bound,) = simulate.positional
    assert (bound.name, bound.rounds.count, bound.method.name) == ("tiny", 3, "ffa")
    assert simulate.named == {"out": tmp_path / "o", "fresh": True, "resume": None}


def test_progress_goes_to_stderr_and_the_result_to_stdout(
    script: Any, run: Run, recipe: str, events: list[Event]
) -> None:
    script("simulate", run, events)
    ended = fedtune("simulate", recipe)
    assert ended.exit_code == 0
    assert "round 3/3" in ended.stderr
    assert "round 3/3" not in ended.stdout
    assert "2.800 -> 2.300" in ended.stdout
    assert str(run.adapter) in ended.stdout


def test_one_line_of_json_is_all_of_stdout(script: Any, run: Run, recipe: str, events: list[Event]) -> None:
    script("simulate", run, events)
    ended = fedtune("simulate", recipe, "--json")
    (line,) = ended.stdout.splitlines()
    assert json.loads(line) == {
        **run.summary,
        "path": str(run.path),
        "adapter": str(run.adapter),
        "report": str(run.report),
    }
    assert "round 3/3" in ended.stderr


def test_quiet_shows_remarks_only(script: Any, run: Run, events: list[Event]) -> None:
    script("demo", run, [*events, Note(HOSTILE)])
    ended = fedtune("demo", "--quiet")
    assert ended.stderr.splitlines() == ["3 examples were dropped", "[red]evil[/]\\x1b[2J\\u202e"]
    assert ended.stdout == f"{run.path}\n"


def test_all_faults_of_a_recipe_are_told_without_a_traceback(recipe: str) -> None:
    ended = fedtune("simulate", recipe, "--set", "rounds.cuont=3", "--set", "client.steps=0")
    assert ended.exit_code == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("fedtune: tiny.toml: 2 faults\n")
    assert "did you mean rounds.count?" in ended.stderr
    assert "client.steps: expected a whole number of at least 1" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_missing_recipe_says_how_to_get_one(tmp_path: Path) -> None:
    ended = fedtune("simulate", tmp_path / "none.toml")
    assert ended.exit_code == 2
    assert "fedtune demo --write recipe.toml" in ended.stderr


@pytest.mark.parametrize(
    "error", [RoundError("round 3: too few"), StoreError("runs/x: taken"), ConfigError(Fault("a", "b", "c"))]
)
def test_every_error_of_fedtunes_own_is_one_message(script: Any, recipe: str, error: Exception) -> None:
    script("simulate", error)
    ended = fedtune("simulate", recipe)
    assert ended.exit_code == 2
    assert ended.stderr == f"fedtune: {error}\n"


def test_an_error_does_not_obey_the_name_of_a_client(script: Any, recipe: str) -> None:
    script("simulate", RoundError(HOSTILE))
    ended = fedtune("simulate", recipe)
    assert ended.stderr == "fedtune: [red]evil[/]\\x1b[2J\\u202e\n"


@pytest.mark.parametrize("debug", [{"FEDTUNE_DEBUG": "1"}, {}])
def test_debug_lets_an_error_through(script: Any, recipe: str, debug: dict[str, str]) -> None:
    error = RoundError("round 3: too few")
    script("simulate", error)
    assert fedtune("simulate", recipe, *([] if debug else ["--debug"]), **debug).exception is error


def test_an_error_that_is_a_bug_keeps_its_traceback(script: Any, recipe: str) -> None:
    bug = ZeroDivisionError("a bug")
    script("simulate", bug)
    assert fedtune("simulate", recipe).exception is bug


def test_a_full_disk_is_one_message(script: Any, recipe: str) -> None:
    script("simulate", OSError(errno.ENOSPC, "No space left on device", "runs/x/rounds.jsonl"))
    ended = fedtune("simulate", recipe)
    assert ended.exit_code == 2
    assert ended.stderr.startswith("fedtune: runs/x/rounds.jsonl: No space left on device")
    assert "Traceback" not in ended.stderr


def test_ctrl_c_ends_with_130(script: Any, recipe: str) -> None:
    script("simulate", KeyboardInterrupt())
    ended = fedtune("simulate", recipe)
    assert ended.exit_code == 130
    assert ended.stderr.splitlines() == ["fedtune: stopped by Ctrl-C"]


def test_ctrl_c_names_no_option_that_a_command_lacks(script: Any) -> None:
    script("export", KeyboardInterrupt())
    ended = fedtune("export", "runs/x")
    assert (ended.exit_code, ended.stderr) == (130, "fedtune: stopped by Ctrl-C\n")


def test_a_reader_who_left_is_no_error() -> None:
    code = (
        "import sys, fedtune.api; fedtune.api.report = lambda run, tensorboard: 'page'\n"
        "sys.argv = ['fedtune', 'report', 'x']\nfrom fedtune.cli.main import main\nsys.stdin.read(); main()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdin
    assert child.stdout
    assert child.stderr
    child.stdout.close()
    child.stdin.close()  # only now does the child write
    with child.stderr as stderr:
        assert stderr.read() == b""
    assert child.wait() == 1


def test_evaluate_shows_before_and_after(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = script("evaluate", {"before": {"loss": 2.0}, "after": {"loss": 1.0}})
    monkeypatch.setattr("fedtune.runs.trained_run.has_shared_ranking", lambda run: False)
    monkeypatch.setattr("fedtune.store.result.remark", lambda run: f"{run}: not checked")
    shown = fedtune("evaluate", "runs/x")
    assert "2.000" in shown.stdout
    assert shown.stderr == "runs/x: not checked\n"
    ended = fedtune("evaluate", "runs/x", "--data", "other.jsonl", "--examples", "5", "--json")
    assert json.loads(ended.stdout) == {"before": {"loss": 2.0}, "after": {"loss": 1.0}}
    assert evaluate.positional == (Path("runs/x"),)
    assert evaluate.named == {"data": Path("other.jsonl"), "examples": 5}


def test_export_hands_its_options_on_and_prints_the_folder(script: Any) -> None:
    export = script("export", Path("out"), [Note("cut to rank 4: 99 % kept")])
    ended = fedtune("export", "runs/x", "--form", "uniform", "--out", "out", "--max-rank", "4", "--dtype", "float16")
    assert ended.stdout == "out\n"
    assert "cut to rank 4" in ended.stderr
    assert export.named == {
        "form": "uniform",
        "out": Path("out"),
        "max_rank": 4,
        "dtype": "float16",
        "round": None,
        "client": None,
    }


def test_report_prints_the_page(script: Any) -> None:
    report = script("report", Path("runs/x/report.html"))
    assert fedtune("report", "runs/x", "--tensorboard").stdout == "runs/x/report.html\n"
    assert report.named == {"tensorboard": True}


def test_compare_takes_recipes_seeds_and_settings(script: Any) -> None:
    compare = script("compare", Path("page.html"), [Note("a, seed 0")])
    ended = fedtune("compare", "a.toml", "runs/b", "--seeds", "0, 1,2", "--set", "rounds.count=2", "-q")
    assert ended.stdout == "page.html\n"
    assert "a, seed 0" in ended.stderr
    assert compare.positional == ([Path("a.toml"), Path("runs/b")],)
    assert compare.named == {
        "seeds": [0, 1, 2],
        "overrides": ["rounds.count=2"],
        "out": None,
        "budgets": (),
        "target": None,
        "measure": "loss",
    }


def test_compare_takes_budgets_a_target_and_a_measure(script: Any) -> None:
    compare = script("compare", Path("page.html"))
    fedtune(
        "compare", "a.toml", "--budget", "10MB", "--budget", "5kJ", "--target", "3.5", "--measure", "accuracy", "-q"
    )
    asked = {key: compare.named[key] for key in ("budgets", "target", "measure")}
    assert asked == {"budgets": ["10MB", "5kJ"], "target": 3.5, "measure": "accuracy"}


def test_a_budget_without_a_unit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    ended = fedtune("compare", tmp_path / "missing.toml", "--budget", "10")
    assert ended.exit_code == 2
    assert "--budget: expected a number above 0 with a unit, such as 10MB, 600s or 5kJ" in " ".join(
        ended.stderr.split()
    )


def test_seeds_that_are_none_are_told(script: Any) -> None:
    script("compare", Path("page.html"))
    ended = fedtune("compare", "a.toml", "--seeds", "0;1")
    assert ended.exit_code == 2
    assert "such as 0,1,2" in ended.stderr


def test_the_demos_recipe_can_be_written_and_run_but_not_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    ended = fedtune("demo", "--write", path)
    assert ended.exit_code == 0
    assert f"fedtune simulate {path}" in ended.stdout.replace("\n", " ")
    assert Path(str(bind(path).data.source)).is_absolute()  # the data lie beside it
    again = fedtune("demo", "--write", path)
    assert again.exit_code == 2
    assert "expected a new file" in again.stderr


@pytest.fixture
def tiny(tables: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(render(bind(tables)))
    return str(path)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_run_is_made_scored_exported_and_reported(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    ended = fedtune("simulate", tiny, "--set", "rounds.count=1", "--set", "client.steps=1", "--out", path, "--json")
    assert ended.exit_code == 0, ended.stderr
    assert [line.split("  ")[0] for line in ended.stderr.splitlines()] == [
        "reading the data, tokenizing ...",
        "loading the base ...",
        "scoring the base ...",
        "before",
        "round 1/1",
        "answering the prompts, before and after ...",
    ]
    result = json.loads(ended.stdout)
    assert (result["rounds"], result["path"]) == (1, str(path))
    scores = json.loads(fedtune("evaluate", path, "--json").stdout)
    assert scores["after"]["loss"] == pytest.approx(result["after"]["test"]["loss"], abs=1e-5)
    assert fedtune("export", path, "--form", "uniform").stdout == f"{path / 'uniform'}\n"
    taken = fedtune("simulate", tiny, "--out", path)
    assert taken.exit_code == 2
    assert "--fresh" in taken.stderr


def test_a_run_of_seeds_is_made_scored_exported_replayed_and_verified(tables: dict[str, Any], tmp_path: Path) -> None:
    recipe, path = tmp_path / "seeds.toml", tmp_path / "run"
    rest = {key: value for key, value in tables.items() if key not in ("adapter", "override")}
    method = {"name": "fedkseed", "seeds": 16, "scalar_step": 1e-4}
    recipe.write_text(
        render(bind(rest | {"method": method, "client": {"steps": 2, "batch": 2, "learning_rate": 0.01}}))
    )
    ended = fedtune("simulate", recipe, "--out", path, "--json")
    assert ended.exit_code == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["adapter"] == str(path / "seeds")
    assert fedtune("simulate", recipe, "--out", tmp_path / "again", "--quiet").stdout == f"{tmp_path / 'again'}\n"
    scores = json.loads(fedtune("evaluate", path, "--json").stdout)
    assert scores["after"]["loss"] == pytest.approx(told["after"]["test"]["loss"], abs=1e-6)
    exported = fedtune("export", path)
    assert exported.stdout == f"{path / 'merged'}\n"
    weights = exported.stderr.strip().rpartition(" ")[2]
    for ledger in ("seeds", "merged", "seeds/ledger.ftks"):
        replayed = json.loads(fedtune("replay", tables["model"]["base"], path / ledger, "--json").stdout)
        assert replayed == {"base": replayed["base"], "state": told["adapter_digest"], "weights": weights}
    shown = fedtune("replay", tables["model"]["base"], path / "seeds", "--out", tmp_path / "tuned")
    assert [line.split() for line in shown.stdout.splitlines()][1:] == [
        ["state", told["adapter_digest"]],
        ["weights", weights],
        ["path", str(tmp_path / "tuned")],
    ]
    assert (tmp_path / "tuned" / "model.safetensors").exists()
    refused = fedtune("replay", path / "merged", path / "seeds")
    assert refused.exit_code == 2
    assert "a rebuilt one is another" in " ".join(refused.stderr.split())
    assert fedtune("export", path, "--form", "peft").exit_code == 2
    assert fedtune("runs", "verify", path).exit_code == 0
    file = path / "seeds" / "ledger.ftks"
    file.write_bytes(file.read_bytes()[:-4] + b"\1\0\0\0")
    changed = fedtune("runs", "verify", path)
    assert changed.exit_code == 2
    assert "ledger.ftks: expected the digest" in " ".join(changed.stderr.split())


def test_replay_hands_its_options_on_and_prints_the_digests(script: Any) -> None:
    replay = script("replay", ReplayResult("b" * 64, "s" * 64, "w" * 64, None))
    ended = fedtune("replay", "base", "x.ftks", "--trainable", "*.mlp.*", "--trainable", "lm_head.*", "--out", "tuned")
    assert replay.positional == ("base", Path("x.ftks"))
    assert replay.named == {"out": Path("tuned"), "trainable": ["*.mlp.*", "lm_head.*"]}
    assert ended.stdout.splitlines() == [f"base     {'b' * 64}", f"state    {'s' * 64}", f"weights  {'w' * 64}"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_ctrl_c_in_the_first_round_leaves_a_run_that_can_be_reported(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedtune.runs.local.perform", stop)
    path = tmp_path / "run"
    ended = fedtune("simulate", tiny, "--out", path, "--set", "report.plots=true")
    assert ended.exit_code == 130
    assert f"stopped after round 0; resume with: fedtune simulate --resume {path}" in ended.stderr
    assert not (path / "report.html").exists()  # what costs seconds is not done after Ctrl-C
    assert fedtune("report", path).exit_code == 0
    assert "interrupted" in (path / "report.html").read_text()
    refused = fedtune("export", path)
    assert refused.exit_code == 2
    assert "expected an adapter" in refused.stderr
