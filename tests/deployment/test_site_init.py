"""The questions for a site's file: what is proposed, what is taken, and what is written at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.site import bind_site
from fedtune.deployment.site_init import next_steps, questions, remarks, write
from fedtune.errors import ConfigError
from tests.link.ceremony import enroll_parties


def answered(path: Path, environment: Mapping[str, str] | None = None, **given: str) -> dict[str, Any]:
    """Return the answers, each the default where nothing is given."""
    answers: dict[str, Any] = {}
    for question in questions(path, environment or {}):
        key = question.key.replace("-", "_")
        if key in given or question.needed(answers):
            answers[question.key] = question.read(given.get(key, question.default(answers)), answers)
    return answers


def rows(path: Path, *columns: str, count: int = 50) -> None:
    path.write_text("".join(json.dumps({column: f"{column} {n}" for column in columns}) + "\n" for n in range(count)))


def test_an_enrolled_site_with_its_rows_has_but_a_server_to_say(tmp_path: Path) -> None:
    enroll_parties(tmp_path)
    rows(tmp_path / "site-a" / "notes.jsonl", "instruction", "output", "id")
    path = tmp_path / "site-a" / "site.toml"
    answers = answered(path, server="fl.example.org")
    assert list(remarks(answers)) == [
        "notes.jsonl: 50 rows; columns instruction, output, id",
        "used: instruction from 'instruction', output from 'output'",
    ]
    assert write(path, answers) == [str(path)]
    site = bind_site(path)
    assert site.link is not None
    assert (site.name, site.link.address, site.policy.columns) == (
        *("site-a", "fl.example.org:9000", ("instruction", "output")),
    )
    steps = list(next_steps(path, answers))
    assert steps[-2:] == [f"next: fedtune site check {path}", f"then: fedtune join {path} --dry-run"]
    assert not any(step.startswith("next: fedtune enroll") for step in steps)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    answers = answered(path, server="a", data="notes.jsonl")
    path.write_text("mine")
    with pytest.raises(ConfigError, match="one that is there"):
        write(path, answers)
    assert path.read_text() == "mine"


def test_a_password_goes_into_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    written = write(path, answered(path, server="a", data="x.jsonl", proxy="http://anna:p%40ss@proxy:3128"))
    assert written == [str(path), str(tmp_path / "proxy.secret")]
    assert "anna" not in path.read_text()
    secret = tmp_path / "proxy.secret"
    assert (secret.read_text(), secret.stat().st_mode & 0o777) == ("anna:p@ss\n", 0o600)


def test_columns_are_proposed_by_their_usual_names(tmp_path: Path) -> None:
    rows(tmp_path / "qa.jsonl", "id", "question", "answer", "context")
    path = tmp_path / "site.toml"
    assert answered(path, server="a")["fields"] == {"instruction": "question", "input": "context", "output": "answer"}
    rows(tmp_path / "qa.jsonl", "foo", "bar")
    assert answered(path, server="a")["fields"] == {}
    assert answered(path, server="a", fields="text=foo")["fields"] == {"text": "foo"}
    with pytest.raises(ConfigError, match="PART=COLUMN"):
        answered(path, server="a", fields="body=foo")
    with pytest.raises(ConfigError, match="nope"):
        answered(path, server="a", fields="text=nope")
    assert any("data.fields" in step for step in next_steps(path, answered(path, server="a")))


def test_rows_with_labels_may_be_classified(tmp_path: Path) -> None:
    rows(tmp_path / "notes.jsonl", "text", "label")
    path = tmp_path / "site.toml"
    answers = answered(path, server="a", task="classification")
    write(path, answers)
    site = bind_site(path)
    assert (site.model.task, dict(site.data.fields)) == ("classification", {"text": "text", "label": "label"})


def test_rows_that_cannot_be_read_yet_do_not_stop_the_questions(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    answers = answered(path, server="a", data="later.jsonl")
    assert list(remarks(answers)) == ["later.jsonl: nothing there yet; its columns are read when the site joins"]
    (tmp_path / "broken.jsonl").write_text("{")
    assert "one JSON object per line" in next(iter(remarks(answered(path, server="a", data="broken.jsonl"))))
    rows(tmp_path / "few.jsonl", "text", count=20)
    assert "policy.min_examples" in list(remarks(answered(path, server="a", data="few.jsonl")))[-1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"server": "a b"}, "server: expected HOST or HOST:PORT"),
        ({"server": "a:0"}, "server: expected HOST or HOST:PORT"),
        ({"server": "https://a"}, "server: expected HOST or HOST:PORT"),
        ({"name": "a b"}, "name: expected letters"),
        ({"proxy": "https://p:1"}, "proxy: expected an HTTP proxy"),
        ({"targets": " , "}, "targets: expected at least one name"),
        ({"max_rounds": "-1"}, "max-rounds: expected a number above 0, whole, or all"),
        ({"max_memory_gib": "nan"}, "max-memory-gib: expected a number above 0"),
        ({"hours": "25"}, "two times of day"),
        ({"ask": "perhaps"}, "ask: expected yes or no"),
        ({"scores": "x"}, "scores: expected send or keep or refuse"),
        ({"base": " "}, "expected a path or a name"),
    ],
)
def test_an_answer_that_is_none_is_one_sentence(tmp_path: Path, given: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        answered(tmp_path / "site.toml", {}, **{"server": "a", "data": "x.jsonl", **given})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_other_than_the_enrolled_one_is_refused(tmp_path: Path) -> None:
    enroll_parties(tmp_path)
    with pytest.raises(ConfigError, match="'site-a', as this site is enrolled; got 'site-x'"):
        answered(tmp_path / "site-a" / "site.toml", name="site-x")


def test_a_path_from_the_working_directory_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(tmp_path / "rows.jsonl", "text")
    monkeypatch.chdir(tmp_path)
    answers = answered(tmp_path / "sites" / "site.toml", server="a", data="rows.jsonl")
    assert answers["data"].source == str(tmp_path / "rows.jsonl")


def test_the_environments_proxy_is_proposed(tmp_path: Path) -> None:
    assert (
        answered(tmp_path / "s.toml", {"HTTPS_PROXY": "http://p:1"}, server="a", data="x.csv")["proxy"] == "environment"
    )
    assert answered(tmp_path / "s.toml", {}, server="a", data="x.csv")["proxy"] == ""
