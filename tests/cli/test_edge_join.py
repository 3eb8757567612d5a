"""The command `fedtune-edge join`; whole runs are in tests/test_edge_link.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.edge import main
from fedtune.cli.edge_options import DONE, USAGE, train_command
from fedtune.deployment import join as join_module
from fedtune.deployment.join import takes_part
from fedtune.edge.recipe_check import check_recipe
from fedtune.errors import ConfigError
from tests.deployment.test_coordinator import RECIPE
from tests.deployment.test_join import SITE, greeting
from tests.edge.bundles import write_bundle
from tests.link.ceremony import enroll_parties

KSEED = RECIPE.replace('name = "flora"', 'name = "fedkseed"\nbank = "kron"\nseeds = 16')


def test_a_device_joins_with_its_own_process_and_only_what_it_can_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = list[Any]()
    monkeypatch.setattr(join_module, "join", lambda site, **options: asked.append((site, options)))
    monkeypatch.setattr("fedtune.edge.enrolment.check_ready", lambda site, **options: None)
    assert main(["join", "own.toml", "--server", "here:1", "--yes"]) == DONE
    [(site, options)] = asked
    assert (site, options["server"], options["command"]) == (Path("own.toml"), "here:1", train_command())
    assert options["suits"] is check_recipe
    assert options["agree"]("a recipe\x1b[2J\nof two lines") is True
    assert capsys.readouterr().err == "a recipe\\x1b[2J\nof two lines\n"
    assert main(["join"]) == DONE
    # Nobody sits there: it would end with status 0 and without a word.
    with pytest.raises(ConfigError, match=r"^policy\.ask: expected your yes to the recipe; got no terminal"):
        asked[1][1]["agree"]("a recipe")


def test_a_recipe_that_a_device_cannot_run_ends_it_before_anything_is_stored() -> None:
    with pytest.raises(ConfigError, match="take part with fedtune-client"):
        takes_part(check_recipe, "phone", None, greeting(RECIPE))
    assert takes_part(check_recipe, "phone", None, greeting(KSEED))
    assert takes_part(check_recipe, "phone", lambda recipe: "kron" in recipe, greeting(KSEED))
    assert not takes_part(None, "phone", lambda recipe: False, greeting(RECIPE))


def test_a_dry_run_without_a_server_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enroll_parties(tmp_path)
    site = tmp_path / "site-a" / "site.toml"
    site.write_text(SITE)
    write_bundle(tmp_path / "site-a" / "none")  # the base and the data of that file
    assert main(["join", str(site), "--dry-run"]) == USAGE
    error = capsys.readouterr().err
    assert "no server listens on localhost:1" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "site-a" / "state").exists()
