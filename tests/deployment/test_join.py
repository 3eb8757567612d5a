"""A site's own file compared with the demands of a run; joining one is tested in tests/test_link.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.deployment.join import compare_with_policy, join, load_join_setup, recipe_demand
from fedtune.deployment.server_setup import data_at_sites
from fedtune.errors import ConfigError
from fedtune.link.client.session import Greeting
from fedtune.wire.v1 import link_pb2 as pb
from tests.deployment.test_coordinator import RECIPE
from tests.link.ceremony import enroll_parties

SITE = """
name = "site-a"
[model]
base = "none"
[adapter]
targets = ["q"]
[data]
source = "none"
fields = { instruction = "question", output = "answer" }
[link]
address = "localhost:1"
[policy]
min_examples = 1
max_rank = 4
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    enroll_parties(tmp_path)
    path = tmp_path / "site-a" / "site.toml"
    path.write_text(SITE)
    return path


def test_a_site_is_bound_with_its_identity_and_its_paths_start_at_its_file(site: Path) -> None:
    result = load_join_setup(site)
    assert result.identity.name == "site-a"
    assert result.state == site.parent / "state"
    assert load_join_setup(site, server="other:2").link.address == "other:2"


def test_a_proxy_is_the_files_or_that_of_the_environment(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert load_join_setup(site).link.proxy == ""
    site.write_text(SITE.replace("[policy]", 'proxy = "environment"\nproxy_credentials = "secret"\n[policy]'))
    (site.parent / "secret").write_text("anna:geheim\n")
    (site.parent / "secret").chmod(0o600)
    setup = load_join_setup(site)
    assert setup.link.proxy == "http://anna:geheim@proxy:3128"
    assert "geheim" not in repr(setup)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('name = "site-a"', 'name = "site-b"', "as this site is enrolled"),
        ('address = "localhost:1"', 'address = "localhost"', "HOST:PORT"),
        ('[link]\naddress = "localhost:1"\n', "", "--server"),
        ('address = "localhost:1"', 'address = "localhost:1"\nidentity = "nowhere"', "fedtune enroll request"),
    ],
)
def test_what_does_not_fit_is_reported_before_a_connection(site: Path, old: str, new: str, match: str) -> None:
    assert old in SITE
    site.write_text(SITE.replace(old, new))
    with pytest.raises(ConfigError, match=match):
        load_join_setup(site)


def greeting(recipe: str) -> Greeting:
    from fedtune.config import render

    text = render(data_at_sites(recipe)).encode()
    return Greeting(1, pb.Limits(), "run", pb.Envelope(), text)


def test_a_dry_run_says_what_would_be_asked_and_what_the_policy_says(site: Path) -> None:
    shown = compare_with_policy(load_join_setup(site), greeting(RECIPE))
    assert shown.allowed
    assert (shown.demand.method, shown.demand.rank, shown.demand.steps, shown.rounds) == ("flora", 2, 1, 1)
    assert shown.columns == {"instruction": "question", "output": "answer"}
    refused = compare_with_policy(load_join_setup(site), greeting(RECIPE.replace("rank = 2", "rank = 8")))
    assert not refused.allowed
    assert refused.facts["refusals"] == ["policy.max_rank: allowed 4; got 8"]


def test_a_dry_run_says_which_rounds_would_be_declined_and_refuses_only_what_is_certain(site: Path) -> None:
    site.write_text(SITE.replace("max_rank = 4", "min_cohort = 3"))
    setup = load_join_setup(site)
    open_ended = compare_with_policy(setup, greeting(RECIPE))  # takes every site that is there
    assert open_ended.allowed
    assert [text.partition(";")[0] for text in open_ended.remarks] == [
        "policy.min_cohort: rounds of fewer than 3 clients will be declined"
    ]
    promised = compare_with_policy(setup, greeting(RECIPE.replace("[rounds]", "[rounds]\nmin_clients = 3")))
    assert (promised.allowed, promised.remarks) == (True, ())
    small = compare_with_policy(setup, greeting(RECIPE.replace("[rounds]", "[rounds]\ncohort = 2")))
    assert small.facts["refusals"] == ["policy.min_cohort: at least 3; got 2"]
    text = RECIPE.replace('"flora"', '"fedit"').replace(
        "[rounds]", "[asynchronous]\nbuffer = 2\n\n[rounds]\ncohort = 3"
    )
    alone = compare_with_policy(setup, greeting(text))
    assert alone.facts["refusals"] == ["policy.min_cohort: at least 3; got 1"]
    assert "asynchronous rounds name no other client, so with 3 this site declines every order" in alone.remarks[0]


def test_a_dry_run_says_in_words_what_the_recipe_permits_and_what_is_too_little(site: Path) -> None:
    setup = load_join_setup(site)
    assert compare_with_policy(setup, greeting(RECIPE)).permitted == {
        "rounds": "1 to 1",
        "work": "1 steps of 1 examples, at the rate 0.1",
        "ranks": "2",
        "pruning": "0",
        "whole": "nothing",
        "scores": "of at most 64 held-out rows, after each evaluation",
        "bytes": "the factors in int8; those in full in fp32",
    }
    planned = RECIPE + '[planner]\nname = "random"\nranks = [2, 16]\n'
    assert compare_with_policy(setup, greeting(planned)).permitted["ranks"] == "2, 16"
    seeds = RECIPE.replace('"flora"', '"fedkseed"').replace("steps = 1", "epochs = 2")
    permitted = compare_with_policy(setup, greeting(seeds)).permitted
    assert permitted["work"] == "2 passes over its examples, 1 in a step, at the rate 0.1"
    assert (permitted["ranks"], permitted["whole"]) == ("none", "none")
    site.write_text(SITE.replace("min_examples = 1\n", ""))
    refused = compare_with_policy(load_join_setup(site), greeting(RECIPE))
    assert refused.facts["refusals"] == ["policy.min_examples: an update of at least 32 examples; got 1"]


def test_an_override_for_this_site_counts() -> None:
    recipe = data_at_sites(RECIPE + '[[override]]\nclients = ["site-a"]\nrank = 1\n')
    assert recipe_demand(recipe, "site-a").rank == 1
    assert recipe_demand(recipe, "site-b").rank == 2


def test_one_process_takes_part_with_a_state_folder(site: Path) -> None:
    from fedtune.errors import StoreError
    from fedtune.store.lock import lock_run

    (site.parent / "state").mkdir()
    with lock_run(site.parent / "state"), pytest.raises(StoreError, match="no other process"):
        join(site, record=lambda kind, **fields: None)
