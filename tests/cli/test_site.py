"""The command site, as a hospital's engineer and network team meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.config.site import bind_site
from tests.deployment.test_join import SITE
from tests.link.ceremony import enroll_parties
from tests.link.link_server import run_link_server
from tests.link.middlebox import listening, saying


def run(*words: str, answers: str = "") -> tuple[int, str]:
    result = CliRunner().invoke(app, ["site", *words], input=answers)
    return result.exit_code, result.output


def test_a_check_prints_a_line_for_each_step(tmp_path: Path) -> None:
    with run_link_server(tmp_path) as running:
        path = tmp_path / "site-a" / "site.toml"
        path.write_text(SITE.replace("localhost:1", f"localhost:{running.port}"))
        status, output = run("check", str(path))
        assert status == 0
        assert [line.split()[0] for line in output.splitlines()] == [
            *("settings", "identity", "name", "port", "TLS", "HTTP/2", "server", "clock", "every")
        ]
        assert output.splitlines()[-1] == f"every step succeeds; next: fedtune join {path} --dry-run"
        status, output = run("check", str(path), "--json")
        assert (status, json.loads(output)["ok"]) == (0, True)


def test_a_check_that_fails_ends_with_status_2_and_the_step(tmp_path: Path) -> None:
    enroll_parties(tmp_path)
    path = tmp_path / "site-a" / "site.toml"
    path.write_text(SITE)
    with listening(saying(b"HTTP/1.1 403 \x1b[31mNo\r\n\r\n")) as box:
        status, output = run("check", str(path), "--proxy", f"http://anna:geheim@127.0.0.1:{box.port}")
        assert status == 2
        assert output.splitlines()[-1] == "failed: proxy; what comes after it was not tried"
        assert "answers 403 ([31mNo): it does not allow CONNECT to localhost:1" in output
        status, output = run("check", str(path), "--proxy", f"http://127.0.0.1:{box.port}", "--json")
    told = json.loads(output)
    assert (status, told["ok"]) == (2, False)
    assert {one["step"]: one["state"] for one in told["steps"]}["clock"] == "skipped"
    assert "geheim" not in output


def test_a_check_needs_a_file_or_a_server() -> None:
    status, output = run("check")
    assert status == 2
    assert "--server HOST:PORT" in output
    status, output = run("check", "none.toml")
    assert status == 2
    assert "no such file" in output


@pytest.mark.parametrize("command", ["check", "init"])
def test_help_has_examples(command: str) -> None:
    status, output = run(command, "--help")
    assert status == 0
    assert f"fedtune site {command}" in output


def test_a_site_file_is_written_from_answers_in_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 40)
    status, output = run("init", answers="\nsite-a\nfl.example.org:443\n\n\n\n\n\n\n\n\n\n\n")
    assert status == 0, output
    assert "wrote site.toml" in output
    assert output.splitlines()[-1] == "then: fedtune join site.toml --dry-run"
    site = bind_site(Path("site.toml"))
    assert dict(site.data.fields) == {"instruction": "question", "output": "answer"}
    before = Path("site.toml").read_bytes()
    status, output = run("init", "--yes", "--server", "a")
    assert (status, Path("site.toml").read_bytes()) == (2, before)
    assert "one that is there" in output


def test_a_site_file_is_written_from_options_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--name", "site-a", "--server", "a:1", "--data", "x.jsonl", "--ask", "yes", "--hours", "20:00-06:00"]
    status, output = run("init", "own.toml", *words, "--max-rounds", "all", "--scores", "keep", "--yes")
    assert status == 0, output
    site = bind_site(Path("own.toml"))
    assert (site.policy.ask, site.policy.max_rounds, site.policy.scores) == (True, None, "keep")


@pytest.mark.parametrize(
    ("words", "answers", "said"),
    [
        (["--yes"], "", "server: expected HOST or HOST:PORT; got nothing; answer, or give --server"),
        ([], "\n\n", "server: expected an answer; got the end of the input; give --server, or --yes for the defaults"),
        (["--yes", "--server", "a", "--data", "x", "--hours", "no"], "", "policy.hours: expected two times of day"),
    ],
)
def test_an_answer_that_lacks_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], answers: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, output = run("init", *words, answers=answers)
    assert status == 2
    assert said in output
    assert list(tmp_path.iterdir()) == []
