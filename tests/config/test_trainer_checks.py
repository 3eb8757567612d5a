from __future__ import annotations

import pytest

from fedtune.config import bind, render
from fedtune.config.trainer_checks import names_trainer, refuse_named
from fedtune.errors import ConfigError
from tests.config.conftest import SHORTEST

TRAINER = 'client.trainer="a:b"'


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["method.name=fedkseed"],
            'method.name: expected a method of LoRA adapters beside client.trainer; got "fedkseed"',
        ),
        (
            ["personal.kind=ditto"],
            "personal: expected no models of the clients' own beside client.trainer; got that table",
        ),
        (["model.dtype=nf4"], 'model.dtype: expected a base that is not quantised beside client.trainer; got "nf4"'),
    ],
)
def test_what_only_fedtunes_own_training_does_is_refused_at_the_start(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bind(SHORTEST, overrides=[TRAINER, *overrides])
    assert sentence in str(caught.value)


def test_a_recipe_names_a_trainer_for_all_clients_or_for_some() -> None:
    assert not names_trainer(bind(SHORTEST))
    assert names_trainer(bind(SHORTEST, overrides=[TRAINER]))
    named = bind(SHORTEST, overrides=[TRAINER])
    assert bind(render(named)).client == named.client
    assert "trainer" not in render(bind(SHORTEST))
    some = SHORTEST + '\n[[override]]\nclients = "client-1"\ntrainer = "a:b"\n'
    assert names_trainer(bind(some))


def test_a_served_recipe_names_none_for_no_site_would_call_it() -> None:
    refuse_named(bind(SHORTEST))
    with pytest.raises(
        ConfigError, match=r"client.trainer: expected none in a recipe that is served to sites; got one; name it in"
    ):
        refuse_named(bind(SHORTEST, overrides=[TRAINER]))
