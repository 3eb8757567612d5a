from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.config.site import bind_site
from fedtune.errors import ConfigError

SITE = """
name = "site-a"

[model]
base = "embedded"
threads = 2

[adapter]
targets = ["q_proj"]

[data]
source = "train.jsonl"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "site.toml"
    path.write_text(text)
    return path


def faults(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        bind_site(written(tmp_path, text))
    return str(caught.value)


def test_a_site_is_its_name_its_model_and_its_data(tmp_path: Path) -> None:
    site = bind_site(written(tmp_path, SITE))
    assert (site.name, site.seed, site.model.threads, site.root) == ("site-a", 0, 2, tmp_path)
    assert site.adapter is not None
    assert site.adapter.settings.targets == ("q_proj",)
    assert (site.data.split.kind, site.data.split.clients, site.split) == ("iid", 1, False)


def test_a_split_of_the_data_is_kept(tmp_path: Path) -> None:
    site = bind_site(written(tmp_path, SITE + 'split = { kind = "key", by = "who" }\n'))
    assert (site.data.split.kind, site.split) == ("key", True)


def test_a_site_without_a_name_is_called_as_its_file(tmp_path: Path) -> None:
    assert bind_site(written(tmp_path, SITE.replace('name = "site-a"', ""))).name == "site"


def test_what_is_for_the_server_to_say_is_refused(tmp_path: Path) -> None:
    said = faults(tmp_path, SITE.replace('["q_proj"]', '["q_proj"]\nrank = 8') + "[rounds]\ncount = 3\n")
    assert "adapter.rank: unknown key" in said
    assert "rounds: unknown key" in said


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    said = faults(tmp_path, 'name = "../x"\nseed = -1\n[model]\nbase = 3\n')
    assert [key in said for key in ("name:", "seed:", "model.base:", "adapter:", "data:")] == [True] * 5
    assert "site.toml: 5 faults" in said


def test_a_table_that_is_no_table_is_a_fault(tmp_path: Path) -> None:
    assert "data: expected a table" in faults(tmp_path, 'data = "train.jsonl"\n' + SITE.partition("[data]")[0])


def test_a_split_that_cannot_be_made_is_a_fault(tmp_path: Path) -> None:
    assert "data.split.by: expected a value" in faults(tmp_path, SITE + 'split = "key"\n')


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        bind_site(tmp_path / "absent.toml")


def test_the_example_in_clients_binds() -> None:
    site = bind_site(Path(__file__).parents[2] / "clients" / "supernode" / "site.toml")
    assert site.name == "site-a"


LINKED = """
name = "anna"
[model]
base = "base"
[adapter]
targets = ["q"]
[data]
source = "rows.jsonl"
fields = { instruction = "question", output = "answer" }
[link]
address = "fl.example.org:9000"
[policy]
methods = ["flora"]
hours = "20:00-06:00"
columns = ["question", "answer"]
"""


def test_a_site_says_whom_it_dials_and_what_it_will_do(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(LINKED)
    settings = bind_site(path)
    assert settings.link is not None
    assert settings.link.address == "fl.example.org:9000"
    assert (settings.policy.methods, settings.policy.hours) == (("flora",), "20:00-06:00")


def test_a_column_that_the_policy_does_not_name_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(LINKED.replace('columns = ["question", "answer"]', 'columns = ["question"]'))
    with pytest.raises(ConfigError, match=r"data\.fields\.output: expected a column of policy\.columns"):
        bind_site(path)
    path.write_text(LINKED.replace("fields = ", "# fields = "))
    with pytest.raises(ConfigError, match="every column by name"):
        bind_site(path)


def test_faults_of_link_and_policy_are_told_together(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(LINKED.replace("address", "adress").replace("20:00", "late").replace("methods", "methodes"))
    with pytest.raises(ConfigError) as caught:
        bind_site(path)
    assert {fault.path.partition(".")[0] for fault in caught.value.faults} == {"link", "policy"}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ('proxy = "https://anna:geheim@proxy:3128"', "link.proxy: expected an HTTP proxy, http://HOST:PORT"),
        ('proxy = "http://anna:geheim@proxy"', "'proxy' without a port"),
        ('proxy_credentials = "geheim.secret"', "link.proxy: expected the proxy that link.proxy_credentials is for"),
    ],
)
def test_a_proxy_is_checked_before_the_network_is_asked(tmp_path: Path, keys: str, words: str) -> None:
    said = faults(tmp_path, SITE + f'[link]\naddress = "a:1"\n{keys}\n')
    assert words in said
    assert "geheim" not in said.replace("link.proxy_credentials", "")
    named = bind_site(written(tmp_path, SITE + '[link]\naddress = "a:1"\nproxy = "environment"\n'))
    assert named.link is not None
    assert named.link.proxy == "environment"
