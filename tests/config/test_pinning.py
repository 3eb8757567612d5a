from __future__ import annotations

import tomllib

import pytest

from fedtune.config.pinning import pin_digest
from fedtune.errors import ConfigError

OLD, NEW = "a" * 64, "b" * 64
FORMS = {
    "table": '# first\n[model] # the base\nbase = "x"\n\n[data]\nsource = "digest = 1"\n',
    "table with another digest": f'[model]\nbase = "x"\ndigest = "{OLD}" # of yesterday\n[data]\nsource = "y"\n',
    "inline": 'name = "a"\nmodel = { base = "x" } # small\ndata = { source = "y" }\n',
    "inline with another digest": f'model = {{ digest = "{OLD}", base = "x" }}\n',
    "inline with a brace in its name": 'model = { base = "x}y" }\n',
    "dotted": 'model.base = "x"\ndata.source = "y"\n',
    "dotted with another digest": f'model.digest = "{OLD}"\nmodel.base = "x"\n',
    "a digest of another table": f'[data]\ndigest = "{OLD}"\n[model]\nbase = "x"\n',
    "the last line, without an end": '[model]\nbase = "x"',
}


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"inline with a brace in its name"}))
def test_the_digest_is_the_only_change(form: str) -> None:
    text = FORMS[form]
    pinned = pin_digest(text, NEW)
    before = tomllib.loads(text)
    assert tomllib.loads(pinned) == {**before, "model": {**before["model"], "digest": NEW}}
    assert pin_digest(pinned, NEW) == pinned
    for comment in ("# first", "# the base", "# small", "# of yesterday"):
        assert (comment in pinned) == (comment in text)


@pytest.mark.parametrize("text", [FORMS["inline with a brace in its name"], 'data = { source = "y" }\n'])
def test_a_text_that_cannot_be_changed_safely_is_refused_with_what_to_add(text: str) -> None:
    with pytest.raises(ConfigError, match=f'model.digest: .*add digest = "{NEW}"'):
        pin_digest(text, NEW, label="a.toml")


def test_what_is_no_toml_is_refused() -> None:
    with pytest.raises(ConfigError, match="TOML"):
        pin_digest("model = {", NEW)
